"""Laws of the scores, and what they say of matrices whose answer is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spectrum_peft import names
from spectrum_peft.errors import CheckpointError, OptionError
from spectrum_peft.scan import CRITERIA, criteria, edges, gram
from spectrum_peft.scan.criteria import score, singular_values

SHAPES = [(64, 96), (96, 64), (41, 7), (9, 200), (130, 130)]
OF_MATRICES = [name for name, row in CRITERIA.items() if row.needs_weights]
OF_SPECTRA = [name for name, row in CRITERIA.items() if row.needs_spectrum]


def noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(noise((n, n), generator))[0]


def planted(shape: tuple[int, int], k: int, strength: float, generator: torch.Generator) -> Tensor:
    """Noise of unit variance with k directions `strength` times as long as the noise reaches."""
    n, m = shape
    left = torch.linalg.qr(noise((n, k), generator))[0]
    right = torch.linalg.qr(noise((m, k), generator))[0]
    lengths = strength * (math.sqrt(n) + math.sqrt(m)) * torch.linspace(2, 1, k, dtype=torch.float64)
    return noise(shape, generator) + (left * lengths) @ right.T


# --- singular values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_singular_values_are_those_of_the_svd(
    shape: tuple[int, int], dtype: torch.dtype, seeded: torch.Generator
) -> None:
    matrix = noise(shape, seeded).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    assert values.shape == (min(shape),)
    assert torch.equal(values, values.sort(descending=True).values)
    # What float32 promises: eigenvalues to a few eps of the largest, and so the sum of the values to much more.
    torch.testing.assert_close(values**2, exact**2, rtol=0.0, atol=2e-6 * float(exact[0] ** 2))
    assert float(values.sum()) == pytest.approx(float(exact.sum()), rel=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_the_blocks_of_the_gram_matrix_fit_together(length: int, seeded: torch.Generator) -> None:
    """Sides around the block sizes, and a long side of more than one slice."""
    matrix = noise((length, gram._SLICE + 17), seeded)
    exact = torch.linalg.svdvals(matrix)
    for turned in (matrix, matrix.T, matrix.T.contiguous()):
        torch.testing.assert_close(singular_values(turned), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("spike", [30.0, 300.0, 3000.0, 1e5])
@pytest.mark.parametrize("criterion", ["spectrum", "mp", "mean_std"])
def test_float32_is_left_where_one_direction_outshines_the_rest(
    spike: float, criterion: str, seeded: torch.Generator
) -> None:
    matrix = planted((96, 160), 3, spike, seeded).float()
    exact = criteria.score_values(torch.linalg.svdvals(matrix.double()), (96, 160), criterion)
    found = score(matrix, criterion)
    assert found.n_signal == exact.n_signal
    assert found.score == pytest.approx(exact.score, rel=CRITERIA[criterion].tolerance)


@pytest.mark.parametrize("small", [0.02, 0.06])
def test_noise_of_a_single_small_value_is_resolved(small: float, seeded: torch.Generator) -> None:
    """The whole score hangs on one value, far below the rest, which float32 gets wrong by a thousandth or so."""
    values = torch.linspace(1.0, 0.9, 96, dtype=torch.float64)
    values[-1] = small
    matrix = ((rotation(96, seeded) * values) @ rotation(96, seeded)).float()
    exact = criteria.score_values(torch.linalg.svdvals(matrix.double()), (96, 96), "spectrum")
    assert exact.n_signal == 95
    # The float64 Gram matrix squares the condition: 96 * 2.2e-16 / 0.02^2 is 5e-11; float32 would be off by 1e-3.
    assert score(matrix, "spectrum").score == pytest.approx(exact.score, rel=1e-7)


def test_a_value_that_float32_cannot_place_is_placed_in_float64() -> None:
    """A diagonal matrix with a value just above the edge, by less than float32 resolves."""
    shape = (61, 61)
    values = torch.cat([torch.linspace(1.05, 1.0, 31), torch.linspace(0.25, 0.2, 30)]).double()
    edge = edges.published_edge(values, shape)  # depends on the quartiles only, and lies above all of the values
    assert edge > 1.1
    trial = torch.cat([torch.tensor([edge * (1 + 1e-9)], dtype=torch.float64), values[1:]])
    assert edges.published_edge(trial, shape) == edge
    assert score(torch.diag(trial), "spectrum").n_signal == 1
    coarse = gram.gram_values(torch.diag(trial), torch.float32, 1.0)
    assert not criteria._trusted(coarse, shape, CRITERIA["spectrum"])
    assert criteria._trusted(coarse, shape, None)


def spectra(generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices of every sort of spectrum that a score may find hard, float32."""
    near_rotation = rotation(150, generator) + 1e-4 * noise((150, 150), generator) / math.sqrt(150)
    decay = torch.logspace(0, -3, 160, dtype=torch.float64)
    low = noise((140, 20), generator) @ noise((20, 200), generator)
    return {
        "square noise": noise((130, 130), generator).float(),
        "larger square noise": noise((320, 320), generator).float(),
        "wide noise": noise((96, 700), generator).float(),
        "tall noise": noise((400, 250), generator).float(),
        "strong directions": planted((160, 200), 3, 20.0, generator).float(),
        "all values nearly equal": near_rotation.float(),
        "values over three decades": ((rotation(160, generator) * decay) @ rotation(160, generator)).float(),
        "low rank": low.float(),
        "low rank in noise": (low + 1e-2 * noise((140, 200), generator)).float(),
    }


