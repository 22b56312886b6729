"""Truncated SVDs against float64, their cache, the random directions, and the core form against its definition."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectrum_peft.scan import SingularTriplets, cached_svd, svd
from spectrum_peft.scan.svd import OVERSAMPLING, POWER_ITERATIONS, truncated_svd
from spectrum_peft.weights.rotations import core_matrix, digest_of, random_directions


def matrix_with(values: Tensor, out: int, inside: int, seed: int = 0) -> Tensor:
    """A float32 matrix (out, inside) with given singular values and random vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q for n in (out, inside)
    )
    return ((u * values.double()) @ v.T).float()


def product(found: SingularTriplets) -> Tensor:
    return (found.left.double().T * found.values.double()) @ found.right.double()


# --- the truncated SVD -----------------------------------------------------------------------------------------------

# The first three take the eigenvectors of the Gram matrix, the others the range finder.
SHAPES = [(96, 40, 8), (40, 96, 40), (7, 5, 3), (300, 420, 12), (420, 300, 30)]


@pytest.mark.parametrize(("out", "inside", "k"), SHAPES)
def test_singular_triplets_agree_with_a_full_svd_in_float64(out: int, inside: int, k: int) -> None:
    # Each value 0.85 of the one before: 16 more directions and 4 iterations leave 0.85^(16 * 9) of what lies beyond.
    decay = 3 * 0.85 ** torch.arange(min(out, inside), dtype=torch.float64)
    matrix = matrix_with(decay, out, inside)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = truncated_svd(matrix, k)
    assert found.left.shape == (k, out) and found.values.shape == (k,) and found.right.shape == (k, inside)
    assert {t.dtype for t in (found.left, found.values, found.right)} == {torch.float32}
    # The values are rounded to float32 after products in float32: some ten roundings of 1.2e-7.
    assert torch.allclose(found.values.double(), s[:k], rtol=2e-6)
    # Well separated values, so each vector is determined up to its sign.
    assert (found.left.double() @ u[:, :k]).diagonal().abs().min() > 1 - 1e-5
    assert (found.right.double() @ vh[:k].T).diagonal().abs().min() > 1 - 1e-5
    for rows in (found.left, found.right):
        # A sum of up to 420 products in float32: sqrt(420) * 1.2e-7.
        assert torch.allclose(rows @ rows.T, torch.eye(k), atol=3e-6)


