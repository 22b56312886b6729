"""Every reader of files, each with a sound file and what the command does with it.

A reader gets a folder of its own, in which one file was replaced by a damaged one. It may return, or raise a `SpectrumError`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from conftest import _gradients_of, _llama_report, byte_tokenizer
from mutate import FIELDS, TEMPLATES, as_json
from quantizing import FORMATS, mxfp4
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from spectrum_peft.arguments import take_config
from spectrum_peft.cli.compare import VERB as COMPARE
from spectrum_peft.cli.train import VERB as TRAIN
from spectrum_peft.compare import read_cell, read_comparison
from spectrum_peft.data import read_dataset, select_columns
from spectrum_peft.export import export_axolotl, export_lora, merge_into_base
from spectrum_peft.plan import checked_plan, diff_plans, explain, make_plan
from spectrum_peft.records import BESIDE_FILE, GradientReport, MemoryReport, Plan, SnrReport
from spectrum_peft.scan import scan_weights
from spectrum_peft.train.checkpoints import checkpoint_to_resume
from spectrum_peft.weights.adapter_config import fields_beside

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Reader:
    """Attributes:
    file: that is damaged, below the folder.
    make: fills a folder with sound files.
    read: what is done with them; the folder is thrown away afterwards.
    parse, write: the file as plain data and back; None where only its bytes are changed.
    cost: seconds of a reading, roughly: dear readers get fewer inputs.
    weight: how many readers' time it gets in a campaign.
    more: values that are put in beside the usual ones.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    read: Read
    parse: Callable[[bytes], Any] | None = None
    write: Callable[[Any], bytes] = as_json
    cost: float = 0.002
    weight: int = 1
    more: Sequence[Any] = ()


def _yaml(data: Any) -> bytes:
    try:
        return yaml.safe_dump(data, sort_keys=False).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of more digits than Python writes
        return as_json(data)


def header_of(raw: bytes) -> Any:
    """The header of a safetensors file, and its data as Latin-1."""
    size = int.from_bytes(raw[:8], "little")
    return {"header": json.loads(raw[8 : 8 + size]), "data": raw[8 + size :].decode("latin-1")}


def with_header(parts: Any) -> bytes:
    header = parts.get("header") if isinstance(parts, dict) else parts
    data = parts.get("data") if isinstance(parts, dict) else b""
    text = as_json(header)
    tail = data.encode("latin-1", "replace") if isinstance(data, str) else b""
    return len(text).to_bytes(8, "little") + text + tail


# --- sound files -----------------------------------------------------------------------------------------------------


def _report(folder: Path) -> None:
    _llama_report(2).save(folder / "report.json")


def _gradients(folder: Path) -> None:
    report = _llama_report(1, hidden=8)
    report.save(folder / "report.json")
    _gradients_of(report).save(folder / "gradients.json")


def _plan(folder: Path) -> None:
    for name in ("plan.json", "plan.yaml"):
        make_plan(_llama_report(2), mode="alors", spectrum_ratio=0.5).save(folder / name)


def _memory(folder: Path) -> None:
    MemoryReport(
        "lora", 100, {"weights": 60, "gradients": 40}, "backward", "model.x", {"forward": {"weights": 60}}, 0, 4, 16, 100, 20, 4,
        {"batch_size": 1, "dtype": "float32"}, notes=("a note",),
    ).save(folder / "memory.json")  # fmt: skip


_SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.mlp.experts.down_proj": (3, 8, 4),
    "model.norm.weight": (8,),
    "lm_head.weight": (32, 8),
}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "vocab_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()}


