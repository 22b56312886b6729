"""The scan: what it lists, what it scores, and that it goes on where it was killed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import save_file

from spectrum_peft import names
from spectrum_peft.errors import CheckpointError, OptionError
from spectrum_peft.records import SnrReport
from spectrum_peft.scan import CRITERIA, cache_folder, criteria, edges, scan_weights, spectrum_of
from spectrum_peft.scan import scan as scan_module
from spectrum_peft.scan.cache import PartialResults
from spectrum_peft.weights import FileWeights, open_weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from files, as they are read."""
    seen: list[str] = []
    read = FileWeights.read

    def counted(self: FileWeights, name: str) -> torch.Tensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(FileWeights, "read", counted)
    return seen


@pytest.fixture(scope="module")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    ARCHITECTURES["mixtral"].build().save_pretrained(folder)
    return folder


def checkpoint(folder: Path, matrices: int = 12, size: int = 24, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(size, size + 8, generator=generator).to(dtype)
        for i in range(matrices)
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def left_over(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file())


# --- what is listed and scored ---------------------------------------------------------------------------------------


def test_every_tensor_is_listed_and_the_matrices_are_scored(tiny_llama_tied_folder: Path) -> None:
    report = scan_weights(str(tiny_llama_tied_folder))
    source = open_weights(tiny_llama_tied_folder)
    infos = source.tensors()
    assert [s.name for s in report.stats] == [t.name for t in infos]
    kinds = names.kinds([t.name for t in infos])
    for stat, info in zip(report.stats, infos, strict=True):
        assert (stat.shape, stat.numel, stat.dtype, stat.role) == (info.shape, info.numel, info.dtype, info.role)
        assert stat.kind == kinds[stat.name]
        if stat.role == "linear":
            expected = criteria.score(source.read(stat.name), "spectrum")
            assert (stat.score, stat.n_signal, stat.s_max, stat.power_law) == dataclasses.astuple(expected)
        else:
            assert (stat.score, stat.n_signal, stat.s_max, stat.power_law) == (None, None, None, None)
    assert len(report.scores) == 4 * 7
    assert (report.criterion, report.model_id) == ("spectrum", str(tiny_llama_tied_folder))
    assert report.fingerprint == source.fingerprint()
    assert report.tied == (("model.embed_tokens.weight", "lm_head.weight"),)


def test_parameters_are_counted_as_the_model_counts_them(tiny_llama_tied_folder: Path, tiny_llama_tied: Any) -> None:
    expected = sum(p.numel() for p in tiny_llama_tied.parameters())
    assert scan_weights(tiny_llama_tied_folder, "last").total_parameters == expected
    assert scan_weights(tiny_llama_tied, "last").total_parameters == expected


def test_a_model_in_memory_scores_as_its_file(tiny_llama_folder: Path, tiny_llama: Any) -> None:
    file, live = scan_weights(tiny_llama_folder), scan_weights(tiny_llama)
    assert live.scores == file.scores
    assert live.fingerprint == dataclasses.replace(file.fingerprint, source="live")


def test_experts_are_scored_one_by_one(mixtral_folder: Path) -> None:
    report = scan_weights(mixtral_folder)
    stats = {s.name: s for s in report.stats}
    name = "model.layers.1.mlp.experts.down_proj"
    assert [n for n in stats if n.startswith(name)] == [f"{name}[{e}]" for e in range(4)]
    assert {stats[f"{name}[{e}]"].kind for e in range(4)} == {"mlp.experts.down_proj"}
    assert stats[f"{name}[2]"].shape == (64, 96)
    whole = open_weights(mixtral_folder).read(name)
    assert stats[f"{name}[2]"].score == criteria.score(whole[2].clone(), "spectrum").score
    assert report.total_parameters == sum(t.numel for t in open_weights(mixtral_folder).tensors())


def test_a_conv1d_is_turned_before_its_rows_are_taken(tiny_gpt2_folder: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    stat = {s.name: s for s in scan_weights(tiny_gpt2_folder, "row_norm").stats}[name]
    stored = open_weights(tiny_gpt2_folder).read(name)
    assert stat.shape == (64, 192)
    assert stat.score == criteria.score(stored.T, "row_norm").score
    assert stat.score != criteria.score(stored, "row_norm").score


def test_other_roles_are_scored_when_asked(tiny_llama_folder: Path) -> None:
    report = scan_weights(tiny_llama_folder, "mean_std", score=("norm", "head", "embedding"))
    stats = {s.name: s for s in report.stats}
    assert stats["model.norm.weight"].score == math.inf  # one row has one singular value
    assert stats["lm_head.weight"].score is not None
    assert stats["model.layers.0.mlp.up_proj.weight"].score is None
    assert scan_weights(tiny_llama_folder, score=()).scores == {}


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if not row.needs_data])
def test_every_criterion_scans(criterion: str, tiny_llama_folder: Path) -> None:
    report = scan_weights(tiny_llama_folder, criterion, seed=3)
    assert report.criterion == criterion
    assert len(report.scores) == 4 * 7
    source = open_weights(tiny_llama_folder)
    for name, value in report.scores.items():
        assert value == criteria.score(source.read(name), criterion, name=name, seed=3).score
    assert all((s.s_max is not None) == CRITERIA[criterion].needs_spectrum for s in report.stats if s.score is not None)


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if row.of_name is not None])
def test_controls_read_no_weights(criterion: str, tiny_llama_folder: Path, reads: list[str], cache: Path) -> None:
    scan_weights(tiny_llama_folder, criterion)
    assert reads == []
    assert left_over(cache) == []
    scan_weights(tiny_llama_folder, "row_norm")  # the counter does count
    assert len(reads) == 4 * 7


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_the_number_of_jobs_does_not_show(jobs: int, tiny_llama_folder: Path) -> None:
    assert scan_weights(tiny_llama_folder, jobs=jobs).digest == scan_weights(tiny_llama_folder).digest