@pytest.mark.parametrize("criterion", OF_SPECTRA)
@pytest.mark.parametrize("what", spectra(torch.Generator().manual_seed(0)))
def test_a_score_is_within_its_criterions_tolerance(criterion: str, what: str) -> None:
    """Against float64 singular values of the same matrix, whatever the processor made of float32."""
    for seed in range(3):
        matrix = spectra(torch.Generator().manual_seed(seed))[what]
        shape = (matrix.shape[0], matrix.shape[1])
        exact = criteria.score_values(torch.linalg.svdvals(matrix.double()), shape, criterion)
        found = score(matrix, criterion)
        if what == "low rank" and CRITERIA[criterion].edge:  # its noise is the rounding to float32, 1e-8 of s_1
            assert (found.score, found.n_signal) == (math.inf, 20)
            continue
        assert found.n_signal == exact.n_signal
        assert found.score == pytest.approx(exact.score, rel=CRITERIA[criterion].tolerance)


@pytest.mark.parametrize("openblas", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (130, 130), (400, 250), (512, 512)])
@pytest.mark.parametrize("strength", [None, 3.0, 30.0])
def test_float32_errs_no_more_than_the_trust_in_it_assumes(
    shape: tuple[int, int],
    strength: float | None,
    openblas: bool,
    seeded: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one assumption about the processor and its libraries: where this fails, `_USUAL` and `_WORST` are too low."""
    monkeypatch.setattr(gram, "prefers_openblas", lambda matrix: openblas)
    matrix = (noise(shape, seeded) if strength is None else planted(shape, 3, strength, seeded)).float()
    exact = torch.linalg.svdvals(matrix.double()).square()
    eps = torch.finfo(torch.float32).eps
    error = (gram.gram_values(matrix, torch.float32, 1.0).square() - exact).abs()
    in_units = error / (eps * (exact.mean() + 4 * exact))
    assert float(in_units.mean()) <= criteria._USUAL
    assert bool(((in_units <= criteria._WORST) | (error <= criteria._WORST_OF_TOP * eps * exact[0])).all())


@pytest.mark.parametrize("criterion", [name for name in OF_SPECTRA if CRITERIA[name].sensitivity])
def test_values_that_are_trusted_score_within_the_tolerance_whatever_their_errors(criterion: str) -> None:
    """Spectra that are nearly too hard, and the errors that do most harm: all with the sign that moves the score one way,
    one of them at its worst. No matrix and no solver take part."""
    row, eps = CRITERIA[criterion], torch.finfo(torch.float32).eps
    assert row.sensitivity is not None
    trusted = refused = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(20, 200, (), generator=generator))
        shape = (count, count + int(torch.randint(0, 100, (), generator=generator)))
        drawn = torch.rand(count, generator=generator, dtype=torch.float64) ** float(
            torch.randint(1, 5, (), generator=generator)
        )
        values = (drawn + 10.0 ** -float(torch.randint(1, 5, (), generator=generator))).sort(descending=True).values
        if not criteria._trusted(values, shape, row):
            refused += 1
            continue
        trusted += 1
        exact = criteria.score_values(values, shape, criterion)
        squares = values.square()
        error = criteria._USUAL * eps * (squares.mean() + 4 * squares)
        slopes = row.sensitivity(values, exact.n_signal or 0)
        most = int((slopes.abs() * error / values).argmax())
        error[most] *= criteria._WORST / criteria._USUAL
        for sign in (1.0, -1.0):
            off = (squares + sign * slopes.sign() * error).clamp(min=0).sqrt().sort(descending=True).values
            found = criteria.score_values(off, shape, criterion)
            assert found.n_signal == exact.n_signal
            assert found.score == pytest.approx(exact.score, rel=row.tolerance)
    assert min(trusted, refused) > 10  # of both, so that the line between them was tried


@pytest.mark.parametrize("criterion", [name for name in OF_SPECTRA if CRITERIA[name].sensitivity])
def test_the_sensitivity_is_the_derivative_of_the_score(criterion: str, seeded: torch.Generator) -> None:
    """Against central differences, of values that no edge lies close to."""
    row, shape = CRITERIA[criterion], (12, 20)
    values = torch.cat([torch.linspace(9.0, 7.0, 4), torch.linspace(2.0, 1.0, 8)]).double()
    found = criteria.score_values(values, shape, criterion)
    assert row.sensitivity is not None
    slopes = row.sensitivity(values, found.n_signal or 0)
    for i in range(len(values)):
        step = torch.zeros_like(values)
        step[i] = 1e-6
        up, down = (criteria.score_values(values + s * step, shape, criterion) for s in (1.0, -1.0))
        assert up.n_signal == down.n_signal == found.n_signal
        # Rounding: 2.2e-16 * log(score) over the step of 2e-6, about 1e-10; curvature: the step squared. Some slopes are 0.
        assert float(slopes[i]) == pytest.approx((math.log(up.score) - math.log(down.score)) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25])
def test_tiny_and_huge_weights_neither_vanish_nor_overflow(factor: float, seeded: torch.Generator) -> None:
    matrix = noise((20, 30), seeded).float()
    # Scaling by a power of ten rounds each entry to 2**-24, and an SVD in float32 errs by tens of that of the largest
    # value; the least is above a tenth of it.
    torch.testing.assert_close(singular_values(matrix * factor) / factor, singular_values(matrix), rtol=1e-5, atol=0.0)


def test_the_smallest_value_is_right_where_the_gram_matrix_cannot_show_it(seeded: torch.Generator) -> None:
    lengths = torch.logspace(0, -11, 24, dtype=torch.float64)
    matrix = (rotation(24, seeded) * lengths) @ rotation(24, seeded)
    # A float64 SVD is off by 24 * 2.2e-16 of the largest value: 5e-4 of 1e-11.
    assert score(matrix, "kappa").score == pytest.approx(1e-11, rel=1e-3)


def test_a_lower_product_precision_is_not_used(seeded: torch.Generator) -> None:
    """`torch.set_float32_matmul_precision` lets float32 products be rounded to bfloat16; the scan does not follow."""
    matrix = noise((64, 96), seeded).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        values = singular_values(matrix)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()), rtol=1e-9, atol=0.0)


# --- what every criterion obeys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", OF_SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_transposed_matrix_has_the_same_score(
    criterion: str, shape: tuple[int, int], seeded: torch.Generator
) -> None:
    """Rows and columns are added up in another order, so that each of the two may be off by the tolerance."""
    matrix = noise(shape, seeded)
    found = score(matrix.T, criterion).score
    assert found == pytest.approx(score(matrix, criterion).score, rel=2 * CRITERIA[criterion].tolerance)


@pytest.mark.parametrize("criterion", OF_SPECTRA)
def test_a_rotation_leaves_the_score(criterion: str, seeded: torch.Generator) -> None:
    matrix = planted((40, 56), 4, 3.0, seeded)
    turned = rotation(40, seeded) @ matrix @ rotation(56, seeded)
    found = score(turned, criterion).score
    assert found == pytest.approx(score(matrix, criterion).score, rel=2 * CRITERIA[criterion].tolerance)


@pytest.mark.parametrize("criterion", OF_MATRICES)
@pytest.mark.parametrize("scale", [1e-3, 0.5, 7.0, 1e4])
def test_scaling(criterion: str, scale: float, seeded: torch.Generator) -> None:
    """The published score divides by s_1, so score(c W) = score(W) / c; all the others do not see the scale."""
    matrix = planted((48, 80), 3, 2.0, seeded)
    expected = score(matrix, criterion).score / (scale if criterion == "spectrum" else 1.0)
    found = score(matrix * scale, criterion).score
    assert found == pytest.approx(expected, rel=2 * CRITERIA[criterion].tolerance)


@pytest.mark.parametrize("criterion", OF_MATRICES)
def test_the_matrix_is_left_as_it_was(criterion: str, seeded: torch.Generator) -> None:
    matrix = noise((30, 20), seeded).float().requires_grad_()
    before = matrix.detach().clone()
    score(matrix, criterion)
    assert torch.equal(matrix, before)
    assert matrix.grad is None


@pytest.mark.parametrize("criterion", OF_MATRICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_and_place(criterion: str, value: float, seeded: torch.Generator) -> None:
    matrix = noise((6, 9), seeded).float()
    matrix[2, 5] = value
    matrix[4, 1] = math.nan
    with pytest.raises(CheckpointError, match=rf"layer\.weight: element \[2, 5\] is {value}.*2 of 54"):
        score(matrix, criterion, name="layer.weight")


@pytest.mark.parametrize(
    ("criterion", "zero", "rank_one", "one_row"),
    [
        ("spectrum", 0.0, math.inf, 1.0),
        ("mp", 0.0, math.inf, 0.0),
        ("mean_std", 0.0, math.sqrt(8) / 8, math.inf),
        ("row_norm", 0.0, None, math.inf),
        ("kappa", 0.0, 0.0, 1.0),
    ],
)
def test_matrices_without_a_spectrum_to_speak_of(
    criterion: str, zero: float, rank_one: float | None, one_row: float
) -> None:
    """Zero; one direction alone; and one row, whose empty noise set counts as 1 to the published score."""
    outer = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 13.0))
    row = torch.zeros(1, 12)
    row[0, 3], row[0, 4] = 3.0, 4.0
    assert score(torch.zeros(8, 12), criterion).score == zero
    if rank_one is not None:
        # Whole numbers in float32, a few roundings of 6e-8; what should be 0 is a rounding of float64, 12 * 2.2e-16.
        assert score(outer, criterion).score == pytest.approx(rank_one, abs=1e-12, rel=1e-6)
    assert score(row, criterion).score == pytest.approx(one_row)
    assert score(row[0], criterion).score == pytest.approx(one_row)  # 1-D is one row


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"norm\.weight: shape is \(0, 4\)"):
        score(torch.zeros(0, 4), "mp", name="norm.weight")


# --- the published score ---------------------------------------------------------------------------------------------


def published(matrix: Tensor) -> float:
    """The published formula once more, step by step on Python floats."""
    s = sorted(torch.linalg.svdvals(matrix.double()).tolist())
    k = len(s)

    def quantile(q: float) -> float:
        at = q * (k - 1)
        low = int(at)
        return s[low] + (at - low) * (s[min(low + 1, k - 1)] - s[low])

    edge = (quantile(0.75) - quantile(0.25)) / 1.349 * (1 + math.sqrt(k / max(matrix.shape)))
    signal, rest = [v for v in s if v > edge], [v for v in s if v <= edge]
    return math.fsum(signal) / (math.fsum(rest) if rest else 1.0) / s[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_published_formula(shape: tuple[int, int], seeded: torch.Generator) -> None:
    matrix = planted(shape, 2, 1.5, seeded)
    assert score(matrix, "spectrum").score == pytest.approx(published(matrix), rel=CRITERIA["spectrum"].tolerance)


@pytest.mark.parametrize(("shape", "least", "most"), [((64, 96), 20, 40), ((512, 128), 128, 128)])
def test_the_published_edge_calls_noise_signal(
    shape: tuple[int, int], least: int, most: int, seeded: torch.Generator
) -> None:
    """A fact about the source, kept for compatibility: its edge is no edge of noise."""
    found = score(noise(shape, seeded), "spectrum").n_signal
    assert found is not None
    assert least <= found <= most


# --- the Marchenko-Pastur score --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 96), (300, 100), (128, 128), (40, 400)])
def test_there_is_no_signal_in_noise(shape: tuple[int, int]) -> None:
    for seed in range(20):
        found = score(noise(shape, torch.Generator().manual_seed(seed)), "mp")
        assert (found.score, found.n_signal) == (0.0, 0)


@pytest.mark.parametrize("shape", [(64, 96), (300, 100), (128, 128), (40, 400)])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_planted_directions_are_counted_exactly(shape: tuple[int, int], k: int) -> None:
    for seed in range(5):
        matrix = planted(shape, k, 1.5, torch.Generator().manual_seed(seed))
        assert score(matrix, "mp").n_signal == k


def test_the_score_is_the_energy_above_over_the_energy_below(seeded: torch.Generator) -> None:
    matrix = planted((64, 96), 5, 2.0, seeded)
    energy = torch.linalg.svdvals(matrix).square()
    wanted = float(energy[:5].sum() / energy[5:].sum())
    assert score(matrix, "mp").score == pytest.approx(wanted, rel=CRITERIA["mp"].tolerance)


@pytest.mark.parametrize(("n", "m"), [(100, 2000), (500, 2000), (700, 1000), (800, 800)])
def test_the_median_of_the_law_is_that_of_large_noise(n: int, m: int, seeded: torch.Generator) -> None:
    eigenvalues = torch.linalg.svdvals(noise((n, m), seeded)).square() / m
    # Eigenvalues of noise lie within order 1 / n of their places: 0.01 for n = 100.
    assert edges.mp_median(n / m) == pytest.approx(float(eigenvalues.quantile(0.5)), rel=0.01)


def test_the_median_of_the_law_halves_its_mass() -> None:
    """Against the density itself, integrated from the lower end by the trapezoid rule on a fine grid."""
    beta = 0.4
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    x = torch.linspace(low, high, 400_001, dtype=torch.float64)
    density = ((high - x) * (x - low)).clamp(min=0).sqrt() / (2 * math.pi * beta * x)
    median = edges.mp_median(beta)
    # Steps of 6e-6: at its ends, where the density is a root, the rule is off by step^1.5, 2e-8; the cut by a step at most.
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, rel=1e-6)
    assert float(torch.trapezoid(density[x <= median], x[x <= median])) == pytest.approx(0.5, rel=1e-4)


def test_the_edge_is_where_the_largest_value_of_noise_lies(seeded: torch.Generator) -> None:
    shape = (400, 900)
    values = torch.linalg.svdvals(noise(shape, seeded))
    edge = edges.marchenko_pastur_edge(values, shape)
    assert float(values[0]) < edge < 1.05 * (math.sqrt(400) + math.sqrt(900))


# --- the others ------------------------------------------------------------------------------------------------------


def test_mean_over_std_and_row_norms(seeded: torch.Generator) -> None:
    matrix = noise((30, 50), seeded)
    values, rows = torch.linalg.svdvals(matrix), matrix.norm(dim=1)
    wanted = {
        "mean_std": values.mean() / values.std(), "row_norm": rows.mean() / rows.std(), "kappa": values[-1] / values[0],
    }  # fmt: skip
    for name, value in wanted.items():
        assert score(matrix, name).score == pytest.approx(float(value), rel=CRITERIA[name].tolerance), name


def test_what_a_score_carries(seeded: torch.Generator) -> None:
    matrix = noise((30, 50), seeded)
    found = score(matrix, "spectrum")
    # Float32: the largest eigenvalue is off by some 4 eps of itself, the value by half of that, 2.4e-7.
    assert found.s_max == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-6)
    assert found.power_law is not None
    cheap = score(matrix, "row_norm")
    assert (cheap.n_signal, cheap.s_max, cheap.power_law) == (None, None, None)


def test_random_depends_on_seed_and_name_alone() -> None:
    first = score(None, "random", name="a.0.weight", seed=1).score
    assert first == score(None, "random", name="a.0.weight", seed=1).score
    assert first != score(None, "random", name="a.0.weight", seed=2).score
    assert first != score(None, "random", name="a.1.weight", seed=1).score
    assert score(None, "random", name="a.gate[0]").score == score(None, "random", name="a.gate[7]").score
    values = torch.tensor([score(None, "random", name=f"{i}").score for i in range(2000)])
    assert float(values.min()) >= 0.0
    assert float(values.max()) < 1.0
    # The mean of 2,000 uniform numbers has the deviation 0.289 / sqrt(2000) = 0.0065; the seed is fixed.
    assert float(values.mean()) == pytest.approx(0.5, abs=0.03)


def test_first_and_last_rank_by_block() -> None:
    blocks = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    last = [score(None, "last", name=name).score for name in blocks]
    first = [score(None, "first", name=name).score for name in blocks]
    assert last == sorted(last)
    assert len(set(last)) == 12
    assert first == sorted(first, reverse=True)
    assert len(set(first)) == 12


@pytest.mark.parametrize("count", [5, 12, 30, 61])
def test_spaced_is_even_in_depth_at_every_ratio(count: int) -> None:
    scores = [score(None, "spaced", name=f"model.layers.{i}.mlp.up_proj.weight").score for i in range(count)]
    assert len(set(scores)) == count
    order = sorted(range(count), key=lambda i: -scores[i])
    for share in (2, 4, 8):
        taken = sorted(order[: count // share])
        assert {b - a for a, b in itertools.pairwise(taken)} <= {share}
    # Béjian and Faure's bound on the count in [0, y) of the first m points, twice: the best ones are a complement.
    for k in range(1, count + 1):
        for m in range(1, count + 1):
            bound = (math.log2(m) + math.log2(count)) / 3 + 2
            assert abs(sum(i < m for i in order[:k]) - m * k / count) <= bound
    assert score(None, "spaced", name="lm_head.weight").score == 0.0


def test_unknown_and_unfit_criteria_are_refused() -> None:
    with pytest.raises(OptionError, match=r"'spectrm'.*Did you mean 'spectrum'"):
        score(torch.ones(2, 2), "spectrm")
    with pytest.raises(OptionError, match="needs gradients on data"):
        score(torch.ones(2, 2), "fisher")
    with pytest.raises(OptionError, match=r"needs the weights of a\.weight"):
        score(None, "mp", name="a.weight")
    with pytest.raises(OptionError, match="no function of the singular values"):
        criteria.score_values(torch.ones(2), (2, 2), "row_norm")


def test_every_row_of_the_table_says_how_it_scores() -> None:
    for name, row in CRITERIA.items():
        assert row.name == name
        assert row.summary
        assert row.source
        ways = [row.of_values is not None, row.of_matrix is not None, row.of_name is not None, row.needs_data]
        assert sum(ways) == 1
        assert row.needs_spectrum == (row.of_values is not None)
        assert row.needs_weights == (row.of_values is not None or row.of_matrix is not None)
        assert (row.tolerance > 0) == row.needs_weights
        assert (row.sensitivity is not None) == (row.needs_spectrum and not row.smallest)


# --- the power law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2.0, 3.0, 5.0])
def test_the_exponent_of_a_pure_power_law_is_found(alpha: float, seeded: torch.Generator) -> None:
    """Eigenvalues drawn by inversion: x = u^(-1 / (alpha - 1))."""
    eigenvalues = torch.rand(4000, generator=seeded, dtype=torch.float64) ** (-1 / (alpha - 1))
    found = criteria.power_law(eigenvalues.sqrt().sort(descending=True).values)
    # The estimate's deviation is (alpha - 1) / sqrt(tail), at most 0.04 of alpha for a tail of 400; the seed is fixed.
    assert found == pytest.approx(alpha, rel=0.1)


def test_the_body_below_the_tail_does_not_matter(seeded: torch.Generator) -> None:
    tail = torch.rand(1000, generator=seeded, dtype=torch.float64) ** (-1 / 2.0)
    body = torch.rand(1000, generator=seeded, dtype=torch.float64)
    values = torch.cat([tail, body]).sqrt().sort(descending=True).values
    # As above, 2 / 3 / sqrt(tail): 0.07 for a tail of 100 of the 1,000.
    assert criteria.power_law(values) == pytest.approx(3.0, rel=0.15)


def test_the_exponent_does_not_see_the_scale(seeded: torch.Generator) -> None:
    values = torch.rand(300, generator=seeded, dtype=torch.float64).sort(descending=True).values + 0.1
    # Logarithms of up to 14 in float64, 300 of them summed: 300 * 14 * 1.1e-16 is 5e-13.
    assert criteria.power_law(values * 1e-6) == pytest.approx(criteria.power_law(values), rel=1e-9)


def test_there_is_no_tail_in_a_handful_of_values_or_a_flat_spectrum() -> None:
    assert criteria.power_law(torch.linspace(2, 1, 19, dtype=torch.float64)) is None
    assert criteria.power_law(torch.zeros(100, dtype=torch.float64)) is None
    assert criteria.power_law(torch.ones(100, dtype=torch.float64)) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_fit_is_the_maximum_of_the_likelihood_at_the_nearest_start(seed: int) -> None:
    """Against a plain loop over every start of the tail, which 64 values leave room for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(64, generator=generator, dtype=torch.float64).sort(descending=True).values + 0.05
    x = values.square()
    best = (math.inf, 0.0)
    for size in range(10, 65):
        tail, start = x[:size], x[size - 1]
        alpha = 1 + size / float((tail / start).log().sum())
        model = (tail / start) ** (1 - alpha)  # share of the law at or above each value
        steps = torch.arange(size, dtype=torch.float64)
        distance = float(torch.maximum((model - steps / size).abs(), (model - (steps + 1) / size).abs()).max())
        best = min(best, (distance, alpha))
    assert criteria.power_law(values) == pytest.approx(best[1], rel=1e-9)


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("model", "matrices"), [("minilm_folder", 37), ("smollm2_gguf", 28)])
def test_real_weights_score_within_the_tolerance_of_a_float64_svd(model: str, matrices: int) -> None:
    """MiniLM, and the blocks of SmolLM2 where float32 does worst; `benchmarks/scan.py` compares all 210 matrices."""
    from spectrum_peft import demo
    from spectrum_peft.weights import open_weights

    source = open_weights(getattr(demo, model)())
    blocks = {0, 8, 23, 27}
    linear = [info for info in source.tensors() if info.role == "linear"]
    if model == "smollm2_gguf":
        linear = [info for info in linear if names.block_index(info.name) in blocks]
    assert len(linear) == matrices
    for info in linear:
        matrix = source.read(info.name)
        shape = (info.shape[0], info.shape[1])
        values = torch.linalg.svdvals(matrix.double())
        for criterion in ("spectrum", "mp", "mean_std", "kappa"):
            exact, found = criteria.score_values(values, shape, criterion), score(matrix, criterion)
            assert found.score == pytest.approx(exact.score, rel=CRITERIA[criterion].tolerance), (info.name, criterion)
            assert found.n_signal == exact.n_signal
