"""Records: what is saved comes back equal, and what cannot be used is refused by name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from spectrum_peft.errors import CheckpointError, MismatchError
from spectrum_peft.plan import make_plan
from spectrum_peft.records import (
    Fingerprint,
    GradientReport,
    GradientStat,
    MatrixStat,
    Plan,
    PlanEntry,
    Similarity,
    SnrReport,
    read_mapping,
    whole,
    whole_folder,
    write_text,
)
from spectrum_peft.records.files import SCHEMA_VERSION

ENTRIES = (
    PlanEntry("l.0.q.weight", "lora", rank=4, alpha=8.0, lr_ratio=0.7, kind="q", shape=(6, 4), score=math.inf),
    PlanEntry("l.1.q.weight", "lora", rank=0, alpha=0.0, active=False, kind="q", shape=(6, 4), score=-math.inf),
    PlanEntry("l.0.experts.up", "lora", rank=2, alpha=4.0, kind="experts.up", shape=(3, 6, 4)),
    PlanEntry("l.2.q.weight", "freeze", kind="q", shape=(6, 4), score=1e-30),
    PlanEntry("lm_head.weight", "save", kind="lm_head", shape=(10, 4)),
    PlanEntry("unknown.weight", "train"),
)
PLAN = Plan(
    "alors", ENTRIES, {"r": 16, "lr_ratio": (0.5, 2.0), "snr_threshold": None, "lora_alpha": 1.0}, "mp",
    Fingerprint("a" * 64, None, "live"), "org/model", "main", 1000, ("a note: with a colon", "ünïcode"), ("^a.b$",),
)  # fmt: skip


def odd_report(llama_report):
    """A report with everything that is hard to write: infinities, missing values, odd text."""
    report = llama_report(2, experts=2)
    first, second, *rest = report.stats
    odd = MatrixStat('norm\'s: "weight" # x', "norm", None, 0, "unknown", -math.inf, None, None, "norm")
    stats = (replace(first, score=math.inf, s_max=1e300), replace(second, power_law=2.5), odd, *rest)
    return replace(
        report, stats=stats, notes=("yes", "null", "1e3", "inf", "-inf"), tied=(("a", "b", "c"),), revision=None
    )


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_a_record_read_back_is_equal_and_writes_the_same_bytes(llama_report, tmp_path, suffix):
    for record in (PLAN, odd_report(llama_report), Plan("full", ())):
        path = record.save(tmp_path / f"one.{suffix}")
        again = type(record).load(path)
        assert again == record
        assert again.save(tmp_path / f"two.{suffix}").read_bytes() == path.read_bytes()
        assert again.digest == record.digest


def test_infinity_is_a_string_in_the_file_and_no_bare_json_extension(tmp_path):
    text = PLAN.save(tmp_path / "plan.json").read_text()
    assert '"score": "inf"' in text
    assert '"score": "-inf"' in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_yaml_record_is_plain_and_one_line_an_entry(tmp_path):
    text = PLAN.save(tmp_path / "plan.yaml").read_text()
    assert yaml.safe_load(text)["mode"] == "alors"
    assert sum(line.startswith("- {name: ") for line in text.splitlines()) == len(ENTRIES)


def test_nan_is_refused_by_the_name_of_its_entry(tmp_path, llama_report):
    path = tmp_path / "plan.json"
    broken = PLAN.replace(entries=(*ENTRIES[:1], replace(ENTRIES[1], score=math.nan)))
    with pytest.raises(CheckpointError, match=r"plan\.entries\[l\.1\.q\.weight\]\.score is nan"):
        broken.save(path)
    report = llama_report(1)
    name = report.stats[1].name
    torn = replace(report, stats=(report.stats[0], replace(report.stats[1], s_max=math.nan)))
    with pytest.raises(CheckpointError, match=f"snr_report.stats.{name}.*s_max is nan"):
        torn.save(path)
    assert not path.exists()


def test_the_yaml_of_a_plan_lists_what_axolotl_reads(tmp_path, llama_report):
    plan = make_plan(llama_report(2), train_head=True)
    data = yaml.safe_load(plan.save(tmp_path / "plan.yaml").read_text())
    assert data["schema_version"] == SCHEMA_VERSION
    assert sorted(data["unfrozen_parameters"]) == [f"^{name}$" for name in plan.trainable_names]


def test_a_list_for_axolotl_that_was_changed_is_said_not_to_count(tmp_path, llama_report, caplog):
    plan = make_plan(llama_report(2))
    path = plan.save(tmp_path / "plan.yaml")
    assert Plan.load(path) == plan
    assert not caplog.records
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "unfrozen_parameters": [".*"]}))
    assert Plan.load(path).trainable_names == plan.trainable_names
    assert "plan.yaml: unfrozen_parameters, a list for other tools, is not what its entries train" in caplog.text


# --- files that cannot be used ---------------------------------------------------------------------------------------


def changed(**fields):
    return json.dumps({**PLAN.to_dict(), **fields})


@pytest.mark.parametrize(("name", "text", "message"), [
    ("p.json", "", "the file is empty"),
    ("p.yaml", " \n", "the file is empty"),
    ("p.yaml", "a: 1\nb: {c: 1, c: 2}\n", r"the key 'c' \(line 2\) stands twice"),
    ("p.json", '{"a": 1, "b": [{"c": 1, "c": 2}]}', "the key 'c' stands twice"),
    ("p.json", changed()[:-20], "not JSON"),
    ("p.yaml", "a: [1", "not plain YAML"),
    ("p.yaml", "!!python/object/apply:os.system ['true']", "not plain YAML"),
    ("p.json", "[1]", "holds a list, wanted a mapping"),
    ("p.json", changed(record="snr_report"), "is a report of `scan`, wanted a plan"),
    ("p.json", changed(schema_version=SCHEMA_VERSION + 1), f"schema_version is {SCHEMA_VERSION + 1}"),
    ("p.json", changed(schema_version="1"), "schema_version is '1'"),
    ("p.json", json.dumps({k: v for k, v in PLAN.to_dict().items() if k != "mode"}), "field 'mode' is missing"),
    ("p.json", changed(entries={"a": 1}), r"entries is \{'a': 1\}, wanted a list"),
    ("p.json", changed(entries=["a"]), r"entries\[0\] is 'a', wanted a mapping"),
    ("p.json", changed(entries=[{"name": "a", "action": "freeze", "ranks": 3}]), "unknown field 'ranks'"),
    ("p.json", changed(entries=[{"name": "a"}]), r"entries\[0\].*action"),
    ("p.json", changed(entries=[{"name": "a", "action": "thaw"}]), "a: action is 'thaw'"),
    ("p.json", changed(entries=[{"name": "a", "action": "freeze"}] * 2), "plan entry a stands twice"),
    ("p.json", changed(fingerprint={"structure": None, "content": None}), "fingerprint.*source"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_with_its_path_and_field(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Plan.load(tmp_path / name)


def test_a_yaml_that_asks_for_an_object_makes_none(tmp_path):
    path, proof = tmp_path / "evil.yaml", tmp_path / "proof"
    path.write_text(f"record: !!python/object/apply:os.mkdir ['{proof}']")
    with pytest.raises(CheckpointError, match=r"evil\.yaml: not plain YAML"):
        read_mapping(path)
    assert not proof.exists()


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.json: no such file"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"binary\.json: cannot be read as text"):
        Plan.load(tmp_path / "binary.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match=r"plan\.json: cannot be written \(No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"plan\.json: cannot be written"):
        PLAN.save(tmp_path / "file" / "plan.json")


# --- what the records say --------------------------------------------------------------------------------------------


def test_trainable_names_are_sorted_and_leave_out_the_frozen_and_the_inactive():
    assert PLAN.trainable_names == ["l.0.experts.up", "l.0.q.weight", "lm_head.weight", "unknown.weight"]


def test_the_number_of_trainable_elements_counts_weights_and_factors():
    elements = {e.name: e.trainable_numel for e in ENTRIES}
    assert elements == {
        "l.0.q.weight": 4 * (6 + 4), "l.1.q.weight": 0, "l.0.experts.up": 3 * 2 * (6 + 4), "l.2.q.weight": 0,
        "lm_head.weight": 40, "unknown.weight": 0,
    }  # fmt: skip
    assert PLAN.trainable_parameters == 40 + 60 + 40


def test_a_plan_of_twice_the_same_name_is_refused():
    with pytest.raises(CheckpointError, match=r"l\.0\.q\.weight stands twice"):
        Plan("lora", (ENTRIES[0], ENTRIES[0]))


def test_replace_leaves_the_first_plan_as_it_was():
    assert PLAN.replace(mode="lora").mode == "lora"
    assert PLAN.mode == "alors"
    assert PLAN.replace(mode="alors") == PLAN


def test_the_digest_of_a_plan_follows_what_it_does_and_not_what_is_said_of_it():
    assert PLAN.replace(notes=("other",)).digest == PLAN.digest
    silent = tuple(replace(e, score=None) for e in ENTRIES)
    assert PLAN.replace(entries=silent).digest == PLAN.digest
    for change in ({"rank": 5}, {"alpha": 9.0}, {"lr_ratio": 1.0}, {"active": False}, {"group": "g"}):
        assert PLAN.replace(entries=(replace(ENTRIES[0], **change), *ENTRIES[1:])).digest != PLAN.digest


def test_the_scores_of_a_report_are_those_of_scored_rows_in_order(llama_report):
    report = llama_report(2)
    assert list(report.scores) == [s.name for s in report.stats if s.score is not None]
    assert "model.norm.weight" not in report.scores


def test_tied_tensors_count_once(llama_report):
    report = llama_report(2)
    tied = replace(report, tied=(("model.embed_tokens.weight", "lm_head.weight"),))
    assert report.total_parameters - tied.total_parameters == 264 * 64


# --- fingerprints ----------------------------------------------------------------------------------------------------

A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(("mine", "theirs", "part"), [
    ((A, A), (A, B), "content"), ((A, None), (B, None), "structure"), ((A, A), (B, None), "structure"),
])  # fmt: skip
def test_fingerprints_that_differ_are_an_error_unless_forced(mine, theirs, part):
    one, other = Fingerprint(*mine, "file"), Fingerprint(*theirs, "live")
    with pytest.raises(MismatchError, match=f"the plan does not belong to the model: fingerprint {part}"):
        one.check(other, this="the plan", that="the model")
    assert "Used all the same" in one.check(other, this="the plan", that="the model", force=True)


@pytest.mark.parametrize(("mine", "theirs", "said"), [
    ((A, B), (A, B), None),
    ((A, B), (A, None), "only names and shapes could be compared"),
    ((None, None), (A, B), "nothing could be compared"),
])  # fmt: skip
def test_fingerprints_are_compared_as_far_as_both_are_known(mine, theirs, said):
    line = Fingerprint(*mine, "file").check(Fingerprint(*theirs, "live"), this="plan", that="model")
    assert line is None if said is None else said in line


def test_a_report_file_is_not_a_plan(llama_report, tmp_path):
    path = llama_report(1).save(tmp_path / "report.yaml")
    with pytest.raises(CheckpointError, match="is a report of `scan`, wanted a plan"):
        Plan.load(path)
    assert SnrReport.load(path) == llama_report(1)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("stats", "fisher", math.nan, r"stats\[l\.0\.q\.weight\]\.fisher is nan"),
        ("stats", "fisher", -1.0, r"stats\[0\]\.fisher is -1\.0, wanted a number of at least 0"),
        ("stats", "importance", [1.0, math.inf], r"stats\[0\]\.importance\[1\] is inf, wanted a number of at most"),
        ("stats", "importance", [1.0], r"l\.0\.q\.weight has 1 importances and 2 singular values"),
        ("stats", "singular_values", [2.0, "many"], r"stats\[0\]\.singular_values\[1\] is 'many', wanted a number"),
        ("similarities", "cosine", [[1.0, 0.5]], r"cosine of q \(6, 4\) has rows of \[2\], wanted 2 of 2"),
        (
            "similarities",
            "subspace",
            [[1.0, math.nan], [0.5, 1.0]],
            r"subspace\[0\]\[1\] is nan",
        ),
    ],
)
def test_gradients_that_were_changed_by_hand_are_refused_by_name(tmp_path, part, field, value, message):
    alike = ((1.0, 0.5), (0.5, 1.0))
    stats = tuple(GradientStat(f"l.{i}.q.weight", "q", (6, 4), 0.1, (2.0, 1.0), (0.3, 0.0)) for i in range(2))
    group = Similarity("q", (6, 4), "in", 4, tuple(s.name for s in stats), alike, alike)
    path = GradientReport(stats, (group,), 4, 1.5).save(tmp_path / "gradients.json")
    assert GradientReport.load(path).stats == stats
    data = json.loads(path.read_text())
    data[part][0][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        GradientReport.load(path)
    path.write_text(json.dumps({**GradientReport(stats, (group,), 4, 1.5).to_dict(), "stats": []}))
    with pytest.raises(CheckpointError, match="stats is empty"):
        GradientReport.load(path)


# --- files that somebody reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusals", [0, 1, 3])
def test_a_file_that_is_open_elsewhere_is_replaced_when_its_reader_ends(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to rename over an open file; here the first calls are refused as it does."""
    replace, calls = Path.replace, []

    def busy(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) <= refusals:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    path = tmp_path / "record.json"
    path.write_text("old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert len(calls) == refusals + 1
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("refusals", [1, 3])
def test_a_folder_is_named_when_nobody_has_a_file_of_it_open(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of folders, which a virus scanner looks through."""
    rename, calls = Path.rename, []

    def busy(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) <= refusals:
            raise PermissionError(13, "Access is denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "x").read_text() == "1"
    assert len(calls) == refusals + 1


def test_on_windows_a_run_that_is_no_more_is_told_without_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `os.kill` with 0 would end the process that is asked for."""
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    for process in (ended.pid, os.getpid()):
        (tmp_path / f".x.json.{process}-{whole._node()}.abc.part").write_text("half")
    windows = SimpleNamespace(name="nt", scandir=os.scandir, kill=lambda *_: pytest.fail("a signal was sent"))
    monkeypatch.setattr(whole, "os", windows)
    whole.clear_parts(tmp_path / "x.json")
    assert [p.name.split(".")[3].partition("-")[0] for p in tmp_path.iterdir()] == [str(os.getpid())]


def test_a_file_that_stays_open_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(self: Path, target: Path) -> Path:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"record\.json: cannot be written \(in use\)"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_what_stands_between_two_quoted_words_is_not_cut() -> None:
    between = "between two words " * 20
    assert between in str(CheckpointError(f"the layer's 'one' {between} 'two'"))
    assert str(CheckpointError(f"'{'x' * 300}' and 'y'")) == f"'{'x' * 200}...' and 'y'"


def test_reading_a_small_file_sets_little_memory_aside(tmp_path: Path) -> None:
    """A read of the most that a file may hold would take that much, whatever the file's size."""
    import tracemalloc

    path = tmp_path / "small.json"
    path.write_text('{"a": 1}')
    tracemalloc.start()
    try:
        assert read_mapping(path) == {"a": 1}
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
