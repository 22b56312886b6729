"""make_plan: options, roles, depth, the published selection, and what is said about a plan."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from spectrum_peft import SpectrumConfig, names
from spectrum_peft.errors import CheckpointError, MismatchError, OptionError
from spectrum_peft.plan import (
    CRITERIA,
    DEFAULT_RATIO,
    MODES,
    OPTIONS,
    check_options,
    diff_plans,
    explain,
    format_table,
    make_plan,
    replan,
)
from spectrum_peft.plan.diff import compare_plans
from spectrum_peft.plan.explain import plan_numbers
from spectrum_peft.plan.published import unfrozen_yaml
from spectrum_peft.records import Fingerprint, MatrixStat, Plan, SnrReport

SELECTIVE = [name for name, mode in MODES.items() if mode.selective and not mode.needs_data]
RESCORABLE = [name for name, mode in MODES.items() if mode.rescorable]
BLOCK_KINDS = 7  # q, k, v, o, gate, up, down


def with_scores(report, scores):
    return replace(report, stats=tuple(replace(s, score=scores.get(s.name, s.score)) for s in report.stats))


def entry(plan, name):
    return plan.by_name[name]


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_valid_and_checking_twice_changes_nothing():
    for mode in MODES:
        once = check_options(mode=mode)
        assert set(once) == set(OPTIONS)
        assert check_options(**once) == once


def test_half_of_each_kind_is_the_default_only_where_nothing_else_says_how_much():
    assert check_options()["spectrum_ratio"] == DEFAULT_RATIO == 0.5
    assert check_options(snr_threshold=1.0)["spectrum_ratio"] is None
    assert check_options(mode="alors", trainable_parameters=10)["spectrum_ratio"] is None
    assert check_options(mode="alors", score_cuts=(2, 1))["spectrum_ratio"] is None
    assert check_options(mode="lora")["spectrum_ratio"] is None


def test_the_criteria_are_those_that_are_computed():
    from spectrum_peft.scan import CRITERIA as COMPUTED

    assert set(COMPUTED) <= set(CRITERIA)


@pytest.mark.parametrize(("options", "message"), [
    ({"spectrum_ratio": 0}, r"spectrum_ratio is 0, wanted a share in \(0, 1\]"),
    ({"spectrum_ratio": -0.5}, r"spectrum_ratio is -0\.5, wanted a share"),
    ({"spectrum_ratio": 25}, r"spectrum_ratio is 25, wanted a share in \(0, 1\] \(25 % is 0\.25\)"),
    ({"spectrum_ratio": math.nan}, "spectrum_ratio is nan"),
    ({"spectrum_ratio": math.inf}, "spectrum_ratio is inf"),
    ({"spectrum_ratio": "0.5"}, "spectrum_ratio is '0.5', wanted a number"),
    ({"spectrum_ratio": True}, "spectrum_ratio is True, wanted a number"),
    ({"snr_threshold": math.nan}, "snr_threshold is nan"),
    ({"snr_threshold": False}, "snr_threshold is False, wanted a number"),
    ({"spectrum_ratio": 0.5, "snr_threshold": 1}, "spectrum_ratio=0.5 and snr_threshold=1.0 are both given"),
    ({"mode": "alors", "spectrum_ratio": 0.5, "trainable_parameters": 9}, "=0.5 and trainable_parameters=9 are both"),
    ({"mode": "alors", "spectrum_ratio": 0.5, "score_cuts": (2, 1)}, "spectrum_ratio=0.5 and score_cuts="),
    ({"mode": "alors", "score_cuts": (2, 1), "trainable_parameters": 9}, "score_cuts=.* and trainable_parameters=9"),
    ({"mode": "spektrum"}, "mode is 'spektrum'. Did you mean 'spectrum'"),
    ({"mode": "lara"}, "Did you mean 'lora'"),
    ({"criterion": "spectral"}, "criterion is 'spectral'. Did you mean 'spectrum'"),
    ({"scope": "kind"}, "scope is 'kind'.*'per_kind'"),
    ({"scope": ["global"]}, r"scope is \['global'\]"),
    ({"measure": "params"}, "measure is 'params'. Did you mean 'parameters'"),
    ({"backward_depth": 0}, "backward_depth is 0, wanted a share"),
    ({"backward_depth": 0.5, "train_embeddings": True}, "depth=0.5, but train_embeddings=True.*nothing is saved"),
    ({"backward_depth": 0.5, "mode": "full"}, "backward_depth=0.5, but mode 'full' trains the embeddings"),
    ({"train_head": 1}, "train_head is 1, wanted true or false"),
    ({"keep_base": "disk"}, "keep_base is 'disk'. Known: 'auto', 'file', 'host', 'none'"),
    ({"trainable_dtype": "bfloat16"}, "trainable_dtype is 'bfloat16'"),
    ({"r": 0}, "r is 0, wanted a whole number of at least 1"),
    ({"r": 2.5}, r"r is 2\.5, wanted a whole number"),
    ({"r": True}, "r is True, wanted a number"),
    ({"r": None}, "r is None, wanted a number"),
    ({"lora_alpha": 0}, "lora_alpha is 0, wanted a number above 0"),
    ({"mode": "alors", "r_high": 4, "r_medium": 8}, "r_high is 4 and r_medium is 8"),
    ({"mode": "alors", "r": 4, "r_medium": 8}, "r_high is 4 and r_medium is 8"),
    ({"mode": "alors", "score_cuts": (1, 2)}, "score_cuts is .* the tiers overlap"),
    ({"mode": "alors", "score_cuts": (1, 1)}, "the tiers overlap"),
    ({"mode": "alors", "score_cuts": 1}, "score_cuts is 1, wanted two numbers"),
    ({"mode": "alors", "score_cuts": "12"}, "score_cuts is '12', wanted two numbers"),
    ({"mode": "alors", "lr_ratio": (2, 0.5)}, r"lr_ratio is \(2, 0\.5\), wanted \(lowest, highest\)"),
    ({"mode": "alors", "lr_ratio": (0, 1)}, "lr_ratio is 0, wanted a number above 0"),
    ({"mode": "alors", "trainable_parameters": 0}, "trainable_parameters is 0"),
    ({"trainable_parameters": 100}, "trainable_parameters=100 means nothing in mode 'spectrum'; it belongs to alors"),
    ({"mode": "spectra_qlora", "r_high": 8}, "r_high=8 means nothing in mode 'spectra_qlora'"),
    ({"mode": "lora", "rescore_every": 5}, "rescore_every=5: mode 'lora' cannot be re-evaluated"),
    ({"mode": "alors", "rescore_every": 0}, "rescore_every is 0, wanted a whole number of at least 1"),
    ({"mode": "alors", "rescore_every": "epochs"}, "rescore_every is 'epochs', wanted a number"),
    ({"seed": -1}, "seed is -1"),
    ({"preset": "original"}, "preset is 'original'"),
    ({"preset": "published", "mode": "lora"}, "preset='published' goes with mode 'spectrum'"),
    ({"preset": "published", "scope": "global"}, "scope='global' does not go with preset='published'"),
    ({"spectrum_ration": 0.5}, "unknown option 'spectrum_ration'. Did you mean 'spectrum_ratio'"),
])  # fmt: skip
def test_a_wrong_option_is_refused_by_name_and_value(options, message):
    with pytest.raises(OptionError, match=message):
        check_options(**options)


def test_whole_numbers_may_come_as_floats_and_pairs_as_lists():
    checked = check_options(mode="alors", r=8.0, lr_ratio=[0.25, 4], rescore_every="epoch")
    assert checked["r"] == 8
    assert isinstance(checked["r"], int)
    assert checked["lr_ratio"] == (0.25, 4)
    assert checked["rescore_every"] == "epoch"


# --- the plan of a report --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_shuffled_report_gives_the_same_plan(llama_report, gradients_of, mode):
    data = {"gradients": gradients_of(llama_report(6))} if MODES[mode].needs_data else {}
    plan = make_plan(llama_report(6), mode=mode, **data)
    for order in range(4):
        again = make_plan(llama_report(6, order=order), mode=mode, **data)
        assert again == plan
        assert json.dumps(again.to_dict()) == json.dumps(plan.to_dict())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_plan_read_back_is_equal_and_its_options_make_it_again(llama_report, gradients_of, tmp_path, mode, suffix):
    report = llama_report()
    scores = {s.name: math.inf for s in report.stats if s.kind.endswith("v_proj")}
    report = with_scores(report, scores)
    data = {"gradients": gradients_of(report)} if MODES[mode].needs_data else {}
    plan = make_plan(report, mode=mode, **data)
    assert Plan.load(plan.save(tmp_path / f"plan.{suffix}")) == plan
    assert make_plan(report, **data, **plan.options) == plan


@pytest.mark.parametrize("mode", SELECTIVE)
@pytest.mark.parametrize("options", [{}, {"backward_depth": 0.5}, {"scope": "global", "spectrum_ratio": 0.2}])
def test_raising_one_score_never_drops_that_entry(llama_report, mode, options):
    report = llama_report(6)
    for name in make_plan(report, mode=mode, **options).trainable_names:
        louder = with_scores(report, {name: report.scores[name] * 3 + 1})
        assert name in make_plan(louder, mode=mode, **options).trainable_names


def test_half_of_each_kind_trains_by_default(llama_report):
    plan = make_plan(llama_report(6))
    assert (plan.mode, len(plan.trainable_names)) == ("spectrum", BLOCK_KINDS * 3)
    for kind in {e.kind for e in plan.entries}:
        members = [e for e in plan.entries if e.kind == kind]
        assert [e.action for e in members].count("train") == 3
        assert min(e.score for e in members if e.trains) > max(e.score for e in members if not e.trains)


def test_embeddings_head_and_norms_are_no_entries_unless_asked_for(llama_report):
    assert {names.role(e.name, e.shape) for e in make_plan(llama_report()).entries} == {"linear"}


def test_full_lists_every_tensor_of_the_report(llama_report):
    report = llama_report()
    plan = make_plan(report, mode="full")
    assert plan.trainable_names == sorted(s.name for s in report.stats)
    assert {e.action for e in plan.entries if names.role(e.name, e.shape) == "linear"} == {"train"}
    assert {e.action for e in plan.entries if names.role(e.name, e.shape) != "linear"} == {"save"}
    assert plan.trainable_parameters == plan.total_parameters == report.total_parameters


def test_full_and_lora_need_no_scores(llama_report):
    report = llama_report()
    bare = replace(report, stats=tuple(replace(s, score=None) for s in report.stats))
    assert len(make_plan(bare, mode="full").trainable_names) == len(report.stats)
    assert len(make_plan(bare, mode="lora").trainable_names) == 4 * BLOCK_KINDS
    with pytest.raises(OptionError, match=r"model\.layers\.0\.mlp\.down_proj\.weight has no score"):
        make_plan(bare)


def test_lora_puts_one_rank_and_scale_everywhere(llama_report):
    plan = make_plan(llama_report(), mode="lora", r=8)
    assert {(e.action, e.rank, e.alpha, e.lr_ratio) for e in plan.entries} == {("lora", 8, 16.0, 1.0)}


def test_the_trainable_numbers_are_those_of_weights_and_of_factors(llama_report):
    report = llama_report()
    rows = {s.name: s for s in report.stats}
    real = make_plan(report)
    assert real.trainable_parameters == sum(rows[name].numel for name in real.trainable_names)
    lora = make_plan(report, mode="spectra_qlora", r=8)
    assert lora.trainable_parameters == sum(8 * sum(rows[name].shape) for name in lora.trainable_names)
    count = plan_numbers(real)
    assert (count.kinds, count.candidates, count.chosen, count.saved) == (BLOCK_KINDS, 28, 14, 0)
    assert count.chosen_percent == 50
    assert count.trainable_percent == pytest.approx(100 * real.trainable_parameters / report.total_parameters)


def test_a_report_is_read_from_its_file(llama_report, tmp_path):
    report = llama_report()
    assert make_plan(report.save(tmp_path / "report.json")) == make_plan(report)
    with pytest.raises(CheckpointError, match="no such file"):
        make_plan(tmp_path / "none.json")
    with pytest.raises(OptionError, match="report is a dict"):
        make_plan(report.to_dict())


def test_a_name_that_stands_twice_is_refused(llama_report):
    report = llama_report()
    with pytest.raises(CheckpointError, match=r"lists model\.embed_tokens\.weight twice"):
        make_plan(replace(report, stats=(*report.stats, report.stats[0])))


def test_candidates_narrow_before_the_ratio_is_applied(llama_report):
    report = llama_report(6)
    queries = [s.name for s in report.stats if s.kind == "self_attn.q_proj"]
    plan = make_plan(report, candidates=reversed(queries))
    assert [e.name for e in plan.entries] == queries
    assert len(plan.trainable_names) == 3


@pytest.mark.parametrize(("candidates", "message"), [
    (["model.layers.0.self_attn.q_prok.weight"], r"q_prok\.weight' is not .*mean 'model\.layers\.0\.self_attn\.q_proj"),
    (["lm_head.weight"], r"lm_head\.weight is of role 'head'"),
    (["model.layers.0.mlp.up_proj.weight"] * 2, r"up_proj\.weight is named twice"),
    ([], "no linear matrix"),
])  # fmt: skip
def test_a_wrong_candidate_is_refused(llama_report, candidates, message):
    with pytest.raises(OptionError, match=message):
        make_plan(llama_report(), candidates=candidates)


def test_full_with_narrowed_candidates_is_refused(llama_report):
    report = llama_report()
    linear = [s.name for s in report.stats if s.role == "linear"]
    assert make_plan(report, mode="full", candidates=linear) == make_plan(report, mode="full")
    with pytest.raises(OptionError, match=r"trains everything, but the candidates leave out 1 matrices"):
        make_plan(report, mode="full", candidates=linear[1:])


def test_a_report_of_another_criterion_is_used_unless_one_is_asked_for_by_name(llama_report):
    report = replace(llama_report(), criterion="mp")
    plan = make_plan(report)
    assert plan.criterion == plan.options["criterion"] == "mp"
    assert make_plan(report, criterion="mp") == plan
    with pytest.raises(MismatchError, match="criterion='kappa' is asked for, the report was scored by 'mp'"):
        make_plan(report, criterion="kappa")


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("lora", {"spectrum_ratio": 0.25}),
        ("full", {"snr_threshold": 1.0}),
        ("spectrum", {"lr_ratio": (0.5, 1.0)}),
        ("alors", {"share": "both"}),
    ],
)
def test_an_option_that_means_nothing_in_a_mode_is_refused_whichever_it_is(llama_report, mode, option):
    (name,) = option
    with pytest.raises(OptionError, match=rf"{name}=.* means nothing in mode '{mode}'; it belongs to \w+"):
        make_plan(llama_report(), mode=mode, **option)
    with pytest.raises(OptionError, match="means nothing in mode"):
        SpectrumConfig(mode=mode, **option)


# --- embeddings, head, norms, ties -----------------------------------------------------------------------------------


def saved(plan):
    return [e.name for e in plan.entries if e.action == "save"]


def test_the_switches_add_what_they_name(llama_report):
    report = llama_report(2)
    assert saved(make_plan(report, train_embeddings=True)) == ["model.embed_tokens.weight"]
    assert saved(make_plan(report, train_head=True)) == ["lm_head.weight"]
    norms = saved(make_plan(report, train_norms=True))
    assert norms == [s.name for s in report.stats if s.role == "norm"]
    both = make_plan(report, mode="lora", train_embeddings=True, train_head=True)
    assert saved(both) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert plan_numbers(both).saved == 2


def test_tied_embeddings_train_and_count_once(llama_report):
    report = llama_report(tied=True)
    for switches in ({"train_embeddings": True}, {"train_head": True}, {"train_embeddings": True, "train_head": True}):
        plan = make_plan(report, **switches)
        assert saved(plan) == ["model.embed_tokens.weight"]
        note = "model.embed_tokens.weight and lm_head.weight are one tensor: it trains, and counts, once."
        assert plan.notes == (note,)
    assert make_plan(report, mode="full").trainable_parameters == report.total_parameters


def test_a_tied_name_that_the_report_lists_too_is_no_second_entry(llama_report):
    report = replace(llama_report(), tied=(("model.embed_tokens.weight", "lm_head.weight"),))
    assert "lm_head.weight" not in make_plan(report, mode="full").trainable_names
    assert saved(make_plan(report, train_head=True)) == ["model.embed_tokens.weight"]


def test_a_tied_head_cannot_train_above_a_cut(llama_report):
    with pytest.raises(OptionError, match=r"train_head=True trains model\.embed_tokens\.weight, which the head"):
        make_plan(llama_report(tied=True), train_head=True, backward_depth=0.5)
    assert saved(make_plan(llama_report(), train_head=True, backward_depth=0.5)) == ["lm_head.weight"]


def test_a_switch_that_finds_nothing_is_an_error(llama_report):
    report = llama_report()
    headless = replace(report, stats=tuple(s for s in report.stats if s.role != "head"))
    with pytest.raises(OptionError, match="train_head=True, but the report lists no tensor"):
        make_plan(headless, train_head=True)


def bert_report():
    """BERT with a classification head: biases, LayerNorms with biases, norms in the embeddings, a pooler."""
    shapes = {"bert.embeddings.word_embeddings.weight": (30, 8), "bert.embeddings.LayerNorm.weight": (8,)}
    shapes["bert.embeddings.LayerNorm.bias"] = (8,)
    for i in range(4):
        block = f"bert.encoder.layer.{i}"
        shapes |= {f"{block}.attention.self.query.weight": (8, 8), f"{block}.attention.self.query.bias": (8,)}
        shapes |= {f"{block}.output.LayerNorm.weight": (8,), f"{block}.output.LayerNorm.bias": (8,)}
    shapes |= {"bert.pooler.dense.weight": (8, 8), "classifier.weight": (3, 8), "classifier.bias": (3,)}
    return of_shapes(shapes)


def of_shapes(shapes, tied=()):
    kinds = names.kinds(shapes)
    stats = []
    for i, (name, shape) in enumerate(shapes.items()):
        role = names.role(name, shape)
        score = float(i + 1) if role == "linear" else None
        stats.append(MatrixStat(name, kinds[name], shape, math.prod(shape), "float32", score, None, None, role))
    return SnrReport(tuple(stats), "spectrum", Fingerprint("a" * 64, None, "live"), tied=tied)


def test_a_head_and_a_norm_train_with_their_biases_and_linear_biases_stay_frozen():
    plan = make_plan(bert_report(), train_head=True, train_norms=True)
    assert "classifier.bias" in saved(plan)
    assert "bert.encoder.layer.2.output.LayerNorm.bias" in saved(plan)
    assert "bert.encoder.layer.2.attention.self.query.bias" not in plan.by_name


def test_norms_below_the_cut_stay_frozen_and_it_is_said():
    plan = make_plan(bert_report(), train_norms=True, backward_depth=0.5)
    assert saved(plan) == [
        f"bert.encoder.layer.{i}.output.LayerNorm.{leaf}" for i in (2, 3) for leaf in ("bias", "weight")
    ]
    assert "train_norms: 6 norm tensors below the cut of backward_depth stay frozen." in plan.notes


# --- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [name for name, row in MODES.items() if not row.whole_model and not row.needs_data])
@pytest.mark.parametrize(("depth", "first"), [(0.5, 5), (0.25, 8), (0.01, 9), (0.3, 7), (1.0, 0)])
def test_nothing_below_the_cut_is_taken(llama_report, mode, depth, first):
    plan = make_plan(llama_report(10), mode=mode, backward_depth=depth)
    assert min(names.block_index(name) for name in plan.trainable_names) >= first


def test_depth_does_not_lower_the_count_while_blocks_last(llama_report):
    assert len(make_plan(llama_report(10), spectrum_ratio=0.3, backward_depth=0.5).trainable_names) == BLOCK_KINDS * 3


def test_matrices_outside_the_blocks_are_left_out_under_a_cut():
    plan = make_plan(bert_report(), backward_depth=0.5)
    assert "bert.pooler.dense.weight" not in plan.trainable_names
    assert "bert.pooler.dense: 1 of 1 were asked for, backward_depth leaves none." in plan.notes
    assert any("is not taken (1, such as bert.pooler.dense.weight)" in note for note in plan.notes)


def test_an_encoder_runs_before_its_decoder():
    sides = [f"{side}.block.{i}.layer.0.SelfAttention.q.weight" for side in ("decoder", "encoder") for i in range(4)]
    plan = make_plan(of_shapes(dict.fromkeys(sides, (8, 8))), mode="lora", backward_depth=0.75)
    assert plan.trainable_names == [
        *(f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(4)),
        *(f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in (2, 3)),
    ]
    assert "in the order encoder.block, decoder.block." in plan.notes[0]


# --- fused matrices and experts --------------------------------------------------------------------------------------


def test_experts_are_ranked_by_their_mean_and_chosen_as_one_parameter(llama_report):
    report = llama_report(4, experts=3)
    plan = make_plan(report, mode="spectra_qlora", r=4)
    name = "model.layers.0.mlp.experts.down_proj"
    scores = [report.scores[f"{name}[{e}]"] for e in range(3)]
    assert entry(plan, name).score == pytest.approx(sum(scores) / 3)
    assert entry(plan, name).shape == (3, 64, 112)
    chosen = next(e for e in plan.entries if e.trains and "down_proj" in e.name)
    assert chosen.trainable_numel == 3 * 4 * (64 + 112)
    assert len([e for e in plan.entries if e.kind == "mlp.experts.down_proj"]) == 4
    assert any(note.startswith("mlp.experts.down_proj holds 3 experts in one parameter") for note in plan.notes)
    assert not any("gate.weight" in e.name for e in plan.entries)  # the router is no candidate


def test_a_missing_expert_is_refused(llama_report):
    report = llama_report(2, experts=3)
    name = "model.layers.1.mlp.experts.down_proj"
    torn = replace(report, stats=tuple(s for s in report.stats if s.name != f"{name}[1]"))
    with pytest.raises(CheckpointError, match=r"2 experts of model\.layers\.1\.mlp\.experts\.down_proj, not"):
        make_plan(torn)


def test_an_expert_without_a_score_leaves_the_parameter_without_one(llama_report):
    name = "model.layers.1.mlp.experts.down_proj"
    report = with_scores(llama_report(2, experts=3), {})
    gap = replace(report, stats=tuple(replace(s, score=None) if s.name == f"{name}[1]" else s for s in report.stats))
    with pytest.raises(OptionError, match=r"mlp\.experts\.down_proj has no score"):
        make_plan(gap)


def test_a_total_with_an_unknown_part_is_unknown(llama_report):
    report = llama_report(2)
    first, *rest = report.stats
    plan = make_plan(replace(report, stats=(replace(first, shape=None, numel=0), *rest)))
    assert plan.total_parameters == 0
    assert plan_numbers(plan).trainable_percent is None
    assert "of an unknown total" in explain(plan)


def test_a_fused_qkv_is_one_matrix_and_that_is_said():
    plan = make_plan(of_shapes({f"model.layers.{i}.self_attn.qkv_proj.weight": (24, 8) for i in range(4)}))
    assert len(plan.trainable_names) == 2
    assert plan.notes == (
        "self_attn.qkv_proj is stored as one fused matrix: its parts share one score and are chosen together.",
    )


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{}, {"train_head": True}, {"backward_depth": 0.5}, {"scope": "global"}])
def test_a_budget_is_the_number_that_trains(llama_report, switches):
    report = llama_report(6)
    # 32 divides every cost here: any budget that the smallest plan reaches in steps of 32 can be met.
    base = make_plan(report, mode="alors", spectrum_ratio=1.0, r=2, **switches).trainable_parameters
    for budget in (base, base + 4096, base + 32 * 77):
        plan = make_plan(report, mode="alors", trainable_parameters=budget, **switches)
        assert plan.trainable_parameters == budget
        assert not any("below the budget" in note for note in plan.notes)
    plan = make_plan(report, mode="alors", trainable_parameters=base + 33, **switches)
    assert plan.trainable_parameters == base + 32
    assert any("1 below the budget: no choice of ranks comes closer." in note for note in plan.notes)


def test_a_budget_below_rank_one_names_the_smallest_that_works(llama_report):
    report = llama_report(3)
    with pytest.raises(OptionError, match=r"The smallest that works is ([\d,]+)\.") as caught:
        make_plan(report, mode="alors", trainable_parameters=100)
    smallest = int(str(caught.value).split()[-1].rstrip(".").replace(",", ""))
    assert make_plan(report, mode="alors", trainable_parameters=smallest).trainable_parameters == smallest
    with pytest.raises(OptionError, match="too few for rank 1"):
        make_plan(report, mode="alors", trainable_parameters=smallest - 1)
    with pytest.raises(OptionError, match="16,896 of them in embeddings, head and norms"):
        make_plan(report, mode="alors", trainable_parameters=smallest, train_head=True)


# --- the published selection -----------------------------------------------------------------------------------------


def read_published(path):
    """One of the published files in either layout, as (module name, kind, score) in file order."""
    data = json.loads(path.read_text())
    if "snr" in next(iter(data.values())):
        return [(name, row["type"], row["snr"]) for name, row in data.items()]
    return [(name, kind, score) for kind, rows in data.items() for name, score in rows.items()]


def published_report(rows):
    stats = tuple(
        MatrixStat(f"{n}.weight", kind, None, 0, "unknown", score, None, None, names.role(f"{n}.weight", None))
        for n, kind, score in rows
    )
    return SnrReport(stats, "spectrum", Fingerprint(None, None, "published"))


def published_text(rows, percent):
    """What the published script writes, computed in the plainest way."""
    kinds = {}
    for name, kind, score in rows:
        kinds.setdefault(kind, []).append((score, name))
    lines = ["unfrozen_parameters:", "- ^lm_head.weight$", "- ^model.embed_tokens.weight$"]
    for kind, members in kinds.items():
        members.sort(key=lambda row: row[0], reverse=True)
        lines += [f"# {kind} layers", *(f"- {name}" for _, name in members[: len(members) * percent // 100])]
    return "\n".join(lines) + "\n"


def test_the_published_file_is_reproduced_byte_for_byte(shared):
    stem = "snr_results_meta-llama-Meta-Llama-3.1-8B-Instruct"
    folder = shared / "reference_snr"
    plan = make_plan(published_report(read_published(folder / f"{stem}.json")), preset="published", spectrum_ratio=0.5)
    assert unfrozen_yaml(plan) == (folder / f"{stem}_unfrozenparameters_50percent.yaml").read_text()
    assert unfrozen_yaml(Plan.from_dict(plan.to_dict())) == unfrozen_yaml(plan)


@pytest.mark.parametrize("percent", [1, 25, 29, 50, 58, 100])
def test_every_published_scan_is_selected_from_as_the_script_does(shared, percent):
    files = sorted((shared / "reference_snr").glob("*.json"))
    assert len(files) >= 5
    for file in files:
        rows = read_published(file)
        plan = make_plan(published_report(rows), preset="published", spectrum_ratio=percent / 100)
        assert unfrozen_yaml(plan) == published_text(rows, percent)
        matched = {n for n, _, _ in rows for p in plan.patterns if p in {n, f"^{n}.weight$"}}
        assert plan.trainable_names == sorted(f"{n}.weight" for n in matched)


def test_a_percentage_of_the_preset_is_not_lost_to_rounding():
    rows = [(f"model.layers.{i}.mlp.up_proj", "mlp.up_proj", float(i)) for i in range(100)]
    plan = make_plan(published_report(rows), preset="published", spectrum_ratio=0.29)  # 0.29 * 100 < 29 in floats
    assert len(plan.trainable_names) == 29


def test_the_preset_ranks_unscored_norms_as_the_published_scans_do(llama_report):
    plan = make_plan(llama_report(4), preset="published", spectrum_ratio=0.5)
    assert saved(plan) == [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{side}_layernorm.weight" for i in (0, 1) for side in ("input", "post_attention")),
        "lm_head.weight",
    ]
    assert any("norms are not scored" in note for note in plan.notes)


def test_the_preset_matches_biases_as_regexes_do():
    shapes = {}
    for i in range(2):
        shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (8, 8), f"model.layers.{i}.self_attn.q_proj.bias": (8,)}
    plan = make_plan(of_shapes(shapes), preset="published")
    assert plan.trainable_names == ["model.layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.weight"]
    assert len([note for note in plan.notes if "matches nothing in this report" in note]) == 2


def test_a_plan_of_real_weights_is_written_as_patterns_and_one_of_adapters_is_refused(llama_report):
    import re

    import yaml

    plan = make_plan(llama_report(), spectrum_ratio=0.25)
    patterns = yaml.safe_load(unfrozen_yaml(plan))["unfrozen_parameters"]
    everything = [s.name for s in llama_report().stats]
    assert sorted(n for n in everything if any(re.match(p, n) for p in patterns)) == plan.trainable_names
    with pytest.raises(OptionError, match="mode 'lora'"):
        unfrozen_yaml(make_plan(llama_report(), mode="lora"))


# --- what is said ----------------------------------------------------------------------------------------------------


def test_explain_names_what_depth_gives_up(llama_report):
    report = llama_report(8)
    plan, free = make_plan(report, backward_depth=0.5), make_plan(report)
    text = explain(plan, report)
    lost = set(free.trainable_names) - set(plan.trainable_names)
    assert lost
    for name in lost:
        assert f"{report.scores[name]:.4g}  {name}" in text
    section = text.split("gives up")[1]
    assert {s.name for s in report.stats if s.name in section} == lost
    assert "gives up" not in explain(free)
    assert "28 of 56 matrices (50.0 %)" in text
    assert f"{plan.trainable_parameters:,} of {report.total_parameters:,}" in text


def test_explain_says_what_is_not_known(shared):
    rows = read_published(shared / "reference_snr" / "snr_results_Qwen-Qwen2-7B.json")
    text = explain(make_plan(published_report(rows), mode="alors", spectrum_ratio=0.3))
    assert "not known, the report states no shapes" in text
    assert "inf" in text
    assert "16 x 4, 4 x 4" in text


@pytest.mark.parametrize(("options", "said"), [
    ({"snr_threshold": 0.5}, "every score above 0.5"),
    ({"mode": "alors", "score_cuts": (0.5, 0.1)}, "high tier above 0.5, medium tier above 0.1"),
    ({"mode": "alors", "trainable_parameters": 40_000}, "ranks fitted to 40,000 parameters"),
    ({"mode": "full"}, "everything, scores are not asked"),
    ({"scope": "global", "measure": "parameters"}, "the best 50 % of all matrices together, by parameters"),
    ({"preset": "published"}, "preset published at 50 % of each kind"),
])  # fmt: skip
def test_explain_says_how_the_choice_was_made(llama_report, options, said):
    assert said in explain(make_plan(llama_report(), **options))


def test_explain_says_that_no_score_beats_chance_where_a_score_has_chosen(llama_report):
    said = "No score was shown to choose better than chance"
    assert all(said in explain(make_plan(llama_report(), mode=mode)) for mode in ("spectrum", "spectra_qlora", "alors"))
    assert not any(said in explain(make_plan(llama_report(), mode=mode)) for mode in ("lora", "full", "columns"))
    assert said not in explain(make_plan(replace(llama_report(), criterion="random"), criterion="random"))


def test_explain_refuses_a_report_of_another_checkpoint(llama_report):
    other = replace(llama_report(), fingerprint=Fingerprint("c" * 64, None, "file"))
    with pytest.raises(MismatchError, match="the plan does not belong to the report"):
        explain(make_plan(llama_report()), other)


def test_a_table_is_aligned():
    assert format_table(["kind", "n"], [["q", "10"], ["longer", "1"]]).splitlines() == [
        "kind     n", "------  --", "q       10", "longer   1",
    ]  # fmt: skip


def test_the_difference_of_a_plan_with_itself_is_nothing(llama_report):
    plan = make_plan(llama_report())
    assert not compare_plans(plan, plan)
    assert diff_plans(plan, plan) == "The same 14 tensors train in the same way."


def test_the_difference_of_two_plans_lists_every_change(llama_report):
    report = llama_report()
    a = make_plan(report, mode="spectra_qlora", spectrum_ratio=0.5, r=8)
    b = make_plan(report, mode="spectra_qlora", spectrum_ratio=0.75, r=4)
    diff = compare_plans(a, b)
    assert diff
    assert set(diff.started) == set(b.trainable_names) - set(a.trainable_names)
    assert diff.stopped == ()
    assert {(part, mine, other) for _, part, mine, other in diff.changed} == {("rank", 8, 4), ("alpha", 16.0, 8.0)}
    assert ("spectrum_ratio", 0.5, 0.75) in diff.settings
    text = diff_plans(a, b)
    assert all(f"+ {name}" in text for name in diff.started)
    assert text.count("~ ") == len(a.trainable_names)
    swapped = compare_plans(b, a)
    assert (swapped.started, swapped.stopped) == (diff.stopped, diff.started)


# --- re-evaluation ---------------------------------------------------------------------------------------------------


def matrix_scores(plan):
    return {e.name: e.score for e in plan.entries if e.action != "save"}


@pytest.mark.parametrize("mode", RESCORABLE)
@pytest.mark.parametrize("options", [
    {}, {"scope": "global", "spectrum_ratio": 0.3}, {"backward_depth": 0.5}, {"snr_threshold": 0.3},
    {"train_head": True},
])  # fmt: skip
def test_a_plan_made_again_keeps_its_budget_and_its_places(llama_report, mode, options):
    plan = make_plan(llama_report(6), mode=mode, rescore_every=10, **options)
    assert replan(plan, matrix_scores(plan)).entries == plan.entries
    for seed in range(10):
        scores = matrix_scores(make_plan(llama_report(6, seed=seed + 1), mode=mode, rescore_every=10, **options))
        again = replan(plan, scores)
        assert again.trainable_parameters <= plan.trainable_parameters
        assert again.trainable_names
        assert [e.name for e in again.entries] == [e.name for e in plan.entries]
        assert saved(again) == saved(plan)
        frozen = [e.name for e in plan.entries if e.action == "freeze"]
        assert [e.name for e in again.entries if e.action == "freeze"] == frozen
        assert max(e.rank or 0 for e in again.entries) <= max(e.rank or 0 for e in plan.entries)
        assert matrix_scores(again) == scores


@pytest.mark.parametrize("scope", ["per_kind", "global"])
def test_an_exact_budget_stays_exact_or_below_when_the_plan_is_made_again(llama_report, scope):
    plan = make_plan(llama_report(6), mode="alors", rescore_every=10, trainable_parameters=50_048, scope=scope)
    for seed in range(10):
        scores = matrix_scores(make_plan(llama_report(6, seed=seed + 1), mode="lora"))
        again = replan(plan, scores)
        assert plan.trainable_parameters * 0.9 < again.trainable_parameters <= plan.trainable_parameters
        assert max(e.rank for e in again.entries) <= max(e.rank for e in plan.entries)


def test_a_budget_that_is_given_is_filled_again_after_a_plan_that_left_some(llama_report):
    options = {"mode": "spectra_qlora", "rescore_every": 10, "scope": "global", "spectrum_ratio": 0.3}
    first = make_plan(llama_report(6), **options)
    scores = [matrix_scores(make_plan(llama_report(6, seed=seed), **options)) for seed in range(1, 12)]
    smaller = next(p for p in (replan(first, s) for s in scores) if p.trainable_parameters < first.trainable_parameters)
    back = matrix_scores(first)
    assert replan(smaller, back).trainable_parameters <= smaller.trainable_parameters
    assert replan(smaller, back, budget=first.trainable_parameters).entries == first.entries


def test_ranks_made_again_fit_what_is_allocated_and_leave_the_head_its_share(llama_report):
    report = llama_report(6)
    wide = {n: s + 1e3 * ("mlp" in n) for n, s in report.scores.items()}  # the costly ones lead, then the cheap ones
    plan = make_plan(
        with_scores(report, wide), mode="alors", rescore_every=10, trainable_parameters=100_000, scope="global",
        train_head=True,
    )  # fmt: skip
    assert replan(plan, wide).entries == plan.entries
    again = replan(plan, {n: s + 1e3 * ("attn" in n) for n, s in report.scores.items()})
    highest = max(e.rank or 0 for e in plan.entries)
    assert max(e.rank or 0 for e in again.entries) == highest
    assert {e.alpha / e.rank for e in again.entries if e.rank} == {2.0}
    assert again.trainable_parameters <= plan.trainable_parameters
    assert again.trainable_names == plan.trainable_names  # none was dropped to keep the budget


def test_a_score_that_rises_moves_its_matrix_up_a_tier(llama_report):
    plan = make_plan(llama_report(6), mode="alors", rescore_every=10)
    kind = "self_attn.q_proj"
    sleeping = next(e for e in plan.entries if e.kind == kind and not e.active)
    assert (sleeping.rank, sleeping.action) == (0, "lora")
    again = replan(plan, {**matrix_scores(plan), sleeping.name: 1e9})
    assert entry(again, sleeping.name).rank == 16
    assert sum(e.active for e in again.entries if e.kind == kind) == 3


def test_scores_that_do_not_fit_the_plan_are_refused(llama_report):
    plan = make_plan(llama_report(), mode="alors", rescore_every="epoch")
    scores = matrix_scores(plan)
    first = next(iter(scores))
    with pytest.raises(OptionError, match="of the plan has no new score"):
        replan(plan, {k: v for k, v in scores.items() if k != first})
    with pytest.raises(OptionError, match="'other' has a new score and is no matrix"):
        replan(plan, {**scores, "other": 1.0})
    with pytest.raises(OptionError, match="made without rescore_every"):
        replan(make_plan(llama_report(), mode="alors"), scores)


def test_the_order_of_new_scores_is_of_no_consequence(llama_report):
    plan = make_plan(llama_report(), mode="alors", rescore_every=3)
    items = list(matrix_scores(plan).items())
    random.Random(0).shuffle(items)
    assert replan(plan, dict(items)) == replan(plan, matrix_scores(plan))