@pytest.mark.parametrize(("out", "inside", "k"), [(300, 420, 12), (420, 300, 30)])
def test_a_flat_spectrum_keeps_the_bound_of_the_range_finder(out: int, inside: int, k: int) -> None:
    """Halko, Martinsson, Tropp (2011), corollary 10.10: the expected spectral error with q power iterations."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(out, inside, generator=generator)
    s = torch.linalg.svdvals(matrix.double())
    power, p = 2 * POWER_ITERATIONS + 1, OVERSAMPLING
    tail = math.e * math.sqrt(k + p) / p * float((s[k:] ** (2 * power)).sum().sqrt())
    bound = ((1 + math.sqrt(k / (p - 1))) * float(s[k]) ** power + tail) ** (1 / power)
    found = truncated_svd(matrix, k)
    error = float(torch.linalg.matrix_norm(matrix.double() - product(found), 2))
    # The corollary is about the whole range of k + p directions; cutting to k adds at most s_{k+1} (their equation 9.4).
    assert float(s[k]) * (1 - 1e-6) <= error <= bound + float(s[k])
    # What is looked at in practice: no value is more than a twentieth off, and none is above the true one.
    relative = found.values.double() / s[:k]
    assert relative.max() < 1 + 1e-6
    assert relative.min() > 0.95


def test_the_same_matrix_gives_the_same_bytes_and_positive_peaks() -> None:
    matrix = torch.randn(300, 420, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = truncated_svd(matrix, 12), truncated_svd(matrix, 12)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in ((one.left, two.left), (one.values, two.values), (one.right, two.right)):
        assert torch.equal(a, b)
    peaks = one.left.gather(1, one.left.abs().argmax(dim=1, keepdim=True))
    assert (peaks > 0).all()
    flipped = truncated_svd(-matrix, 12)
    # Rounding, over the gap between neighbouring values, which is about a hundredth of them: 1e-6 / 1e-2.
    assert torch.allclose(flipped.left, one.left, atol=1e-4)
    assert torch.allclose(flipped.right, -one.right, atol=1e-4)


def test_a_matrix_of_low_rank_and_a_zero_matrix_have_no_nan() -> None:
    flat = matrix_with(torch.tensor([3.0, 1.0]), 20, 12)
    found = truncated_svd(flat, 5)
    assert torch.isfinite(found.right).all()
    # Entries below 3 in float32: a few units of 2**-24 of the largest singular value, 3.
    assert torch.allclose(product(found).float(), flat, atol=1e-6)
    zero = truncated_svd(torch.zeros(6, 9), 4)
    assert torch.equal(zero.values, torch.zeros(4)) and torch.isfinite(zero.left).all()


@pytest.mark.parametrize("k", [0, 6])
def test_a_rank_outside_the_matrix_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, wanted 1 to 5"):
        truncated_svd(torch.ones(5, 9), k)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_goes_by_content_dtype_and_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = truncated_svd
    monkeypatch.setattr(svd, "truncated_svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    first = cached_svd(matrix, 4, tmp_path / "svd")
    again = cached_svd(matrix.clone(), 4, tmp_path / "svd")
    assert len(calls) == 1
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in ("left", "values", "right"))
    (path,) = (tmp_path / "svd").iterdir()
    assert 4 * 4 * (24 + 16 + 1) <= path.stat().st_size < 4 * 4 * (24 + 16 + 1) + 500
    cached_svd(matrix.T, 4, tmp_path / "svd")
    cached_svd(matrix.bfloat16(), 4, tmp_path / "svd")
    cached_svd(matrix, 5, tmp_path / "svd")
    other = matrix.clone()
    other[0, 0] += 1e-6
    cached_svd(other, 4, tmp_path / "svd")
    assert len(calls) == 5


def test_a_broken_cache_file_is_said_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    first = cached_svd(matrix, 4, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        again = cached_svd(matrix, 4, tmp_path)
    assert path.name in caplog.text
    assert torch.equal(first.left, again.left)
    assert torch.equal(cached_svd(matrix, 4, tmp_path).left, first.left)


# --- P, Q and the core -----------------------------------------------------------------------------------------------


def test_random_directions_are_normal_repeatable_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    rows = random_directions(40, 500, seed=3, name="a.weight left")
    assert torch.equal(torch.get_rng_state(), state)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, random_directions(40, 500, seed=3, name="a.weight left"))
    assert not torch.equal(rows, random_directions(40, 500, seed=4, name="a.weight left"))
    assert not torch.equal(rows, random_directions(40, 500, seed=3, name="a.weight right"))
    scaled = rows.double() * math.sqrt(500)
    # 20,000 numbers: four standard errors are 0.028 of the mean, 0.02 of the deviation, and 0.013 of the share; rows
    # of 500.
    assert abs(scaled.mean()) < 0.03 and abs(scaled.std() - 1) < 0.02
    assert abs((scaled.abs() < 1).double().mean() - 0.6827) < 0.01
    lengths = torch.linalg.vector_norm(rows.double(), dim=1)
    assert 0.8 < lengths.min() and lengths.max() < 1.2


def test_random_directions_are_what_files_were_written_with() -> None:
    """Files hold the digest of these numbers: a change of them makes every stored adapter unreadable."""
    rows = random_directions(2, 8, seed=0, name="model.layers.0.mlp.down_proj.weight left")
    assert (rows.double() * math.sqrt(8) * 2**12).round().flatten().tolist() == STORED
    assert digest_of(rows).shape == (32,) and digest_of(rows).dtype == torch.uint8
    assert not torch.equal(digest_of(rows), digest_of(rows, rows))


STORED = [-2632, 4367, -6747, 2286, 1662, 4801, 3969, 1267, 198, 1261, -8862, 1244, 2483, -2683, 571, -2678]


@pytest.mark.parametrize(("out", "inside", "count", "rank"), [(9, 7, 3, 2), (5, 11, 5, 4), (6, 6, 1, 1)])
def test_the_core_form_is_the_definition(out: int, inside: int, count: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(out, inside)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    chosen = torch.randperm(len(s), generator=generator)[:count]
    u, s, v = u[:, chosen], s[chosen], vh[chosen].T
    shift, p, q = draw(count), draw(count, rank), draw(count, rank)
    P, Q = draw(out, rank), draw(inside, rank)
    turned_u, turned_v = u + P @ p.T, v + Q @ q.T
    wanted = weight + turned_u @ torch.diag(s + shift) @ turned_v.T - u @ torch.diag(s) @ v.T
    core = core_matrix(s, shift, p, q)
    found = weight + torch.cat((u, P), dim=1) @ core @ torch.cat((v, Q), dim=1).T
    # Float64 products of order 100 at most: some dozen sums of 1.1e-16 each.
    assert (found - wanted).abs().max() < 1e-12
    assert core_matrix(s, shift * 0, p * 0, q * 0).count_nonzero() == 0


def test_the_core_is_not_rounded_under_autocast() -> None:
    generator = torch.Generator().manual_seed(5)
    values, shift = (torch.randn(4, generator=generator) for _ in range(2))
    p, q = (torch.randn(4, 2, generator=generator).requires_grad_() for _ in range(2))
    wanted = core_matrix(values, shift, p, q)
    with torch.autocast("cpu", torch.bfloat16):
        found = core_matrix(values, shift, p, q)
        (torch.ones(3, 6) @ found).sum().backward()
    assert torch.equal(found, wanted) and p.grad is not None and p.grad.dtype == torch.float32