def _checkpoint(folder: Path) -> None:
    save_file(_tensors(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _quantized(folder: Path) -> None:
    """A file with a matrix in each of the forms that others store."""
    matrix, tensors = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), {}
    for i, (_, quantize, _) in enumerate(FORMATS.values()):
        tensors |= quantize(f"model.layers.{i}.mlp.up_proj", matrix)[0]
    tensors |= mxfp4("model.layers.90.mlp.experts.gate_up_proj", matrix.T.reshape(1, 32, 16).contiguous())[0]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _shards(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {}
    tensors = _tensors()
    for i, part in enumerate((list(tensors)[:3], list(tensors)[3:])):
        save_file({n: tensors[n] for n in part}, folder / names[i])
        where |= dict.fromkeys(part, names[i])
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _adapter(folder: Path) -> None:
    (folder / "base").mkdir()
    _checkpoint(folder / "base")
    adapter = folder / "adapter"
    adapter.mkdir()
    tensors = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        out, inside = _SHAPES[f"model.layers.0.{name}.weight"]
        key = f"base_model.model.model.layers.0.{name}.lora_"
        tensors |= {f"{key}A.weight": torch.ones(2, inside), f"{key}B.weight": torch.ones(out, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(folder / "base"),
        "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 8}, "rank_pattern": {}, "use_rslora": False,
        "modules_to_save": None, "trainable_token_indices": None, "init_lora_weights": True, "bias": "none",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(adapter)


def _own_adapter(folder: Path) -> None:
    """An adapter of ours, with a plan inside."""
    _adapter(folder)
    _own_adapter_config(folder)


def _own_adapter_config(folder: Path) -> None:
    path = folder / "adapter" / "adapter_config.json"
    report = scan_weights(str(folder / "base"), "last")
    plan = make_plan(
        report,
        mode="lora",
        r=2,
        candidates=["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"],
    )
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "peft_type": "SPECTRUM",
                "mode": "lora",
                "force": True,
                "plan": plan.to_dict(),
            }
        )
    )


def _plain_adapter(folder: Path) -> None:
    """The same, as it is saved: a plain LoRA, its plan beside it."""
    _adapter(folder)
    plain = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    _own_adapter_config(folder)
    path = folder / "adapter" / "adapter_config.json"
    beside = fields_beside(json.loads(path.read_text()), plain)
    path.write_text(json.dumps(plain))
    (folder / "adapter" / BESIDE_FILE).write_text(json.dumps(beside))


def _tokenized(folder: Path) -> None:
    """A checkpoint with a tokenizer, a template and what else lies beside weights; rows for each task."""
    _adapter(folder)
    base = folder / "base"
    byte_tokenizer().save_pretrained(base)
    added = [{"id": i, "content": t, "special": True} for i, t in ((256, "<pad>"), (257, "<s>"), (258, "</s>"))]
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    (base / "added_tokens.json").write_text(json.dumps({row["content"]: row["id"] for row in added}))
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 4, "do_sample": True, "temperature": 0.5})
    )
    (base / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", "size": 8}))


def _gguf(folder: Path) -> None:
    """Written by hand, because gguf's own writer takes long: a header, and a tensor in float32 and one in Q8_0."""

    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    pairs += text("llama.attention.head_count") + struct.pack("<II", 4, 2)
    pairs += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensors = text("blk.0.attn_q.weight") + struct.pack("<IQQIQ", 2, 8, 8, 0, 0)
    tensors += text("blk.0.ffn_down.weight") + struct.pack("<IQQIQ", 2, 32, 8, 8, 256)
    tensors += text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 544)
    head = b"GGUF" + struct.pack("<IQQ", 3, 3, 3) + pairs + tensors
    head += bytes(-len(head) % 32)
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    (folder / "model.gguf").write_bytes(head + values + bytes(range(1, 35)) * 8 + bytes(16) + values[:128])


def _train_config(folder: Path) -> None:
    data = {
        "model": "somewhere/model", "dataset": "rows.jsonl", "output_dir": str(folder / "out"), "mode": "alors",
        "ratio": 0.5, "r": 8,
        "lr_ratio": [0.5, 2.0], "use_rslora": False, "target_modules": ["q_proj"], "seed": 1, "rescore_every": "epoch",
    }  # fmt: skip
    (folder / "train.yaml").write_bytes(_yaml(data))


def _compare_config(folder: Path) -> None:
    data = {
        "model": "m", "dataset": "d", "modes": ["spectrum", "lora"], "ratios": [0.25], "seeds": [0, 1], "controls": ["random"],
        "learning_rates": {"lora": [1e-4]}, "contestants": [{"name": "x", "mode": "lora", "r": 4}], "confidence": 0.9,
    }  # fmt: skip
    (folder / "compare.yaml").write_bytes(_yaml(data))


