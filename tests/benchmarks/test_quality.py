"""The comparisons of quality: their rates are chosen as stated, and a suite runs from its search to its table."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spectrum_peft.plan import MODES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import columns  # noqa: E402
import quality  # noqa: E402
import tables  # noqa: E402


def summary(label: str, rate: float, figure: float | None) -> dict[str, Any]:
    metrics = {} if figure is None else {"loss": {"mean": figure}, "accuracy": {"mean": figure}}
    return {"label": label, "settings": {"learning_rate": rate}, "metrics": metrics}


def test_the_best_rate_is_chosen_for_each_and_one_at_the_edge_is_noted() -> None:
    rows = [summary("a at 1", 1.0, 0.3), summary("a at 2", 2.0, 0.1), summary("a at 3", 3.0, 0.2)]
    rows += [summary("b at 1", 1.0, 0.1), summary("b at 2", 2.0, 0.2), summary("b at 3", 3.0, None)]
    chosen, at_edge = quality.best_rates({"metric": "loss", "contestants": rows})
    assert (chosen, at_edge) == ({"a": 2.0, "b": 1.0}, ["b"])
    chosen, at_edge = quality.best_rates({"metric": "accuracy", "contestants": rows})
    assert (chosen, at_edge) == ({"a": 1.0, "b": 2.0}, ["a"])  # beyond 2.0 `b` fails: that is known, too


def test_the_search_goes_on_beyond_its_edge_and_only_there() -> None:
    rows = [summary("in at 1", 1.0, 0.3), summary("in at 2", 2.0, 0.1), summary("in at 4", 4.0, 0.2)]
    rows += [summary("low at 1", 1.0, 0.1), summary("low at 2", 2.0, 0.2), summary("low at 6", 6.0, 0.3)]
    rows += [summary("high at 6", 6.0, 0.1), summary("high at 1", 1.0, 0.3), summary("high at 2", 2.0, 0.2)]
    rows += [
        summary("diverges at 1", 1.0, 0.2),
        summary("diverges at 2", 2.0, 0.1),
        summary("diverges at 3", 3.0, None),
    ]
    wider = quality.wider_rates({"metric": "loss", "contestants": rows})
    assert wider == {"in": [1, 2, 4], "low": [0.5, 1, 2, 6], "high": [1, 2, 6, 18], "diverges": [1, 2, 3]}
    # Where all search as much, those that know their best go between it and the better of its neighbours.
    equal = quality.wider_rates({"metric": "loss", "contestants": rows}, equal=True)
    assert {len(rates) for rates in equal.values()} == {4}
    assert equal["in"] == [1, 2, pytest.approx(8**0.5, rel=1e-5), 4] and equal["low"] == wider["low"]
    assert equal["diverges"] == [1, pytest.approx(2**0.5, rel=1e-5), 2, 3]


def test_the_search_ends_where_the_best_is_inside_or_after_its_last_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(config: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
        rates = config.get("learning_rates") or {"a": [1.0, 3.0, 9.0], "b": [1.0, 3.0, 9.0]}
        asked.append(rates)
        figures = {"a": lambda rate: abs(rate - 30), "b": lambda rate: -rate}
        rows = [summary(f"{name} at {r}", r, figures[name](r)) for name, tried in rates.items() for r in tried]
        return {"metric": "loss", "contestants": rows}

    asked: list[Any] = []
    monkeypatch.setattr(quality, "compare", trained)
    chosen, at_edge = quality.best_rates(quality.search({}, None))
    assert chosen == {"a": 27.0, "b": 9.0 * 3**quality.WIDENINGS} and at_edge == ["b"]
    assert len(asked) == 1 + quality.WIDENINGS and asked[-1]["a"] == [1.0, 3.0, 9.0, 27.0, 81.0]


def test_finished_cells_of_suites_on_the_same_rows_are_taken_up(tmp_path: Path) -> None:
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("same", "other")}
    for name, path in rows.items():
        path.write_text(f'{{"text": "{name}"}}\n')
    for suite, name, data, file in (
        ("one", "done", "same", quality.RESULTS), ("one", "begun", "same", "log.txt"), ("two", "else", "other", quality.RESULTS),
        ("three", "mine", "same", quality.RESULTS),
    ):  # fmt: skip
        cell = tmp_path / suite / "search" / "cells" / name
        cell.mkdir(parents=True)
        (cell / "cell.json").write_text(json.dumps({"inputs": {"dataset": quality.file_digest(str(rows[data]))}}))
        (cell / file).write_text("{}")
    quality.take_up(tmp_path / "three" / "search", str(rows["same"]))
    assert sorted(path.name for path in (tmp_path / "three" / "search" / "cells").iterdir()) == ["done", "mine"]


def test_the_search_never_sees_the_evaluation_data_and_gives_every_method_as_many_rates(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "a"}\n' * 200)
    for name, suite in quality.SUITES.items():
        config = {"model": "m", **suite.config}
        config.pop("general", None)
        search = quality.search_config(suite, config, train, tmp_path, 10)
        assert "eval_dataset" not in search and search["dataset"] == str(train), name
        assert (search["dataset_split"], search["eval_split"]) == ("train[20:]", "train[:20]"), name
        assert len(search["learning_rate_factors"]) == 3, name
        assert all(len(rates) == 1 for rates in search.get("learning_rates", {}).values()), name
        assert not search.get("generate") and search.get("metric") not in ("exact_match", "rouge_l"), name
        final = quality.final_config(config, {"full": 1e-4}, train, Path("judged.jsonl"), tmp_path)
        assert final["learning_rates"] == {"full": [1e-4]} and "learning_rate_factors" not in final, name
        assert final["output_dir"] != search["output_dir"]


def test_the_small_grids_take_the_hours_that_are_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "folder_of", lambda model: model)
    spent: dict[str, float] = {}
    for name, suite in quality.SUITES.items():
        if suite.quick is not None:
            config = quality.settings(suite, True, tmp_path)
            assert len(config["learning_rate_factors"]) >= 3
            assert len(config["seeds"]) >= 3 or name == "adapters-gsm8k"
            kind = name.partition("-")[0] if name.startswith(("adapters-", "controls-")) else "modes"
            spent[kind] = spent.get(kind, 0) + quality.hours(suite, config)[1]
    assert spent.keys() == {"modes", "adapters", "controls"}
    assert 0 < spent["modes"] <= 4 and 0 < spent["adapters"] <= 3 and 0 < spent["controls"] <= 4
    assert list(tmp_path.iterdir()) == []


def test_every_suite_has_its_reference(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "folder_of", lambda model: str(tiny_llama_folder))
    for name, suite in quality.SUITES.items():
        for quick in (False, True) if suite.quick is not None else (False,):
            assert suite.reference in quality.labels(quality.settings(suite, quick, tmp_path)), (name, quick)


def test_help_topics_are_whole_and_none_is_on_both_sides(tmp_path: Path) -> None:
    import pydoc_data.topics

    quality.write_topics(tmp_path)
    parts = {name: quality.lines_of(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    texts = {name: [json.loads(line)["text"] for line in lines] for name, lines in parts.items()}
    assert len(texts["validation"]) >= quality.SUITES["controls-topics"].evaluation

    def letters(text: str) -> str:
        return "".join(text.split())

    held_out = [text for i, (_, text) in enumerate(sorted(pydoc_data.topics.topics.items())) if i % 4 == 0]
    assert "".join(map(letters, texts["validation"])) == "".join(map(letters, held_out))
    whole = sum(len(letters(text)) for text in pydoc_data.topics.topics.values())
    assert sum(len(letters(t)) for part in texts.values() for t in part) == whole


def test_every_mode_is_in_the_suites_of_modes() -> None:
    for name, suite in quality.SUITES.items():
        if name.startswith("modes-"):
            assert set(suite.config["modes"]) == set(MODES)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_suite_runs_from_the_search_to_its_results(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data" / "tiny"
    data.mkdir(parents=True)
    for name, count in (("train", 40), ("validation", 8)):
        rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **quality._COMMON, "max_steps": 2, "max_length": 32, "per_device_train_batch_size": 2, "seeds": [0],
        "learning_rate_factors": [1, 100], "modes": ["lora"], "controls": [],
    }  # fmt: skip
    monkeypatch.setitem(quality.SUITES, "tiny", quality.Suite("Does it run?", "smollm2", "tiny", "lora", config, {}))
    monkeypatch.setattr(quality, "folder_of", lambda model: str(tiny_llama_folder))
    monkeypatch.setattr(quality, "WIDENINGS", 0)  # its own test has no runs
    words = ["tiny", "--quick", "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "-o", str(tmp_path)]
    quality.main(words)
    found = json.loads((tmp_path / "quality-tiny-quick.json").read_text())
    rate = 100 * MODES["lora"].rate_for(2)
    assert found["rates"] == {"lora": pytest.approx(rate)}  # two steps at the default hardly move it
    assert found["rates_at_the_edge_of_the_search"] == ["lora"]
    assert len(found["search"]) == 2 and found["evaluation_rows"] == 8
    [row] = found["cells"]
    assert row["learning_rate"] == pytest.approx(rate) and row["error"] is None


def test_sizes_of_one_method_are_one_line_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectrum_peft import plots

    def row(label: str, trained: float, mean: float, low: float | None) -> dict[str, Any]:
        figure = {"mean": mean, "low": low, "high": None if low is None else 2 * mean - low, "n": 3}
        return {"label": label, "metrics": {"loss": figure}, "figures": {"trainable_parameters": {"mean": trained}}}

    rows = [row("LoRA r1", 10.0, 1.0, 0.9), row("LoRA r16", 160.0, 0.5, None), row("lorsa 64, r4", 5.0, 0.7, 0.6)]
    rows += [row("lorsa 8, r1", 1.0, 0.8, 0.7), row("sgm both r16", 20.0, 0.6, 0.5), row("sgm r4", 30.0, 0.6, 0.5)]
    rows.append({"label": "failed r4", "metrics": {}, "figures": {}})
    data = {
        "suite": "adapters-x", "metric": "loss", "contestants": rows, "config": {"train": {"max_steps": 5}, "seeds": [0]},
    }  # fmt: skip
    path = tmp_path / "quality-adapters-x.json"
    path.write_text(json.dumps(data))
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or path)
    assert quality.draw(path, tmp_path) == tmp_path / "quality_adapters_x.png"
    [axes] = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"LoRA", "lorsa", "sgm both", "sgm"}
    assert list(lines["lorsa"].get_xdata()) == [1.0, 5.0]
    assert list(lines["LoRA"].get_ydata()) == [1.0, 0.5]


@pytest.mark.parametrize("classes", [2, 3])
def test_a_fitted_head_is_that_of_the_regression_and_the_body_is_untouched(tmp_path: Path, classes: int) -> None:
    import torch
    from architectures import ARCHITECTURES
    from conftest import byte_tokenizer
    from transformers import AutoModel, AutoModelForSequenceClassification

    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    bare = tmp_path / "bare"
    ARCHITECTURES["bert"].config().save_pretrained(bare)
    body = AutoModel.from_config(ARCHITECTURES["bert"].config())
    body.save_pretrained(bare)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(bare)
    words = ["aaaa", "zzzz", "0000"]
    which = [min(i % 4, classes - 1) for i in range(60)]
    # Every sixth says another thing, so that no head is ever sure.
    rows = [
        {"text": words[0 if i % 6 == 5 else c] * (1 + i % 5), "label": f"class {c}"} for i, c in enumerate(which)
    ]  # fmt: skip
    quality.fit_head(str(bare), [json.dumps(row) for row in rows], tmp_path / "base", max_length=16)

    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    for name, tensor in body.state_dict().items():
        assert torch.equal(tensor, saved.bert.state_dict()[name]), name
    # Where the head is best, with any penalty on it, the mean error of each class is nought: the bias is not penalized.
    batch = tokenizer([row["text"][:16] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        chances = saved(**batch).logits.softmax(-1)
    wanted = torch.tensor([saved.config.label2id[row["label"]] for row in rows])
    shares = torch.bincount(wanted, minlength=classes) / len(rows)
    # L-BFGS stops before the gradient is nought; half a hundredth of a share is a tenth of what one misplaced row of
    # these makes.
    assert torch.allclose(chances.mean(0), shares, atol=5e-3)
    assert (chances.argmax(-1) == wanted).float().mean() > 0.75


def test_a_head_is_not_fitted_on_what_trains_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "banking77"
    data.mkdir()
    rows = [json.dumps({"text": f"row {i}", "label": "a"}) for i in range(quality.HEAD_ROWS + 50)]
    for name in ("train", "validation"):
        (data / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    fitted: list[Any] = []
    monkeypatch.setattr(quality, "fit_head", lambda model, rows, folder, max_length: fitted.append((rows, folder)))
    monkeypatch.setattr(quality, "folder_of", lambda model: model)

    class Asked(Exception):
        pass

    def compare(config: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
        raise Asked(dict(config))

    monkeypatch.setattr(quality, "compare", compare)
    with pytest.raises(Asked) as asked:
        quality.run("choice-banking77", True, tmp_path, tmp_path / "work", tmp_path)
    config = asked.value.args[0]
    [(used, base)] = fitted
    trained = quality.lines_of(Path(config["dataset"]))
    assert used == rows[: quality.HEAD_ROWS] and trained == rows[quality.HEAD_ROWS :]
    assert config["model"] == str(base)


def test_columns_are_held_against_lora_seed_by_seed_at_the_rate_that_was_best_for_each() -> None:
    def runs(losses: Mapping[float, list[float]]) -> list[dict[str, Any]]:
        return [
            {"rate": rate, "seed": seed, "loss": loss, "accuracy": 1 - loss, "trained": 7}
            for rate, found in losses.items() for seed, loss in enumerate(found)
        ]  # fmt: skip

    part = {
        "task": "t", "steps": 1, "batch": 1, "length": 1, "held_out_rows": 1, "untrained": 1.0, "untrained_accuracy": 0.0,
        "runs": {
            "lora": [*runs({1.0: [0.5], 2.0: [0.3, 0.1, 0.2], 4.0: [0.4]}), {"rate": 8.0, "seed": 0, "loss": None, "trained": 7}],
            "columns": runs({1.0: [0.9], 2.0: [0.6, 0.5, 0.7]}),
        },
    }  # fmt: skip
    machine = {"cpu": "x", "cores": 1}
    text = tables.columns_quality({"quality t": part, "machine": machine, "written": "2026-01-01T"})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("| t,")]
    # Differences 0.3, 0.4, 0.5: mean 0.4, and 4.303 (Student's t, 2 degrees, 97.5 %) * 0.1 / sqrt(3) is 0.248.
    assert rows == [
        ["t, loss", "lora", "7", "2", "3", "0.2000", "", "-0.400 (-0.648 to -0.152)"],
        ["t, loss", "columns", "7", "2, at the edge", "3", "0.6000", "+0.400 (+0.152 to +0.648)", ""],
        ["t, accuracy", "lora", "7", "2", "3", "0.8000", "", "+0.400 (+0.152 to +0.648)"],
        ["t, accuracy", "columns", "7", "2, at the edge", "3", "0.4000", "-0.400 (-0.648 to -0.152)", ""],
    ]


@pytest.mark.slow
def test_the_comparison_of_columns_takes_up_what_an_earlier_call_kept(tiny_llama: Any) -> None:
    import torch

    def train(rows: int, seed: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        found = [torch.randint(0, 9, (2, 8), generator=generator) for _ in range(rows // 2)]
        return [{"input_ids": ids, "labels": ids} for ids in found]

    settings = {"task": "tiny", "steps": 2, "batch": 2}
    task = columns.Task(settings, tiny_llama, "CAUSAL_LM", train, train(4, 9))
    kept: list[dict[str, Any]] = []
    columns.quality(task, range(2), {}, lambda found: kept.append(copy.deepcopy(dict(found))))
    runs = kept[-1]["runs"]
    assert set(runs) == {
        "lora",
        "columns",
        *(f"columns {how}" for how in ("by activation", "by fisher", "by spectrum", "and rows, coupled")),
    }
    for rows in runs.values():
        tried = sorted(row["rate"] for row in rows if row["seed"] == 0)
        best = tables.best_run(rows)["rate"]
        assert tried[0] < best < tried[-1]
        assert [row["rate"] for row in rows if row["seed"] == 1] == [best]
    again: list[Any] = []
    columns.quality(task, range(2), kept[1], lambda found: again.append(copy.deepcopy(dict(found))))
    assert len(again) == len(kept) - 2  # two runs were there
    untimed = [
        {n: [{k: v for k, v in r.items() if k != "cpu_seconds"} for r in rows] for n, rows in done["runs"].items()}
        for done in (again[-1], kept[-1])
    ]
    assert untimed[0] == untimed[1]
    other = dataclasses.replace(task, settings={**settings, "steps": 1})
    with pytest.raises(StopIteration):
        columns.quality(other, range(2), kept[-1], lambda found: next(iter(())))
