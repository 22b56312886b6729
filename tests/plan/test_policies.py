"""Laws of choosing: what must hold for any scores, whatever the numbers are."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from spectrum_peft.errors import OptionError
from spectrum_peft.plan import LORA_RANK, MODES, check_options, edge_of, get_mode, rank_of, ratio_of
from spectrum_peft.plan.budget import allocate_ranks, smallest_budget
from spectrum_peft.plan.choose import Candidate, alpha_for, choose, groups, importance_rates, natural_key, ranked
from spectrum_peft.plan.policies import POLICIES, tiers, top
from spectrum_peft.records.plan import ACTIONS


def pool(blocks=7, seed=0, shapes=None, reach=None):
    """Candidates of three kinds; scores repeat (so that ties occur) and one kind has infinite ones."""
    random_ = random.Random(seed)
    shapes = shapes or {"mlp.up_proj": (112, 64), "self_attn.k_proj": (32, 64), "self_attn.q_proj": (64, 64)}
    return [
        Candidate(
            f"model.layers.{i}.{kind}.weight", kind, i, shape,
            math.inf if kind.endswith("k_proj") and random_.random() < 0.3 else round(random_.lognormvariate(0, 1), 1),
            reachable=reach is None or i >= reach,
        )
        for i in range(blocks)
        for kind, shape in shapes.items()
    ]  # fmt: skip


def taken(candidates, **options):
    chosen, _ = choose(candidates, check_options(**options))
    return {c.name for members in chosen.values() for c in members}


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_names_a_policy_and_an_action():
    for name, mode in MODES.items():
        assert mode.name == name
        assert mode.select in POLICIES
        assert mode.action in ACTIONS
        assert mode.summary
        assert mode.default_lr > 0


def test_learning_rates_of_adapters_are_ten_times_those_of_real_weights():
    assert {m.default_lr for m in MODES.values() if m.real_weights} == {2e-5}
    assert {m.default_lr for m in MODES.values() if m.action in {"lora", "shared"}} == {2e-4}


def test_a_shorter_run_takes_a_higher_rate_by_the_root_of_its_length():
    for mode in MODES.values():
        for steps, factor in ((10**6, 1), (4000, 1), (1000, 2), (250, 4), (40, 10), (25, 160**0.5), (1, 160**0.5)):
            assert mode.rate_for(steps, LORA_RANK) == pytest.approx(mode.default_lr * factor, rel=0.051)  # two digits


def test_a_wider_lora_takes_a_lower_rate_by_the_root_of_its_rank_and_nothing_else_does():
    for mode in MODES.values():
        lora = mode.name in ("lora", "spectra_qlora", "alors", "sgm")
        for r, factor in ((1, 8**0.5), (2, 2), (8, 1), (16, 0.5**0.5), (32, 0.5), (128, 0.25)):
            wanted = mode.default_lr * (factor if lora else 1)
            assert mode.rate_for(10**6, r) == pytest.approx(wanted, rel=0.051)  # two digits


def test_fewer_matrices_take_a_higher_rate_by_the_root_of_their_share_and_nothing_else_does():
    for mode in MODES.values():
        for ratio, factor in ((1.0, 1), (0.5, 2**0.5), (0.25, 2), (0.01, 2)):  # no smaller share was searched
            wanted = mode.default_lr * (factor if mode.name == "spectrum" else 1)
            assert mode.rate_for(10**6, LORA_RANK, ratio) == pytest.approx(wanted, rel=0.051)  # two digits


def test_the_ratio_is_that_of_the_options_or_the_default_and_none_where_something_else_chooses():
    for given, ratio in (
        ({"spectrum_ratio": 0.3}, 0.3),
        ({"spectrum_ratio": 1}, 1.0),
        ({}, 0.5),
        ({"spectrum_ratio": None}, 0.5),
        ({"spectrum_ratio": None, "snr_threshold": 2.0}, 1.0),
        ({"spectrum_ratio": "x"}, 1.0),
        ({"spectrum_ratio": 7}, 1.0),
    ):
        assert ratio_of(given) == ratio
    assert ratio_of({}, 1.0) == 1.0
    assert ratio_of(check_options(mode="spectrum")) == 0.5


def test_the_rank_is_that_of_a_config_or_the_usual_one():
    for given, rank in (
        ({"r": 3}, 3),
        ({"init_r": 12}, 12),
        ({}, 16),
        ({"r": "x"}, 16),
        ({"r": 0}, 16),
        ({"r": None}, 16),
    ):
        assert rank_of(given, 16) == rank


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_model_can_carry_out_real_weights_only(mode):
    assert MODES[mode].plain_model == MODES[mode].real_weights


@pytest.mark.parametrize(
    ("wrong", "hint"), [("spectra", "'spectrum'"), ("spectra-qlora", "'spectra_qlora'"), (None, "")]
)
def test_an_unknown_mode_is_refused_with_near_ones(wrong, hint):
    with pytest.raises(OptionError, match=f"mode is {wrong!r}.*{hint}"):
        get_mode(wrong)


# --- order and selection ---------------------------------------------------------------------------------------------


def test_names_sort_by_number_not_by_digit():
    assert sorted(["h.10.a", "h.2.a", "h.2.a[10]", "h.2.a[9]"], key=natural_key) == [
        "h.2.a", "h.2.a[9]", "h.2.a[10]", "h.10.a",
    ]  # fmt: skip


def test_ties_go_to_the_lower_block_then_to_the_name_and_to_outside_the_blocks_last():
    equal = [
        Candidate("pooler.dense.weight", "pooler.dense", None, (4, 4), 1.0),
        Candidate("layers.10.q.weight", "q", 10, (4, 4), 1.0),
        Candidate("layers.2.v.weight", "v", 2, (4, 4), 1.0),
        Candidate("layers.2.q.weight", "q", 2, (4, 4), 1.0),
        Candidate("layers.11.q.weight", "q", 11, (4, 4), 1.5),
    ]
    for order in itertools.permutations(equal):
        assert [c.name for c in ranked(order)] == [
            "layers.11.q.weight", "layers.2.q.weight", "layers.2.v.weight", "layers.10.q.weight", "pooler.dense.weight",
        ]  # fmt: skip


def test_ties_within_a_block_go_by_number():
    experts = [Candidate(f"layers.0.experts.{e}.w1.weight", "experts.w1", 0, (4, 4), 1.0) for e in (10, 9, 2)]
    assert [c.name.split(".")[3] for c in ranked(experts)] == ["2", "9", "10"]


@pytest.mark.parametrize("scope", ["per_kind", "global"])
@pytest.mark.parametrize("measure", ["count", "parameters"])
@pytest.mark.parametrize("reach", [None, 4])
@pytest.mark.parametrize("coverage", [None, 3])
def test_a_larger_ratio_takes_what_a_smaller_one_takes_and_more(scope, measure, reach, coverage):
    candidates = pool(reach=reach)
    sets = [
        taken(
            candidates, spectrum_ratio=ratio / 40, scope=scope, measure=measure, backward_depth=0.5, coverage=coverage
        )
        for ratio in range(1, 41)
    ]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert sets[-1] == {c.name for c in candidates if c.reachable}


@pytest.mark.parametrize("options", [
    {"spectrum_ratio": 0.3}, {"spectrum_ratio": 0.3, "scope": "global"}, {"snr_threshold": 1.2},
    {"spectrum_ratio": 0.4, "measure": "parameters", "scope": "global"},
    {"spectrum_ratio": 0.4, "measure": "parameters"}, {"spectrum_ratio": 0.6, "coverage": 3},
])  # fmt: skip
@pytest.mark.parametrize("reach", [None, 3])
def test_raising_one_score_never_drops_that_candidate(options, reach):
    candidates = pool(reach=reach)
    for name in taken(candidates, **options):
        for raised in (0.1, 2.0, math.inf):
            louder = [replace(c, score=c.score + raised) if c.name == name else c for c in candidates]
            assert name in taken(louder, **options)


@pytest.mark.parametrize("bins", [1, 2, 3, 5, 7, 12, 40])
def test_coverage_takes_as_many_as_without_it_and_of_every_run_alike(bins):
    candidates = pool(blocks=12, seed=bins)
    for kind in {c.kind for c in candidates}:
        members = [c for c in candidates if c.kind == kind]  # one a block, by depth
        for count in range(1, 13):
            chosen = taken(members, spectrum_ratio=count / 12, coverage=bins)
            assert len(chosen) == count
            runs = [[] for _ in range(min(bins, 12))]
            for i, c in enumerate(members):
                runs[i * len(runs) // 12].append(c)
            # Water filling: every run gives the same number, but for what it has not and for the last round.
            gives = [sum(c.name in chosen for c in run) for run in runs]
            level = max(gives)
            assert all(level - 1 <= n or n == len(run) for n, run in zip(gives, runs, strict=True))
            for n, run in zip(gives, runs, strict=True):
                assert {c.name for c in ranked(run)[:n]} == {c.name for c in run if c.name in chosen}
        assert taken(members, spectrum_ratio=0.5, coverage=1) == taken(members, spectrum_ratio=0.5)


@pytest.mark.parametrize("other", [
    {"snr_threshold": 1.0}, {"mode": "alors", "score_cuts": (2.0, 1.0)}, {"mode": "alors", "trainable_parameters": 9999},
])  # fmt: skip
def test_coverage_goes_with_a_ratio_only(other):
    with pytest.raises(OptionError, match=f"coverage=3 spreads a ratio.*{list(other)[-1]}="):
        check_options(coverage=3, **other)
    with pytest.raises(OptionError, match="coverage=3 means nothing in mode 'lora'"):
        check_options(coverage=3, mode="lora")


def test_count_is_the_floor_of_n_times_ratio_per_kind_and_at_least_one():
    cases = [(30, 0.1, 3), (30, 0.5, 15), (7, 0.5, 3), (7, 0.01, 1), (10, 0.29, 2), (100, 0.29, 29), (3, 1, 3)]
    for n, ratio, wanted in cases:
        members = [Candidate(f"layers.{i}.q.weight", "q", i, (4, 4), float(i)) for i in range(n)]
        assert taken(members, spectrum_ratio=ratio) == {c.name for c in members[n - wanted :]}


def test_the_parameter_measure_keeps_to_the_share_of_elements_beyond_the_first():
    candidates = pool()
    total = sum(c.numel for c in candidates)
    for ratio in (0.05, 0.3, 0.77):
        chosen = taken(candidates, spectrum_ratio=ratio, measure="parameters", scope="global")
        used = sum(c.numel for c in candidates if c.name in chosen)
        following = next((c for c in ranked(candidates) if c.name not in chosen), None)
        assert used <= ratio * total or len(chosen) == 1
        assert following is None or used + following.numel > ratio * total


def test_the_parameter_measure_stops_at_the_first_that_does_not_fit_so_that_ratios_nest():
    sizes = {"a": 10, "b": 100, "c": 10}
    members = [Candidate(n, "k", None, (s, 1), 9.0 - i) for i, (n, s) in enumerate(sizes.items())]
    assert taken(members, spectrum_ratio=0.2, measure="parameters") == {"a"}
    assert taken(members, spectrum_ratio=0.95, measure="parameters") == {"a", "b"}


def test_the_parameter_measure_counts_all_blocks_and_takes_from_the_reachable_ones():
    members = [Candidate(f"l.{i}.q.weight", "q", i, (4, 4), float(i), reachable=i >= 5) for i in range(10)]
    assert len(taken(members, spectrum_ratio=0.4, measure="parameters")) == 4


def test_the_parameter_measure_wants_shapes():
    candidates = [replace(c, shape=None) for c in pool()]
    with pytest.raises(OptionError, match=r"shape of model\.layers\..*is not known.*measure='count'"):
        taken(candidates, measure="parameters")


def test_a_threshold_takes_exactly_what_is_above_it():
    candidates = pool()
    assert taken(candidates, snr_threshold=1.2) == {c.name for c in candidates if c.score > 1.2}


def test_a_threshold_that_leaves_nothing_says_where_the_scores_are():
    members = [Candidate(f"layers.{i}.q.weight", "q", i, (4, 4), i / 8) for i in range(8)]
    with pytest.raises(OptionError, match=r"snr_threshold=7\.0 leaves nothing.* 8 candidates go from 0 to 0\.875"):
        taken(members, snr_threshold=7)


def test_the_ratio_counts_all_blocks_and_takes_from_the_reachable_ones():
    candidates = pool(blocks=10, reach=7)
    chosen, notes = choose(candidates, check_options(spectrum_ratio=0.2))
    for members in chosen.values():
        assert len(members) == 2  # 0.2 of ten, not of three
        assert all(c.block >= 7 for c in members)
    assert notes == []


def test_where_depth_leaves_fewer_than_asked_all_are_taken_and_it_is_said():
    chosen, notes = choose(pool(blocks=10, reach=7), check_options(spectrum_ratio=0.5))
    assert {len(members) for members in chosen.values()} == {3}
    assert notes[0] == "mlp.up_proj: 5 of 10 were asked for, backward_depth leaves 3, all of them are taken."


@pytest.mark.parametrize(
    ("score", "message"),
    [(None, r"layers\.3\.q\.weight has no score"), (math.nan, r"layers\.3\.q\.weight: the score is nan")],
)
def test_a_candidate_without_a_score_is_named(score, message):
    members = [Candidate(f"layers.{i}.q.weight", "q", i, (4, 4), score if i == 3 else 1.0) for i in range(8)]
    with pytest.raises(OptionError, match=message):
        taken(members)


# --- ranks, scales, rates --------------------------------------------------------------------------------------------


def test_the_scale_alpha_over_rank_is_the_same_in_every_tier():
    options = check_options(mode="alors", r=16, lora_alpha=20, r_high=32, r_medium=5)
    entries = [e for e in tiers(pool(), options).entries if e.trains]
    assert {e.rank for e in entries} == {32, 5}
    assert {e.alpha / e.rank for e in entries} == {20 / 16}


def test_under_rslora_alpha_stays():
    options = check_options(mode="alors", r=16, lora_alpha=20, use_rslora=True)
    assert {alpha_for(rank, options) for rank in (1, 4, 16)} == {20.0}


def test_the_better_half_has_the_high_rank_and_the_odd_one_is_of_the_better_half():
    members = [Candidate(f"layers.{i}.q.weight", "q", i, (64, 64), float(i)) for i in range(10)]
    entries = tiers(members, check_options(mode="alors", spectrum_ratio=0.7, r=16)).entries
    assert [e.rank for e in entries] == [None, None, None, 4, 4, 4, 16, 16, 16, 16]
    assert [e.action for e in entries[:4]] == ["freeze", "freeze", "freeze", "lora"]


@pytest.mark.parametrize(("r", "expected"), [(16, (16, 4)), (3, (3, 1)), (1, (1, 1))])
def test_the_default_ranks_are_r_and_a_quarter_of_it(r, expected):
    entries = tiers(pool(), check_options(mode="alors", r=r)).entries
    assert {e.rank for e in entries if e.trains} == set(expected)


def test_cuts_set_the_tiers_by_score():
    candidates = pool()
    draft = tiers(candidates, check_options(mode="alors", score_cuts=(2.0, 0.8), r=8))
    for candidate, entry in zip(candidates, draft.entries, strict=True):
        wanted = 8 if candidate.score > 2.0 else 2 if candidate.score > 0.8 else None
        assert entry.rank == wanted


def test_rates_grow_with_importance_between_their_bounds_whatever_the_unit_of_the_score():
    scores = [0.1, 0.5, 0.5, 3.0, math.inf]
    rates = {}
    for unit in (1.0, 1e6):
        members = [Candidate(f"l.{i}.q.weight", "q", i, (4, 4), s * unit) for i, s in enumerate(scores)]
        rates[unit] = [importance_rates({"q": members}, (0.5, 2.0))[c.name] for c in members]
    assert rates[1.0] == rates[1e6]
    # positions 0, 1.5, 1.5, 3, 4 of four steps: 0.5 * 4 ** t
    assert rates[1.0] == pytest.approx([0.5, 0.5 * 4 ** (1.5 / 4), 0.5 * 4 ** (1.5 / 4), 0.5 * 4**0.75, 2.0], rel=1e-5)


def test_one_alone_has_the_geometric_mean_rate():
    alone = [Candidate("l.0.q.weight", "q", 0, (4, 4), 1.0)]
    assert importance_rates({"q": alone}, (0.5, 2.0)) == {"l.0.q.weight": 1.0}


def test_only_rows_that_say_so_get_rates():
    for mode in ("spectra_qlora", "alors"):
        entries = POLICIES[MODES[mode].select](pool(), check_options(mode=mode)).entries
        assert (len({e.lr_ratio for e in entries}) > 1) == MODES[mode].importance_rates


def test_without_re_evaluation_the_rest_is_frozen_and_with_it_it_holds_a_place():
    for mode in ("spectra_qlora", "alors"):
        policy = POLICIES[MODES[mode].select]
        still = policy(pool(reach=2), check_options(mode=mode)).entries
        moving = policy(pool(reach=2), check_options(mode=mode, rescore_every=10)).entries
        assert [e for e in still if e.trains] == [e for e in moving if e.trains]
        assert {e.action for e in still if not e.trains} == {"freeze"}
        below = {c.name for c in pool(reach=2) if not c.reachable}
        for entry in moving:
            if not entry.trains:
                assert entry.action == ("freeze" if entry.name in below else "lora")
                assert entry.active is (entry.name in below)
                assert entry.trainable_numel == 0


def test_real_weights_carry_neither_rank_nor_alpha():
    for entry in top(pool(), check_options()).entries:
        assert (entry.rank, entry.alpha, entry.lr_ratio) == (None, None, 1.0)


# --- an exact budget -------------------------------------------------------------------------------------------------


def cost(candidates, ranks):
    return sum(ranks[c.name] * c.rank_cost for c in candidates)


@pytest.mark.parametrize("scope", ["per_kind", "global"])
@pytest.mark.parametrize("seed", range(6))
def test_a_budget_is_kept_and_met_exactly_where_the_costs_allow_it(scope, seed):
    random_ = random.Random(seed)
    shapes = {f"k{i}": (random_.randrange(3, 30), random_.randrange(3, 30)) for i in range(random_.randrange(1, 5))}
    candidates = pool(blocks=random_.randrange(1, 9), seed=seed, shapes=shapes)
    unit = math.gcd(*(c.rank_cost for c in candidates))
    least = smallest_budget(candidates)
    most = sum(c.rank_cost * min(c.shape) for c in candidates)
    for _ in range(12):
        budget = random_.randrange(least, most)
        ranks, notes = allocate_ranks(groups(candidates, scope), budget, 16, 4)
        used = cost(candidates, ranks)
        assert used <= budget
        assert all(1 <= ranks[c.name] <= min(c.shape) for c in candidates)
        assert bool(notes) == (used != budget)
        # Nothing closer: either the difference is below the step of any change, or no combination exists.
        if budget - used >= unit:
            assert used == brute_force(candidates, budget)


def brute_force(candidates, budget):
    """Largest sum of rank * cost that is no more than the budget, over all ranks; by the set of reachable sums."""
    sums = {0}
    for c in candidates:
        sums = {s + c.rank_cost * r for s in sums for r in range(1, min(c.shape) + 1) if s + c.rank_cost * r <= budget}
    return max(sums)


@pytest.mark.parametrize("seed", range(8))
def test_the_budget_is_met_as_closely_as_by_trying_everything(seed):
    random_ = random.Random(100 + seed)
    shapes = {f"k{i}": (random_.randrange(2, 9), random_.randrange(2, 9)) for i in range(2)}
    candidates = pool(blocks=2, seed=seed, shapes=shapes)
    for budget in range(smallest_budget(candidates), sum(c.rank_cost * min(c.shape) for c in candidates) + 3):
        ranks, _ = allocate_ranks(groups(candidates, "per_kind"), budget, 4, 1)
        assert cost(candidates, ranks) == brute_force(candidates, budget)


def test_within_a_kind_a_better_score_never_has_the_lower_rank():
    candidates = pool(blocks=12)
    for budget in range(smallest_budget(candidates), 60_000, 997):
        ranks, _ = allocate_ranks(groups(candidates, "per_kind"), budget, 16, 4)
        for members in groups(candidates, "per_kind").values():
            assert [ranks[c.name] for c in members] == sorted((ranks[c.name] for c in members), reverse=True)


def test_the_halves_stay_near_their_proportion():
    members = [Candidate(f"layers.{i}.q.weight", "q", i, (64, 64), float(i)) for i in range(10)]
    ranks, notes = allocate_ranks(groups(members, "per_kind"), 5 * 128 * (16 + 4), 16, 4)
    assert sorted(ranks.values()) == [4] * 5 + [16] * 5
    assert notes == []


def test_a_budget_above_full_rank_says_so():
    members = [Candidate(f"layers.{i}.q.weight", "q", i, (6, 9), float(i)) for i in range(3)]
    ranks, notes = allocate_ranks(groups(members, "per_kind"), 10_000, 16, 4)
    assert set(ranks.values()) == {6}
    assert "270 of 10,000, 9,730 below the budget: every matrix has full rank" in notes[0]


def test_a_fused_expert_parameter_costs_a_rank_in_every_expert():
    assert Candidate("e", "e", 0, (8, 30, 12), 1.0).rank_cost == 8 * 42


def test_a_best_rate_with_nothing_worse_beyond_it_is_said_to_be_one() -> None:
    assert edge_of([1e-3, 3e-3, 9e-3], 9e-3) == "it is the highest that was tried, so a higher one may be better"
    assert edge_of([1e-3, 3e-3, 9e-3], 1e-3) == "it is the lowest that was tried, so a lower one may be better"
    assert edge_of([1e-3, 3e-3, 9e-3], 3e-3) == ""
