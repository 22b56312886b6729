"""Figures: what is drawn is what the records say. The pictures themselves were looked at."""

from __future__ import annotations

import builtins
import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from spectrum_peft import plots
from spectrum_peft.errors import CheckpointError, InstallError, MismatchError, OptionError
from spectrum_peft.plan import make_plan
from spectrum_peft.records import Fingerprint, Plan, PlanEntry

pytest.importorskip("matplotlib", reason='needs the extra "plot"')
from matplotlib.text import Text


@dataclass(frozen=True)
class Matrix:
    name: str
    shape: tuple[int, int]
    values: np.ndarray
    published_edge: float
    marchenko_pastur_edge: float


def with_scores(report, change):
    return replace(report, stats=tuple(replace(s, score=change(s)) if s.score is not None else s for s in report.stats))


def dots(figure):
    """(column, row) of every mark on the heat map."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    return sorted((int(x), int(y)) for line in lines for x, y in zip(*line.get_data(), strict=True))


def shown(figure):
    """The grid of scores as the picture has it; masked cells are nan."""
    return np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)


def texts(figure):
    return [t.get_text() for legend in figure.legends for t in legend.get_texts()]


@pytest.mark.parametrize("mode", ["spectrum", "lora", "alors"])
def test_every_chosen_matrix_and_no_other_has_a_dot(llama_report, mode):
    report = llama_report(9)
    plan = make_plan(report, mode=mode, **({} if mode == "lora" else {"spectrum_ratio": 0.3}))
    kinds = sorted({e.kind for e in plan.entries})
    wanted = [(int(e.name.split(".")[2]), kinds.index(e.kind)) for e in plan.entries if e.trains]
    assert dots(plots.heat_map(report, plan)) == sorted(wanted)
    assert dots(plots.heat_map(report)) == []


def test_the_cells_hold_the_ranks_within_their_kind_by_block(llama_report):
    report = llama_report(12)
    figure = plots.heat_map(report)
    grid = shown(figure)
    kinds = sorted({s.kind for s in report.stats if s.score is not None})
    assert grid.shape == (len(kinds), 12)
    for stat in report.stats:
        if stat.score is not None:
            below = sum(s.kind == stat.kind and s.score < stat.score for s in report.stats if s.score is not None)
            assert grid[kinds.index(stat.kind), int(stat.name.split(".")[2])] == pytest.approx(below / 11)
    figure.canvas.draw()
    drawn = {text.get_text() for text in figure.findobj(Text)}
    assert {"place within its kind\n(spectrum)", "lowest", "highest"} <= drawn


def test_equal_scores_have_one_colour_and_what_has_no_rank_none():
    grid = np.array([[3.0, 1.0, 1.0, math.inf], [math.nan, 7.0, math.nan, math.nan], [math.nan] * 4])
    expected = [[1.0, 0.25, 0.25, math.nan], [math.nan, 0.5, math.nan, math.nan], [math.nan] * 4]
    np.testing.assert_allclose(plots.ranks_within_rows(grid), expected)


def test_what_a_kind_scores_as_a_whole_and_how_far_apart_does_not_show(llama_report):
    """Any rising function of the scores of a kind leaves the picture as it is."""
    report = llama_report(9)
    moved = with_scores(report, lambda s: math.exp(s.score) if "mlp" in s.kind else 1e3 * s.score - 5)
    np.testing.assert_array_equal(shown(plots.heat_map(report)), shown(plots.heat_map(moved)))


def test_each_tier_has_its_own_size_and_line_in_the_legend(llama_report):
    report = llama_report(8)
    figure = plots.heat_map(report, make_plan(report, mode="alors", r=16))
    assert texts(figure) == ["chosen, rank 16 (14)", "chosen, rank 4 (14)"]
    sizes = [line.get_markersize() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sizes[0] > 1.5 * sizes[1]


def test_infinite_scores_are_hatched_and_left_out_of_the_colours(llama_report):
    report = with_scores(llama_report(4), lambda s: math.inf if s.kind.endswith("v_proj") else s.score)
    figure = plots.heat_map(report)
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    last = len({s.kind for s in report.stats if s.score is not None}) - 1  # v_proj, the last in the alphabet
    assert {(round(p.get_x() + 0.46), round(p.get_y() + 0.46)) for p in hatched} == {(i, last) for i in range(4)}
    assert texts(figure) == ["infinite (4)"]
    assert math.isfinite(figure.axes[0].images[0].norm.vmax)


def test_a_zero_is_written_into_its_cell(llama_report):
    first = "model.layers.0.self_attn.q_proj.weight"
    figure = plots.heat_map(with_scores(llama_report(4), lambda s: 0.0 if s.name == first else s.score))
    assert [t.get_text() for t in figure.axes[0].texts] == ["0"]


@pytest.mark.parametrize("value", [0.0, 1.0, math.inf])
def test_a_report_of_equal_scores_can_be_drawn(llama_report, tmp_path, value):
    report = with_scores(llama_report(3), lambda s: value)
    assert plots.save(plots.heat_map(report), tmp_path / "map.png").stat().st_size > 1000


def test_experts_share_a_cell_that_shows_their_mean(llama_report):
    report = llama_report(3, experts=4)
    figure = plots.heat_map(report, make_plan(report))
    kinds = sorted({s.kind for s in report.stats if s.score is not None})
    row = kinds.index("mlp.experts.down_proj")
    means = [sum(report.scores[f"model.layers.{i}.mlp.experts.down_proj[{e}]"] for e in range(4)) for i in range(3)]
    assert list(shown(figure)[row]) == [sorted(means).index(mean) / 2 for mean in means]
    assert len(dots(figure)) == len(make_plan(report).trainable_names)


def test_what_lies_outside_the_blocks_is_counted_in_words(llama_report):
    report = llama_report(3)
    scored = replace(report, stats=tuple(replace(s, score=1.0) for s in report.stats))
    assert texts(plots.heat_map(scored)) == ["3 scored outside the blocks: not shown"]


def test_a_report_without_scores_and_a_plan_of_another_checkpoint_are_refused(llama_report):
    report = llama_report(3)
    with pytest.raises(OptionError, match="no score inside a block"):
        plots.heat_map(replace(report, stats=tuple(replace(s, score=None) for s in report.stats)))
    other = replace(report, fingerprint=Fingerprint("c" * 64, None, "file"))
    with pytest.raises(MismatchError, match="the plan does not belong to the report"):
        plots.heat_map(other, make_plan(report))


# --- one matrix ------------------------------------------------------------------------------------------------------


def test_both_edges_are_drawn_where_they_are_with_what_lies_above():
    values = np.linspace(10, 0, 101)
    figure = plots.spectrum(Matrix("layers.0.q.weight", (101, 200), values, 4.95, 7.95))
    curve, bars = figure.axes
    legend = [t.get_text() for t in curve.get_legend().get_texts()]
    assert legend == ["Marchenko-Pastur edge 7.95: 21 of 101 above", "published edge 4.95: 51 of 101 above"]
    assert [line.get_ydata()[0] for line in curve.lines[1:]] == [7.95, 4.95]
    assert sum(bar.get_width() for bar in bars.patches) == 101
    assert np.array_equal(curve.lines[0].get_ydata(), values)


def test_an_infinite_edge_and_a_single_value_can_be_drawn(tmp_path):
    figure = plots.spectrum(Matrix("norm", (1, 8), np.array([2.0]), 0.0, math.inf))
    legend = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert legend == ["published edge 0: 1 of 1 above"]
    assert plots.save(figure, tmp_path / "one.svg").read_text().startswith("<?xml")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_each_run_has_a_colour_and_a_line_of_its_own():
    runs = [{"label": f"run {i}", "steps": [1, 2, 3], "loss": [3.0, 2.0, 1.0 + i]} for i in range(4)]
    axes = plots.curves(runs).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 4
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [f"run {i}: {1 + i} at the end" for i in range(4)]


def test_a_long_curve_is_drawn_under_its_running_mean():
    loss = np.random.default_rng(0).normal(2, 0.5, 200)
    raw, mean = plots.curves([{"label": "a", "steps": range(200), "loss": loss}]).axes[0].lines
    assert np.array_equal(raw.get_ydata(), loss)
    assert mean.get_ydata()[100] == pytest.approx(loss[95:106].mean())
    assert mean.get_ydata()[0] == pytest.approx(loss[:6].mean())
    assert mean.get_ydata()[-1] == pytest.approx(loss[-6:].mean())


def test_losses_that_are_not_finite_are_counted_in_the_label():
    axes = plots.curves([{"label": "a", "steps": [1, 2, 3], "loss": [1.0, math.nan, math.inf]}]).axes[0]
    assert axes.get_legend().get_texts()[0].get_text() == "a (2 losses not finite): 1 at the end"


def test_held_out_losses_are_marks():
    axes = plots.curves([{"label": "a", "steps": [1, 2], "loss": [2, 1], "held_out": {0: 2.5, 2: 1.5}}]).axes[0]
    assert axes.lines[1].get_linestyle() == "None"
    assert list(axes.lines[1].get_xdata()) == [0, 2]


def test_bad_runs_are_refused_by_name():
    with pytest.raises(OptionError, match="run 'a' has 2 steps and 1 losses"):
        plots.curves([{"label": "a", "steps": [1, 2], "loss": [2]}])
    with pytest.raises(OptionError, match="no run"):
        plots.curves([])
    with pytest.raises(OptionError, match="no point"):
        plots.trade_off([], x_label="x", y_label="y")


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_nothing_else_beats_at_its_cost(higher):
    sign = 1 if higher else -1
    points = [{"x": x, "y": sign * y} for x, y in ((3, 5), (1, 2), (2, 2), (2, 4), (4, 5), (1, 1), (5, 6), (2, 4))]

    def beaten(p):  # the definition, pair by pair
        worse = [sign * (q["y"] - p["y"]) for q in points if q["x"] < p["x"]]
        equal = [sign * (q["y"] - p["y"]) for q in points if q["x"] == p["x"]]
        return any(d >= 0 for d in worse) or any(d > 0 for d in equal)

    found = [(p["x"], p["y"]) for p in plots.front(points, higher)]
    assert found == sorted({(p["x"], p["y"]) for p in points if not beaten(p)})
    axes = plots.trade_off([{"label": "a", **p} for p in points], x_label="x", y_label="y", higher=higher).axes[0]
    assert list(zip(*axes.lines[0].get_data(), strict=True))[:-1] == found


def test_a_trade_off_has_one_line_a_label_in_order_of_cost():
    points = [{"label": "a", "x": x, "y": x / 10, "low": x / 10 - 0.1, "high": x / 10 + 0.2} for x in (4, 1, 2)]
    points.append({"label": "b", "x": 3, "y": 0.5})
    axes = plots.trade_off(points, x_label="GiB", y_label="accuracy", log_x=True).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["a"].get_xdata()) == [1, 2, 4]
    [spread] = axes.containers  # of "b" none is known, and none is drawn
    assert spread.lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.0, 0.3])
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("n", [7, 9, 12, 30])
def test_no_two_labels_share_a_colour_or_look_alike_in_grey(n):
    points = [{"label": str(i), "x": 10 + i, "y": i} for i in range(n)]
    drawn = plots.trade_off(points, x_label="x", y_label="y").axes[0].lines
    assert len({line.get_color() for line in drawn}) == n
    assert len({(line.get_marker(), line.get_linestyle()) for line in drawn}) == min(n, 28)  # seven marks, four lines


@pytest.mark.parametrize(("low", "high"), [(1.2e5, 1.3e6), (3e4, 2.3e7), (5, 9), (100, 900), (2e8, 7e9), (1e-3, 0.4)])
def test_the_ticks_of_a_logarithm_do_not_touch_and_are_plain_numbers(low, high):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    points = [{"label": "a", "x": x, "y": 1.0} for x in (low, high)]
    figure = plots.trade_off(points, x_label="x", y_label="y", log_x=True, size=(4.1, 3.2))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    left, right = figure.axes[0].get_xlim()
    ticks = [
        tick.label1
        for tick in [*figure.axes[0].xaxis.get_major_ticks(), *figure.axes[0].xaxis.get_minor_ticks()]
        if tick.label1.get_text() and left <= tick.get_loc() <= right
    ]
    boxes = sorted((t.get_window_extent(canvas.get_renderer()) for t in ticks), key=lambda box: box.x0)
    assert boxes and all(a.x1 + 2 < b.x0 for a, b in pairwise(boxes))
    assert all(re.fullmatch(r"\d+(\.\d+)?[kMB]?", t.get_text()) for t in ticks)


# --- files and the library -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_figure_is_saved_in_the_format_of_its_ending(llama_report, tmp_path, suffix, start):
    path = tmp_path / "new folder" / f"map.{suffix}"
    assert plots.save(plots.heat_map(llama_report(2)), path) == path
    assert path.read_bytes().startswith(start)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_ending_or_an_unwritable_folder_is_refused(llama_report, tmp_path):
    figure = plots.heat_map(llama_report(2))
    with pytest.raises(OptionError, match=r"map\.jpeg: a picture ends in one of \.png, \.pdf, \.svg"):
        plots.save(figure, tmp_path / "map.jpeg")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        plots.save(figure, tmp_path / "file" / "map.png")


def test_a_missing_matplotlib_gives_the_line_that_installs_it(llama_report, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InstallError, match=r'pip install "spectrum-peft\[plot\]"'):
        plots.heat_map(llama_report(2))


def test_drawing_leaves_the_global_state_of_matplotlib_alone(llama_report):
    from matplotlib import pyplot

    plots.heat_map(llama_report(2))
    plots.curves([{"label": "a", "steps": [1], "loss": [1]}])
    assert pyplot.get_fignums() == []


# --- components ------------------------------------------------------------------------------------------------------


def component_plan(chosen, svd_rank=16, shape=(20, 12)):
    entries = tuple(
        PlanEntry(name, "lorsa", rank=2, alpha=2.0, kind=name.split(".")[-2], shape=shape, components=components)
        for name, components in chosen.items()
    )
    return Plan("lorsa", entries, options={"svd_rank": svd_rank})


ONE = {"h.0.up.weight": (0, 1, 2), "h.1.up.weight": (0, 5), "h.0.down.weight": (11,)}
TWO = {"h.0.up.weight": (0, 1, 9), "h.1.up.weight": (6, 7)}


def test_the_histogram_counts_components_of_a_kind_over_the_blocks():
    figure = plots.components({"one": component_plan(ONE)}, bins=6)
    by_kind = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert set(by_kind) == {"down", "up"}
    # 12 components of each matrix, two in each bin; of `up` there are two matrices.
    assert by_kind["up"].patches[0].get_data().values.tolist() == [0.75, 0.25, 0.25, 0.0, 0.0, 0.0]
    assert by_kind["down"].patches[0].get_data().values.tolist() == [0, 0, 0, 0, 0, 0.5]
    assert by_kind["up"].lines[0].get_ydata()[0] == pytest.approx((3 / 12 + 2 / 12) / 2)


def test_the_overlap_of_two_plans_is_over_the_matrices_of_both():
    one, two = component_plan(ONE), component_plan(TWO)
    assert plots.component_overlap(one, one) == 1.0
    assert plots.component_overlap(one, two) == plots.component_overlap(two, one) == 2 * 2 / 10
    table = plots.components({"one": one, "two": two}).axes[-1]
    assert [t.get_text() for t in table.texts] == ["1.00", "0.40", "0.40", "1.00"]
    with pytest.raises(OptionError, match="of no matrix that is the same"):
        plots.component_overlap(one, component_plan({"h.7.up.weight": (1,)}))


def test_components_of_a_plan_that_has_none_are_refused(llama_report):
    with pytest.raises(OptionError, match="mode 'alors' and chooses no singular components"):
        plots.components({"a": make_plan(llama_report(2), mode="alors")})
    with pytest.raises(OptionError, match="no plan"):
        plots.components({})


def test_the_difference_to_a_reference_is_drawn_step_by_step():
    runs = [
        {"label": "full (lr 1)", "steps": [1, 2, 3], "loss": [3.0, 2.0, 1.0]},
        {"label": "lora (lr 2)", "steps": [2, 3, 4], "loss": [2.5, 1.25, 1.0]},
    ]
    figure = plots.curves(runs, reference="full (lr 1)")
    zero, line = figure.axes[1].lines
    assert set(zero.get_ydata()) == {0}
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 3], [0.5, 0.25])
    assert figure.axes[1].get_ylabel() == "above full" and len(plots.curves(runs).axes) == 1
    with pytest.raises(
        OptionError, match=r"reference is 'full'. Did you mean 'full \(lr 1\)'|reference is 'full'. Known"
    ):
        plots.curves(runs, reference="full")