def test_a_report_saved_and_loaded_is_the_same(tiny_llama_folder: Path, tmp_path: Path) -> None:
    report = scan_weights(tiny_llama_folder, "mp", score=("linear", "norm"))
    for file in ("report.json", "report.yaml"):
        assert SnrReport.load(report.save(tmp_path / file)) == report


class Screen(io.StringIO):
    """Standard error as a terminal, or as a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_bar_is_drawn_on_a_terminal_only(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        scan_weights(tiny_llama_folder, "row_norm")
        assert ("28/28" in screen.getvalue()) == terminal
        assert bool(screen.getvalue()) == terminal


def test_torch_gets_its_threads_back(tiny_llama_folder: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        scan_weights(tiny_llama_folder, jobs=2)
        assert torch.get_num_threads() == 3
        with pytest.raises(CheckpointError):
            scan_weights(with_nan(tmp_path))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# --- what is refused -------------------------------------------------------------------------------------------------


def with_nan(folder: Path) -> Path:
    matrix = torch.ones(6, 4)
    matrix[3, 2] = math.nan
    save_file({"model.layers.0.a.weight": torch.eye(4), "model.layers.1.a.weight": matrix}, folder / "nan.safetensors")
    return folder / "nan.safetensors"


def test_a_nan_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.a\.weight: element \[3, 2\] is nan"):
        scan_weights(with_nan(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "spectrm"}, r"criterion is 'spectrm'.*'spectrum'"),
        ({"criterion": "fisher"}, r"needs gradients on data"),
        ({"jobs": 0}, "jobs is 0"),
        ({"jobs": -2}, "jobs is -2"),
        ({"jobs": 1.5}, "jobs is 1.5"),
        ({"jobs": True}, "jobs is True"),
        ({"device": "tpv"}, "device is 'tpv'"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', but"),
        ({"score": "linear"}, "score is 'linear', wanted a tuple of roles"),
        ({"score": ("linaer",)}, r"the role 'linaer'.*Did you mean 'linear'"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_opened(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scan_weights("there/is/no/such/model", **options)


# --- killed and kept -------------------------------------------------------------------------------------------------

# Kills its own process with SIGKILL after so many results, from where they are stored.
KILLED = """
import os, signal, sys
from spectrum_peft.scan import scan_weights
from spectrum_peft.scan.cache import PartialResults
add, done = PartialResults.add, []
def counted(self, *result):
    add(self, *result)
    done.append(result)
    if len(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
PartialResults.add = counted
scan_weights(sys.argv[1], jobs=2)
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of 12 matrices, and the cache folder that a scan of it left when it was killed after 5."""
    root = tmp_path_factory.mktemp("stopped")
    folder = checkpoint(root / "model")
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        env={**os.environ, "SPECTRUM_PEFT_CACHE": str(root / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    return folder, root / "cache"


def test_a_killed_scan_goes_on_where_it_stopped(
    stopped: tuple[Path, Path], cache: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, left = stopped
    fresh = scan_weights(folder)
    assert left_over(cache) == []
    reads.clear()
    shutil.copytree(left, cache, dirs_exist_ok=True)
    (partial,) = (cache / "partial").iterdir()
    assert len(partial.read_text().splitlines()) == 5
    with caplog.at_level("INFO", logger="spectrum_peft"):
        assert scan_weights(folder) == fresh
    assert len(reads) == 12 - 5
    assert "5 of 12 matrices are done" in caplog.text
    assert left_over(cache) == []


def test_a_line_that_the_kill_cut_is_scored_again(stopped: tuple[Path, Path], cache: Path, reads: list[str]) -> None:
    folder, left = stopped
    fresh = scan_weights(folder)
    shutil.copytree(left, cache, dirs_exist_ok=True)
    (partial,) = (cache / "partial").iterdir()
    partial.write_bytes(partial.read_bytes()[:-20])
    reads.clear()
    with pytest.MonkeyPatch.context() as patch:  # killed again, after the first of the rest
        patch.setattr(PartialResults, "completed", lambda self: None)
        assert scan_weights(folder) == fresh
    assert len(reads) == 12 - 4
    reads.clear()
    assert scan_weights(folder) == fresh
    assert reads == []


@pytest.mark.parametrize("change", ["criterion", "weights"])
def test_results_of_another_scan_are_not_taken(
    change: str, stopped: tuple[Path, Path], cache: Path, tmp_path: Path, reads: list[str]
) -> None:
    shutil.copytree(stopped[1], cache)
    folder = checkpoint(tmp_path / "model")
    if change == "weights":
        checkpoint(folder, dtype=torch.bfloat16)
    scan_weights(folder, "mp" if change == "criterion" else "spectrum")
    assert len(reads) == 12


def test_a_scan_that_fails_keeps_what_it_has(tmp_path: Path, reads: list[str]) -> None:
    path = with_nan(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            scan_weights(path, jobs=1)
    assert reads == ["model.layers.0.a.weight", "model.layers.1.a.weight", "model.layers.1.a.weight"]


def test_a_finished_scan_is_kept_and_taken_only_on_demand(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    folder = checkpoint(tmp_path / "model")
    scan_weights(folder)
    assert left_over(cache) == []
    kept = scan_weights(folder, cache=True)
    assert len(left_over(cache)) == 1
    reads.clear()
    assert scan_weights(folder, cache=True) == kept
    assert reads == []
    assert scan_weights(folder) == kept  # computed afresh
    assert len(reads) == 12
    reads.clear()
    scan_weights(folder, cache=True, score=("linear", "norm"))
    scan_weights(folder, "mp", cache=True)
    assert len(reads) == 24


def _edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        data = json.loads(content)
        one = next(s for s in data["stats"] if s["name"] == "model.layers.3.mlp.up_proj.weight")
        change(one if change.__code__.co_varnames[0] == "stat" else data)
        return json.dumps(data).encode()

    return edit


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "empty"),
    "cut off": (lambda content: content[: len(content) // 2], "not used"),
    "no report": (lambda content: b"[1, 2]", "not used"),
    "fewer tensors": (_edited(lambda data: data["stats"].pop()), "scores of 11 matrices, wanted 12"),
    "another tensor": (_edited(lambda stat: stat.update(name="model.layers.19.mlp.up_proj.weight")), "is in one of them only"),
    "not scored": (_edited(lambda stat: stat.pop("score")), "not used"),
    "another shape": (_edited(lambda stat: stat.update(shape=[24, 17])), "shape is"),
    "another criterion": (_edited(lambda data: data.update(criterion="mp")), "criterion is 'mp', wanted 'spectrum'"),
    "a score that is text": (_edited(lambda stat: stat.update(score="high")), "not used"),
    "a negative score": (_edited(lambda stat: stat.update(score=-1.0)), "no result of a matrix"),
    "too many signal values": (_edited(lambda stat: stat.update(n_signal=25)), "no result of a matrix"),
    "a value without end": (_edited(lambda stat: stat.update(s_max="inf")), r"s_max is inf"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_kept_scan_that_is_damaged_is_noted_and_made_again(
    tmp_path: Path, cache: Path, reads: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = checkpoint(tmp_path / "model")
    wanted = scan_weights(folder, cache=True)
    (path,) = (cache / "reports").iterdir()
    whole = path.read_bytes()
    change, message = DAMAGES[damage]
    path.write_bytes(change(whole))
    reads.clear()
    assert scan_weights(folder, cache=True) == wanted
    assert len(reads) == 12
    assert "the kept scan is not used" in caplog.text
    assert message in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    ['["{}", "high", 3, 1.0, null]', '["{}", NaN, 3, 1.0, null]', '["{}", 1.0, 99, 1.0, null]', '["{}", 1.0, 3]', '{{"{}": 1}}',
     '["{}", null, 3, 1.0, null]', '["{}", 1.0, 3, -1.0, null]', '[["{}"], 1.0, 3, 1.0, null]', "7", "[" * 100_000],
)  # fmt: skip
def test_a_result_of_a_stopped_scan_that_cannot_be_is_scored_again(
    line: str, stopped: tuple[Path, Path], cache: Path, reads: list[str]
) -> None:
    folder, left = stopped
    wanted = scan_weights(folder)
    shutil.copytree(left, cache, dirs_exist_ok=True)
    (partial,) = (cache / "partial").iterdir()
    first, *rest = partial.read_text().splitlines()
    partial.write_text("\n".join([line.format(json.loads(first)[0]), *rest]) + "\n")
    reads.clear()
    assert scan_weights(folder) == wanted
    assert len(reads) == 8


def test_a_kept_scan_follows_the_weights_and_not_the_path(tmp_path: Path, reads: list[str]) -> None:
    first, second = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    scan_weights(first, cache=True)
    reads.clear()
    report = scan_weights(second, cache=True)
    assert reads == []
    assert report.model_id == str(second)
    checkpoint(second, size=25)
    assert scan_weights(second, cache=True) != report


def test_a_trained_model_does_not_get_the_scan_of_its_checkpoint(tiny_llama: Any) -> None:
    before = scan_weights(tiny_llama, cache=True)
    name = "model.layers.2.mlp.up_proj.weight"
    with torch.no_grad():
        tiny_llama.get_parameter(name).mul_(3.0)
    after = scan_weights(tiny_llama, cache=True)
    # Each score is within its criterion's tolerance of the exact one.
    assert after.scores[name] == pytest.approx(before.scores[name] / 3, rel=2 * CRITERIA["spectrum"].tolerance)


def test_a_cache_that_cannot_be_written_costs_no_scan(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    with caplog.at_level("WARNING", logger="spectrum_peft"):
        assert len(scan_weights(checkpoint(tmp_path / "model")).scores) == 12
        assert len(scan_weights(tmp_path / "model", cache=True).scores) == 12
    assert "could not be resumed" in caplog.text
    assert "could not be kept" in caplog.text


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("SPECTRUM_PEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/spectrum_peft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "spectrum_peft"


# --- memory ----------------------------------------------------------------------------------------------------------

SHARDS, SHARD_BYTES = 10, 32 * 2**20
PEAK = """
import sys
from spectrum_peft.scan import scan_weights
from spectrum_peft.scan.gram import one_openblas_thread
from safetensors import safe_open
with one_openblas_thread():  # loads SciPy's libraries where they are used, which are no shards
    pass
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
scan_weights(sys.argv[1], "row_norm", jobs=1)
after = peak()
mapped = [safe_open(f, "pt") for f in sys.argv[2:]]
tensors = [m.get_tensor(n) for m in mapped for n in m.keys()]
total = sum(float(t.sum()) for t in tensors)
print(after - before, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shards_that_were_read_do_not_stay_in_memory(tmp_path: Path) -> None:
    """A few matrices and what malloc keeps, though the files hold ten; read through open maps, all of them stay."""
    for i in range(SHARDS):
        matrix = torch.ones(2048, SHARD_BYTES // 4 // 2048)
        save_file({f"model.layers.{i}.a.weight": matrix}, tmp_path / f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors")
    files = sorted(map(str, tmp_path.glob("*.safetensors")))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), *files], capture_output=True, text=True, check=True
    )
    scanned, mapped = map(int, run.stdout.split())
    assert scanned < SHARDS / 2 * SHARD_BYTES
    assert mapped > (SHARDS - 1) * SHARD_BYTES


# --- trained adapters ------------------------------------------------------------------------------------------------


def trained(folder: Path, model: Any, config: Any) -> Any:
    """An adapter with random factors, saved; returns the model with the adapter merged in."""
    from peft import get_peft_model

    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


LORA = {
    "plain": {},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head"]},
}


def same_scores(adapter: Path, merged: Any, base: Path, changed: Callable[[str], bool]) -> None:
    """Scan of the adapter folder against that of the model it is merged into."""
    roles = ("linear", "head", "embedding")
    found, expected = scan_weights(str(adapter), score=roles).scores, scan_weights(merged, score=roles).scores
    before = scan_weights(base, score=roles).scores
    assert list(found) == list(before)
    for name, value in found.items():
        # Each score is within its criterion's tolerance of the exact one; the weights differ by a rounding of float32.
        assert value == pytest.approx(expected[name], rel=2 * CRITERIA["spectrum"].tolerance), name
        assert (value != before[name]) == changed(name), name


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_an_adapter_folder_is_scored_as_its_merged_weights(
    options: dict[str, Any], tiny_llama_folder: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **options)
    merged = trained(tmp_path / "adapter", tiny_llama, config)
    heads = options.get("modules_to_save", [])
    same_scores(
        tmp_path / "adapter", merged, tiny_llama_folder, lambda n: "q_proj" in n or "down_proj" in n or n[:7] in heads
    )


def test_a_conv1d_adapter_folder(tiny_gpt2_folder: Path, tiny_gpt2: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merged = trained(tmp_path / "adapter", tiny_gpt2, config)
    same_scores(tmp_path / "adapter", merged, tiny_gpt2_folder, lambda n: "c_attn" in n or "c_proj" in n)


def test_an_adapter_folder_on_fused_experts(mixtral_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    merged = trained(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(mixtral_folder), config)
    same_scores(tmp_path / "adapter", merged, mixtral_folder, lambda n: ".experts." in n)


@pytest.mark.parametrize(
    "options", [{"mode": "spectrum", "spectrum_ratio": 0.5}, {"mode": "columns"}, {"mode": "columns", "coupled": True}]
)
def test_an_adapter_folder_of_real_weights(
    options: dict[str, Any], tiny_llama_folder: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    from spectrum_peft import SpectrumConfig

    config = SpectrumConfig(**options, task_type="CAUSAL_LM")
    merged = trained(tmp_path / "adapter", tiny_llama, config)
    chosen = set(SpectrumConfig.from_pretrained(tmp_path / "adapter").plan.trainable_names)
    assert chosen
    same_scores(tmp_path / "adapter", merged, tiny_llama_folder, lambda n: n in chosen)


def test_an_adapter_has_the_structure_of_its_base_and_a_content_of_its_own(
    tiny_llama_folder: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig

    trained(tmp_path / "adapter", tiny_llama, LoraConfig(r=3, target_modules=["q_proj"]))
    base, adapter = scan_weights(tiny_llama_folder), scan_weights(tmp_path / "adapter")
    assert adapter.fingerprint.structure == base.fingerprint.structure
    assert adapter.fingerprint.content not in (None, base.fingerprint.content)
    assert any("with the adapter in" in note for note in adapter.notes)


def test_an_adapter_without_a_base_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    folder = tmp_path / "adapter"
    trained(folder, tiny_llama, LoraConfig(r=3, target_modules=["q_proj"]))
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, message in ((None, "base_model_name_or_path is empty"), ("./gone", "gone: no such file or folder")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(CheckpointError, match=message):
            scan_weights(folder)


# --- one spectrum ----------------------------------------------------------------------------------------------------


def test_the_spectrum_of_one_matrix(tiny_llama_folder: Path, mixtral_folder: Path) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    found = spectrum_of(tiny_llama_folder, name)
    matrix = open_weights(tiny_llama_folder).read(name)
    exact = torch.linalg.svdvals(matrix.double())
    assert found.shape == matrix.shape
    # A wide matrix, whose smallest value is a third of the root of the mean square: 60 eps32 of that for its square (the worst
    # that a single value may be off by, `criteria._trusted`) are 5e-5 of the value.
    torch.testing.assert_close(found.values, exact, rtol=1e-4, atol=0)
    assert found.published_edge == edges.published_edge(found.values, found.shape)
    assert found.marchenko_pastur_edge == edges.marchenko_pastur_edge(found.values, found.shape)
    expert = "model.layers.0.mlp.experts.down_proj"
    assert spectrum_of(mixtral_folder, f"{expert}[1]").shape == (64, 96)
    with pytest.raises(CheckpointError, match=r"holds 4 experts, wanted one of them, such as '.*down_proj\[0\]'"):
        spectrum_of(mixtral_folder, expert)
    with pytest.raises(CheckpointError, match=r"no tensor .*Did you mean 'model\.layers"):
        spectrum_of(tiny_llama_folder, "model.layers.1.mlp.gateproj.weight")


# --- published scans -------------------------------------------------------------------------------------------------


FLAT = (
    '{"model.layers.0.self_attn.v_proj": {"snr": Infinity, "type": "self_attn.v_proj"},'
    ' "model.norm": {"snr": 2, "type": "model.norm"}}'
)
GROUPED = '{"self_attn.v_proj": {"model.layers.0.self_attn.v_proj": Infinity}, "model.norm": {"model.norm": 2}}'


@pytest.mark.parametrize("text", [FLAT, GROUPED])
def test_a_published_scan_is_a_report(text: str, tmp_path: Path) -> None:
    (tmp_path / "snr.json").write_text(text)
    report = SnrReport.load(tmp_path / "snr.json")
    assert report.scores == {"model.layers.0.self_attn.v_proj.weight": math.inf, "model.norm.weight": 2.0}
    assert [s.kind for s in report.stats] == ["self_attn.v_proj", "model.norm"]
    assert [s.role for s in report.stats] == ["linear", "norm"]
    for stat in report.stats:
        assert (stat.shape, stat.numel, stat.dtype, stat.n_signal, stat.s_max) == (None, 0, "unknown", None, None)
    assert report.fingerprint.source == "published"
    assert SnrReport.load(report.save(tmp_path / "report.json")) == report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FLAT.replace("Infinity", "NaN"), r"the SNR of 'model\.layers\.0\.self_attn\.v_proj' is nan"),
        (FLAT.replace("Infinity", '"high"'), "is 'high', wanted a number or Infinity"),
        (GROUPED.replace('"model.norm": 2}', '"model.layers.0.self_attn.v_proj": 2}'), "stands twice"),
        ("{}", "field 'record' is None"),
        ('{"a": 1}', "field 'record' is None"),
        ('{"a": {"b": {"c": 1}}}', "field 'record' is None"),
    ],
)
def test_what_is_no_published_scan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "snr.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        SnrReport.load(tmp_path / "snr.json")


def test_the_published_files_are_read_whole(shared: Path) -> None:
    files = sorted((shared / "reference_snr").glob("*.json"))
    assert len(files) == 5
    for file in files:
        stored = json.loads(file.read_text())
        flat = {n: row["snr"] for n, row in stored.items()} if "snr" in next(iter(stored.values())) else {}
        for group in [] if flat else stored.values():
            flat.update(group)
        report = SnrReport.load(file)
        assert report.scores == {f"{name}.weight": value for name, value in flat.items()}
        for name, row in stored.items():
            if "type" in row:
                kind = next(s.kind for s in report.stats if s.name == f"{name}.weight")
                assert kind.endswith(row["type"]), name


@pytest.mark.multiprocess
def test_two_processes_at_once_come_to_the_same(tmp_path: Path) -> None:
    """They append to one file of partial results; neither is disturbed."""
    folder = checkpoint(tmp_path / "model", matrices=30, size=96)
    program = "import sys; from spectrum_peft import scan_weights; print(scan_weights(sys.argv[1]).digest)"
    runs = [subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) for _ in range(2)]
    digests = {run.communicate()[0].decode().strip() for run in runs}
    assert digests == {scan_weights(folder).digest}
    assert os.environ["SPECTRUM_PEFT_CACHE"] in str(cache_folder())


def test_a_kept_scan_carries_the_fingerprint_of_the_weights_that_ask(tmp_path: Path) -> None:
    """One model's values from two folders, in float32 and cast: the second's report must not belong to the first."""
    from architectures import ARCHITECTURES
    from transformers import AutoModelForCausalLM

    model = ARCHITECTURES["llama"].build()
    model.save_pretrained(tmp_path / "float32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    for name in ("float32", "bfloat16"):
        live = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        report = scan_weights(live, cache=True)
        assert report.fingerprint.content == open_weights(str(tmp_path / name)).fingerprint().content


# --- devices ---------------------------------------------------------------------------------------------------------


def test_products_are_in_float32_whatever_the_program_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = checkpoint(tmp_path / "model", matrices=2), []
    score = criteria.score

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return score(*args, **kwargs)

    monkeypatch.setattr(criteria, "score", watched)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    try:
        scan_weights(folder)
        assert seen == ["highest"] * 2
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_several_devices_and_reading_ahead_give_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, places = checkpoint(tmp_path / "model", matrices=6), []
    expected = scan_weights(folder)
    to = torch.Tensor.to

    def watched(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.device):
            places.append(args[0])
        return to(tensor, *args, **kwargs)

    both = [torch.device("cpu"), torch.device("cpu:0")]  # which torch tells apart
    monkeypatch.setattr(scan_module, "devices_named", lambda text: both)
    monkeypatch.setattr(scan_module, "_reads_ahead", lambda source, device: True)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    assert scan_weights(folder).digest == expected.digest
    assert [sum(place == one and place.index == one.index for place in places) for one in both] == [3, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "all"])
def test_a_gpu_scores_as_the_cpu_does(tmp_path: Path, device: str) -> None:
    folder = checkpoint(tmp_path / "model", matrices=6, size=300)
    if device == "all":
        device = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    here, there = scan_weights(folder, device="cpu"), scan_weights(folder, device=device)
    tolerance = criteria.CRITERIA["spectrum"].tolerance
    assert there.scores == pytest.approx(here.scores, rel=2 * tolerance)  # each is within it of the one in float64