def _cell(folder: Path) -> None:
    cell = {
        "label": "lora", "seed": 0, "trained": True, "digest": "a" * 64, "control": None, "arguments": ["--max-steps", "1"],
        "measure": {"speed": {"tokens": 2}}, "inputs": {}, "scan_seconds": 1.0, "keep_model": False, "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / "cell.json").write_text(json.dumps(cell))
    train = {"model": "m", "dataset": "d", "mode": "lora", "output_dir": str(folder.resolve() / "model")}
    (folder / "train.yaml").write_bytes(_yaml(train))


def _rows(folder: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": "it"}]}
        for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "rows.json").write_text(json.dumps([{"text": f"a text {i}", "label": i % 2} for i in range(4)]))
    (folder / "rows.csv").write_text("prompt,completion\na,b\nc,d\n")


def _kept(folder: Path) -> None:
    """A scan that is kept, and one that was stopped."""
    _checkpoint(folder)
    cache = os.environ["SPECTRUM_PEFT_CACHE"]
    os.environ["SPECTRUM_PEFT_CACHE"] = str(folder / "cache")
    try:
        scan_weights(str(folder), jobs=1, device="cpu", cache=True)
        (kept,) = (folder / "cache" / "reports").iterdir()
        kept.rename(folder / "kept.json")
        stopped = folder / "cache" / "partial" / f"{kept.name.partition('-')[0]}.jsonl"
        rows = [
            ["model.layers.0.self_attn.q_proj.weight", 1.5, 3, 2.0, None],
            ["model.layers.0.mlp.down_proj.weight", 1.5, 3, 2.0, 2.5],
        ]
        stopped.parent.mkdir(exist_ok=True)
        (folder / "stopped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "places.json").write_text(
            json.dumps({"kept.json": str(kept.relative_to(folder)), "stopped.jsonl": str(stopped.relative_to(folder))})
        )
    finally:
        os.environ["SPECTRUM_PEFT_CACHE"] = cache


def _resumable(folder: Path) -> None:
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"x": torch.ones(2)}, checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"x": torch.ones(2)}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "log_history": [{"loss": 1.0}]})
        )


# --- what is done with them ------------------------------------------------------------------------------------------


def _read_report(folder: Path) -> None:
    report = SnrReport.load(folder / "report.json")
    explain(make_plan(report, mode="alors"), report)


def _read_gradients(folder: Path) -> None:
    make_plan(_llama_report(1, hidden=8), mode="sgm", spectrum_ratio=1.0, gradients=folder / "gradients.json")
    make_plan(
        _llama_report(1, hidden=8),
        mode="lorsa",
        n_components=2,
        svd_rank=4,
        gradients=GradientReport.load(folder / "gradients.json"),
    )


def _read_plan(name: str) -> Read:
    def read(folder: Path) -> None:
        plan = checked_plan(Plan.load(folder / name), name)
        explain(plan)
        diff_plans(plan, plan)
        plan.save(folder / "again.json")
        export_axolotl(folder / name, folder / "axolotl.yaml", quantization="none")

    return read


def _scan(folder: Path) -> None:
    scan_weights(str(folder), jobs=1, device="cpu", score=("linear", "embedding", "head", "norm")).save(
        folder / "report.json"
    )


def _merge(folder: Path) -> None:
    adapter = folder / "adapter"
    scan_weights(str(adapter), "last")
    export_lora(adapter, folder / "lora")
    merge_into_base(adapter, folder / "base", folder / "merged", force=True)


def _load(folder: Path) -> None:
    """As `evaluate`, `probe` and `generate` do: load, judge some tokens, write on."""
    from spectrum_peft.train.fitting import fitting
    from spectrum_peft.train.judge import judge_causal_lm
    from spectrum_peft.tuner.loading import load_trained

    model, _ = load_trained(str(folder / "adapter"), dtype="float32")
    ids = torch.arange(6)[None]
    judge_causal_lm(model, [{"input_ids": ids, "labels": ids}])
    with torch.no_grad(), fitting(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


_CHAT = [{"role": "user", "content": "a \u00e9"}, {"role": "assistant", "content": "it"}]
_ROWS_OF = {
    "causal_lm": [{"text": "a b </s>"}, {"prompt": "a", "completion": "b"}, {"messages": _CHAT}],
    "seq2seq": [{"prompt": "a", "completion": "b"}],
    "classification": [{"text": "a b", "label": "x"}],
    "token_classification": [{"tokens": ["a", "bc"], "tags": ["x", "y"]}],
    "dpo": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
}


def _tokenize(folder: Path) -> None:
    """As `train` prepares rows, `probe` draws them, `evaluate` and `chat` ask for an answer; raises the last refusal."""
    from datasets import Dataset

    from spectrum_peft.data import show_rows
    from spectrum_peft.errors import SpectrumError
    from spectrum_peft.probe import calibration_batches
    from spectrum_peft.train.encoding import DataChoices
    from spectrum_peft.train.generation import complete, prompts_of
    from spectrum_peft.train.preview import Cut
    from spectrum_peft.train.talk import prompt_for
    from spectrum_peft.train.tasks import TASKS, limit_of
    from spectrum_peft.tuner.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "base"))
    if tokenizer is None:
        return

    def rows_of(task: str, row: dict[str, Any]) -> None:
        limit = limit_of(tokenizer, None)
        rows = TASKS[task].encode(Dataset.from_list([row]), tokenizer, limit, ["x", "y"], DataChoices())
        show_rows((TASKS[task].pieces(row, tokenizer, ["x", "y"]) for row in rows), tokenizer, Cut(limit))

    works: list[Callable[[], Any]] = [partial(rows_of, task, row) for task, rows in _ROWS_OF.items() for row in rows]
    works += [
        lambda: calibration_batches(_ROWS_OF["causal_lm"][:1], tokenizer, 1, batch_size=1),
        lambda: prompts_of(Dataset.from_list([{"messages": _CHAT}]), tokenizer, "rows"),
        lambda: prompt_for(tokenizer, _CHAT[:1], "base"),
        lambda: complete(_language_model(), tokenizer, ["a", "bc"], max_new_tokens=2),
    ]
    refused: SpectrumError | None = None
    for work in works:
        try:
            work()
        except SpectrumError as error:
            refused = error
    if refused is not None:
        raise refused


@cache
def _language_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, "vocab_size": 264})).eval()


def _write(folder: Path) -> None:
    """As `generate`: load what lies there, write on from a text."""
    from spectrum_peft.train.saved import Saved
    from spectrum_peft.train.talk import write
    from spectrum_peft.tuner.loading import load_trained

    model, tokenizer = load_trained(str(folder / "base"), dtype="float32")
    saved = Saved(model, tokenizer, None, model.config, None, None, ())  # type: ignore[arg-type]
    write(saved, "!#", lambda text: None, templated=False, max_new_tokens=2)


def _copy_beside(folder: Path) -> None:
    """What `merge` and `export` copy of a tokenizer, they copy whole or not at all."""
    _merge(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copied, source = (folder / place / name for place in ("merged", "adapter"))
        assert copied.read_bytes() == source.read_bytes()


def _read_train(folder: Path) -> None:
    from spectrum_peft.arguments import set_defaults_from
    from spectrum_peft.cli.options import given_plan_options
    from spectrum_peft.plan import check_options

    parser = TRAIN.parser()
    found = take_config(["--config", str(folder / "train.yaml")])
    assert found is not None
    set_defaults_from(parser, *found)
    check_options(**given_plan_options(parser.parse_known_args([])[0]))


def _read_compare(folder: Path) -> None:
    from spectrum_peft.compare.matrix import contestants_of
    from spectrum_peft.compare.settings import KEYS

    found = take_config(["--config", str(folder / "compare.yaml")])
    assert found is not None
    given = {k: v for k, v in found[1].items() if k in KEYS}
    train = {k: v for k, v in found[1].items() if k not in KEYS}
    comparison = read_comparison(given, train=train, arguments=(), task="causal_lm", output=folder, source=found[0])
    contestants_of(comparison)
    COMPARE.parser()


def _read_rows(name: str, task: str) -> Read:
    def read(folder: Path) -> None:
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        rows = select_columns(read_dataset(str(folder / name)), task, name)
        assert len(rows[: len(rows)]) > 0

    return read


def _scan_beside_cache(folder: Path) -> None:
    cache = os.environ["SPECTRUM_PEFT_CACHE"]
    os.environ["SPECTRUM_PEFT_CACHE"] = str(folder / "cache")
    try:
        for name, place in json.loads((folder / "places.json").read_text()).items():
            shutil.copyfile(folder / name, folder / place)
        scan_weights(str(folder), jobs=1, device="cpu", cache=True)
    finally:
        os.environ["SPECTRUM_PEFT_CACHE"] = cache


def _resume(folder: Path) -> None:
    assert checkpoint_to_resume("true", str(folder)) in {str(folder / "checkpoint-2"), str(folder / "checkpoint-4")}


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WRITTEN_WITH = ("generation_config.json", "tokenizer_config.json", "preprocessor_config.json")
READERS = {
    r.name: r
    for r in (
        Reader("report", "report.json", _report, _read_report, json.loads),
        Reader("gradients", "gradients.json", _gradients, _read_gradients, json.loads, cost=0.01),
        Reader("plan, JSON", "plan.json", _plan, _read_plan("plan.json"), json.loads, cost=0.02),
        Reader("plan, YAML", "plan.yaml", _plan, _read_plan("plan.yaml"), yaml.safe_load, _yaml, cost=0.03),
        Reader("memory report", "memory.json", _memory, lambda f: MemoryReport.load(f / "memory.json"), json.loads),
        Reader("safetensors", "model.safetensors", _checkpoint, _scan, header_of, with_header, cost=0.01),
        Reader("config", "config.json", _checkpoint, _scan, json.loads, cost=0.01, more=FIELDS),
        Reader("quantized tensors", "model.safetensors", _quantized, _scan, header_of, with_header, cost=0.05),
        Reader("index", "model.safetensors.index.json", _shards, _scan, json.loads, cost=0.01),
        Reader("GGUF", "model.gguf", _gguf, lambda f: scan_weights(str(f / "model.gguf"), jobs=1, device="cpu"), cost=0.01),
        Reader("adapter's config, merged", "adapter/adapter_config.json", _adapter, _merge, json.loads, cost=0.02),
        Reader("adapter's tensors, merged", "adapter/adapter_model.safetensors", _adapter, _merge, header_of, with_header, cost=0.02),  # noqa: E501
        Reader("adapter of ours, merged", "adapter/adapter_config.json", _own_adapter, _merge, json.loads, cost=0.02),
        Reader("plan beside a LoRA, merged", f"adapter/{BESIDE_FILE}", _plain_adapter, _merge, json.loads, cost=0.02),
        Reader("base's config, merged", "base/config.json", _adapter, _merge, json.loads, cost=0.02),
        Reader("adapter's config, loaded", "adapter/adapter_config.json", _adapter, _load, json.loads, cost=0.1, weight=4),
        Reader("adapter's tensors, loaded", "adapter/adapter_model.safetensors", _adapter, _load, header_of, with_header, cost=0.1, weight=4),  # noqa: E501
        Reader("adapter of ours, loaded", "adapter/adapter_config.json", _own_adapter, _load, json.loads, cost=0.1, weight=4),
        Reader("plan beside a LoRA, loaded", f"adapter/{BESIDE_FILE}", _plain_adapter, _load, json.loads, cost=0.1, weight=4),
        Reader("base's config, loaded", "base/config.json", _adapter, _load, json.loads, cost=0.1, weight=4, more=FIELDS),
        Reader("adapter's tokenizer, loaded", "adapter/tokenizer.json", _adapter, _load, json.loads, cost=0.1, weight=2),
        Reader("train config", "train.yaml", _train_config, _read_train, yaml.safe_load, _yaml, cost=0.01),
        Reader("compare config", "compare.yaml", _compare_config, _read_compare, yaml.safe_load, _yaml, cost=0.01),
        Reader("cell", "cell.json", _cell, read_cell, json.loads),
        Reader("cell's settings", "train.yaml", _cell, read_cell, yaml.safe_load, _yaml),
        Reader("rows, JSON lines", "rows.jsonl", _rows, _read_rows("rows.jsonl", "causal_lm"), cost=0.1),
        Reader("rows, JSON", "rows.json", _rows, _read_rows("rows.json", "classification"), json.loads, cost=0.1),
        Reader("rows, CSV", "rows.csv", _rows, _read_rows("rows.csv", "seq2seq"), cost=0.1),
        Reader("kept scan", "kept.json", _kept, _scan_beside_cache, json.loads, cost=0.02),
        Reader("stopped scan", "stopped.jsonl", _kept, _scan_beside_cache, cost=0.02),
        Reader("trainer state", "checkpoint-4/trainer_state.json", _resumable, _resume, json.loads),
        Reader("optimizer state", "checkpoint-4/optimizer.pt", _resumable, _resume),
        Reader("checkpoint's weights", "checkpoint-4/model.safetensors", _resumable, _resume, header_of, with_header),
        *(Reader(f"tokenizer, {file}", f"base/{file}", _tokenized, _tokenize, json.loads, cost=0.04 if file == "tokenizer.json" else 0.06, more=FIELDS) for file in _TOKENIZER),  # noqa: E501
        Reader("chat template", "base/chat_template.jinja", _tokenized, _tokenize, cost=0.04, more=TEMPLATES),
        *(Reader(f"written with, {file}", f"base/{file}", _tokenized, _write, json.loads, cost=0.1, more=FIELDS) for file in _WRITTEN_WITH),  # noqa: E501
        Reader("tokenizer, merged", "adapter/tokenizer.json", _tokenized, _copy_beside, json.loads, cost=0.05, more=FIELDS),
    )
}  # fmt: skip
