"""Where weights come from: files, live models, 4-bit and 8-bit, GGUF; and what is refused before anything is read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectrum_peft import names, weights
from spectrum_peft.errors import CheckpointError
from spectrum_peft.weights import FileWeights, LiveWeights, find_shards, open_weights, read_header


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_tensors(blocks: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
        "input_layernorm": (8,),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.randn(20, 8, generator=generator)}
    for block in range(blocks):
        for part, shape in shapes.items():
            tensors[f"model.layers.{block}.{part}.weight"] = torch.randn(shape, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


# --- files and live models say the same ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            ARCHITECTURES[family].build().save_pretrained(made[family])
        return made[family]

    return folder


def loaded(family: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, ARCHITECTURES[family].auto_class).from_pretrained(folder)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_and_the_model_loaded_from_it_say_the_same(family: str, saved: Callable[[str], Path]) -> None:
    folder = saved(family)
    model = loaded(family, folder)
    file, live = open_weights(folder), open_weights(model)
    assert isinstance(file, FileWeights)
    assert isinstance(live, LiveWeights)
    in_file, in_memory = {t.name: t for t in file.tensors()}, {t.name: t for t in live.tensors()}
    assert in_file == in_memory
    for name, info in in_file.items():
        assert same(file.read(name), live.read(name)), name
        assert file.read(name).shape == info.shape
        if info.experts:
            assert same(file.read(f"{name}[1]"), live.read(name)[1]), name
            assert same(live.read(f"{name}[1]"), live.read(name)[1]), name
    assert {frozenset(g) for g in file.tied} == {frozenset(g) for g in live.tied}
    assert file.fingerprint() == dataclasses.replace(live.fingerprint(), source="file")
    assert file.fingerprint().content is not None


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_structure_does_not_see_the_head(family: str, saved: Callable[[str], Path]) -> None:
    import transformers

    body = transformers.AutoModel.from_pretrained(saved(family))
    assert open_weights(body).fingerprint().structure == open_weights(saved(family)).fingerprint().structure


def test_conv1d_is_known_from_the_config(saved: Callable[[str], Path]) -> None:
    gpt2 = {t.name: t for t in open_weights(saved("gpt2")).tensors()}
    assert gpt2["transformer.h.0.attn.c_attn.weight"].transposed
    assert gpt2["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)  # (in, out), as stored
    assert not gpt2["transformer.wte.weight"].transposed
    assert not any(t.transposed for t in open_weights(saved("llama")).tensors())


def test_a_model_in_memory_is_read_in_place(saved: Callable[[str], Path]) -> None:
    model = loaded("llama", saved("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert open_weights(model).read(name).data_ptr() == model.get_parameter(name).data_ptr()


def test_a_meta_model_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    source = open_weights(model)
    assert source.tensors()[0].shape == (4, 4)
    for touch in (lambda: source.read("0.weight"), source.identity):
        with pytest.raises(CheckpointError, match=r"0\.weight: lies on the meta device"):
            touch()


def test_an_unknown_name_shows_near_ones(saved: Callable[[str], Path]) -> None:
    for source in (open_weights(saved("mixtral")), open_weights(loaded("mixtral", saved("mixtral")))):
        with pytest.raises(CheckpointError, match=r"no (tensor|parameter) .*Did you mean 'model\.layers\.0\.self_attn"):
            source.read("model.layers.0.self_attn.qproj.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.mlp\.experts\.down_proj\[4\]'"):
        open_weights(saved("mixtral")).read("model.layers.0.mlp.experts.down_proj[4]")


# --- what stands in old files ----------------------------------------------------------------------------------------


def test_experts_are_fused_as_transformers_fuses_them(saved: Callable[[str], Path]) -> None:
    """The file holds `block_sparse_moe.experts.1.w1.weight`; the live model's name and rows are presented."""
    folder = saved("mixtral")
    stored = load_file(folder / "model.safetensors")
    w1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert w1 in stored, "transformers stores Mixtral's experts one by one; if not, this test sees nothing"
    gate_up = open_weights(folder).read("model.layers.0.mlp.experts.gate_up_proj[1]")
    assert same(gate_up, torch.cat([stored[w1], stored[w1.replace("w1", "w3")]]))
    down = open_weights(folder).read("model.layers.0.mlp.experts.down_proj[1]")
    assert same(down, stored[w1.replace("w1", "w2")])


def moe_tensors(experts: int = 3) -> dict[str, Tensor]:
    tensors = llama_tensors(1)
    for e in range(experts):
        for part, shape in {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}.items():
            tensors[f"model.layers.0.mlp.experts.{e}.{part}.weight"] = torch.full(shape, float(e))
    return tensors


def test_fused_experts_are_one_parameter_in_the_structure(tmp_path: Path) -> None:
    apart = moe_tensors()
    together = {n: t for n, t in apart.items() if ".experts." not in n}
    owner = "model.layers.0.mlp.experts"
    for live, parts in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        rows = [torch.cat([apart[f"{owner}.{e}.{part}.weight"] for part in parts]) for e in range(3)]
        together[f"{owner}.{live}"] = torch.stack(rows)
    one, other = open_weights(written(tmp_path / "a", apart)), open_weights(written(tmp_path / "b", together))
    assert {t.name: t for t in one.tensors()} == {t.name: t for t in other.tensors()}
    assert one.fingerprint().structure == other.fingerprint().structure
    assert same(one.read(f"{owner}.gate_up_proj[2]"), other.read(f"{owner}.gate_up_proj[2]"))
    assert same(one.read(f"{owner}.gate_up_proj"), other.read(f"{owner}.gate_up_proj"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"), r"experts\.1\.up_proj\.weight: not in the"),
        (
            lambda t: [t.pop(n) for n in list(t) if ".experts.1." in n],
            r"model\.layers\.0\.mlp\.experts: experts are numbered \[0, 2\], wanted 0 to 1",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.1.down_proj.weight": torch.zeros(8, 5)}),
            r"experts\.\*\.down_proj: the experts have the shapes \[\(8, 5\), \(8, 6\)\]",
        ),
    ],
)
def test_incomplete_experts_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    tensors = moe_tensors()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        open_weights(written(tmp_path, tensors))


def test_buffers_and_integers_are_no_parameters(tmp_path: Path) -> None:
    tensors = llama_tensors(1) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.ones(()),
        "embeddings.position_ids": torch.arange(4),
    }
    assert {t.name for t in open_weights(written(tmp_path, tensors)).tensors()} == set(llama_tensors(1))


def test_old_names_become_those_of_the_live_model(tmp_path: Path) -> None:
    tensors = {
        "embed_out.weight": torch.ones(9, 4),
        "bert.encoder.layer.0.output.LayerNorm.gamma": torch.ones(4),
        "bert.encoder.layer.0.output.LayerNorm.beta": torch.ones(4),
    }
    assert [t.name for t in open_weights(written(tmp_path, tensors)).tensors()] == [
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, False, (("model.embed_tokens.weight", "lm_head.weight"),)),
        ({"architectures": ["LlamaForCausalLM"]}, True, ()),
        (
            {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
            True,
            (("model.embed_tokens.weight", "lm_head.weight"),),
        ),
        ({"architectures": ["LlamaModel"]}, False, ()),
        ({}, False, ()),
    ],
)
def test_a_head_that_is_not_stored_is_tied(
    tmp_path: Path, config: dict[str, Any], head: bool, tied: tuple[tuple[str, ...], ...]
) -> None:
    tensors = llama_tensors(1) | ({"lm_head.weight": torch.ones(20, 8)} if head else {})
    assert open_weights(written(tmp_path, tensors, config)).tied == tied


def test_a_table_is_an_embedding_also_where_the_model_names_the_tied_head_first(tmp_path: Path) -> None:
    config = transformers.XLMRobertaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(tmp_path)
    model = transformers.XLMRobertaForMaskedLM.from_pretrained(tmp_path)
    assert next(iter(dict(model.named_parameters()))).startswith("lm_head")
    roles = [Counter(t.role for t in open_weights(source).tensors()) for source in (tmp_path, model)]
    assert roles[0] == roles[1]


@pytest.mark.parametrize("method", ["hqq", "aqlm"])
def test_other_quantizations_are_refused_by_name(tmp_path: Path, method: str) -> None:
    written(tmp_path, llama_tensors(1), {"quantization_config": {"quant_method": method}})
    with pytest.raises(
        CheckpointError, match=f"quantized by '{method}', wanted float weights or one of bitsandbytes, fp8"
    ):
        open_weights(tmp_path)


# --- headers ---------------------------------------------------------------------------------------------------------


def test_a_header_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).reshape(2, 3), "b": torch.randn(5, 7).to(torch.bfloat16),
        "c": torch.zeros(0, 4), "d": torch.tensor(3.0), "e": torch.ones(3, dtype=torch.bool),
        "f": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    path = written(tmp_path, tensors) / "model.safetensors"
    header = read_header(path)
    assert {name: span.shape for name, span in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, span in header.items():
        raw = weights.read_bytes(path, span.begin, span.end)
        assert torch.equal(raw, tensors[name].contiguous().reshape(-1).view(torch.uint8)), name
    begins = [span.begin for span in header.values()]
    assert begins == sorted(begins)


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"abc", "not a safetensors file, or truncated"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file, or truncated"),
        (raw({}, length=10**9), "ask for a header of 1000000000 bytes"),
        (raw(b"not json"), "its header: not JSON"),
        (raw(b"[1, 2]"), "its header is a list"),
        (raw({"a": entry("F32", [2], 0, 8)}, bytes(4)), r"tensor 'a': ends at byte \d+, the file has \d+: it is trunc"),
        (raw({"a": entry("F32", [2], 0, 4)}, bytes(4)), r"tensor 'a': offsets \[0, 4\] hold 4 bytes, wanted 8"),
        (raw({"a": entry("F33", [1], 0, 4)}, bytes(4)), "tensor 'a': dtype is 'F33'"),
        (
            raw({"a": entry("F32", [-1], 0, 4)}, bytes(4)),
            r"tensor 'a': shape\[0\] is -1, wanted a whole number of at least 0",
        ),
        (raw({"a": entry("F32", [1], -4, 0)}, bytes(4)), "wanted a whole number of at least 0"),
        (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "tensor 'a': field 'data_offsets' is missing"),
        (
            raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, bytes(6)),
            "tensor 'b' starts at byte .* it overlaps 'a'",
        ),
        (
            raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
            "tensor 'b' starts at byte .* it leaves a hole after 'a'",
        ),
        (raw({"a": entry("F32", [1], 4, 8)}, bytes(8)), "leaves a hole after the header"),
        (raw({"a": entry("F32", [1], 0, 4)}, bytes(9)), "the tensors end at byte"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(tmp_path)
    assert str(path) in str(caught.value)


def test_the_broken_files_are_broken_in_one_place_only(tmp_path: Path) -> None:
    """The helper that the refusals are made with writes a sound file when nothing is wrong."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"__metadata__": {"format": "pt"}, "a.weight": entry("F32", [1, 2], 0, 8)}, bytes(8)))
    assert [t.name for t in open_weights(path).tensors()] == ["a.weight"]


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, llama_tensors()) / "model.safetensors"
    source = open_weights(path)
    os.truncate(path, path.stat().st_size - 100)
    last = source.tensors()[-1].name
    with pytest.raises(CheckpointError, match="it is truncated"):
        source.read(last)


# --- shards ----------------------------------------------------------------------------------------------------------


def sharded(folder: Path, tensors: dict[str, Tensor], index: bool = True, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_the_same_checkpoint_as_one_file(tmp_path: Path, index: bool) -> None:
    tensors = llama_tensors()
    whole, parts = open_weights(written(tmp_path / "a", tensors)), open_weights(sharded(tmp_path / "b", tensors, index))
    assert {t.name: t for t in whole.tensors()} == {t.name: t for t in parts.tensors()}
    assert all(same(parts.read(name), tensor) for name, tensor in tensors.items())
    assert whole.fingerprint() == parts.fingerprint()
    assert whole.identity() == parts.identity()


def test_a_single_file_is_read_alone(tmp_path: Path) -> None:
    folder = sharded(tmp_path, llama_tensors())
    source = open_weights(folder / "model-00002-of-00003.safetensors")
    assert 0 < len(source.tensors()) < len(llama_tensors())
    assert source.folder is None


def test_one_file_wins_over_stray_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path, llama_tensors())
    written(folder, {"only.weight": torch.ones(2, 2)})
    assert [t.name for t in open_weights(folder).tensors()] == ["only.weight"]


def test_files_without_numbers_make_up_a_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "first.safetensors")
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "second.safetensors")
    assert [t.name for t in open_weights(tmp_path).tensors()] == ["a.weight", "b.weight"]
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "third.safetensors")
    with pytest.raises(CheckpointError, match=r"third\.safetensors: tensor 'a\.weight' is also in first\.safetensors"):
        open_weights(tmp_path)


def test_a_shard_that_the_index_names_but_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path, llama_tensors())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: no such file, but .*index\.json"):
        open_weights(folder)


def test_a_shard_that_the_numbering_asks_for_but_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path, llama_tensors(), index=False)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"of 3 shards number 3 is missing \(have \[1, 2\]\)"):
        open_weights(folder)


def test_a_tensor_that_the_index_names_but_no_shard_holds(tmp_path: Path) -> None:
    folder = sharded(tmp_path, llama_tensors())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lost.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor 'lost\.weight' should be in model-00001-of-00003\.safetensors"):
        open_weights(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "model", llama_tensors())
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="wanted a plain file name in the same folder"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"only pickle files \(pytorch_model\.bin\), which are not read.*save_pretrained"),
        (["model.Q4_K.gguf"], r"give the GGUF file itself: .*model\.Q4_K\.gguf"),
        (["config.json"], "no safetensors file, wanted model"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_has(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        find_shards(tmp_path)


def test_pickles_paths_and_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle files are not read"):
        open_weights(tmp_path / "model.bin")
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere/model.safetensors", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            open_weights(missing)
    with pytest.raises(CheckpointError, match="are a int, wanted a model, a path or a hub id"):
        open_weights(3)
    with pytest.raises(CheckpointError, match="no floating-point"):
        open_weights(written(tmp_path / "ids", {"ids": torch.arange(3)}))


def test_an_adapter_is_no_base_of_an_adapter(tmp_path: Path) -> None:
    for name, base in (("one", None), ("two", str(tmp_path / "one"))):
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": base}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        factors = {f"base_model.model.x.lora_{letter}.weight": torch.ones(1, 1) for letter in "AB"}
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: base_model_name_or_path is empty"):
        open_weights(tmp_path / "one")
    with pytest.raises(CheckpointError, match="one: holds an adapter, wanted a model"):
        open_weights(tmp_path / "two")


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path) -> None:
    """huggingface_hub's own code over a cache of its own layout, offline, in a fresh process."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    written(repository / "snapshots" / commit, llama_tensors(1), {"model_type": "llama"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = (
        "import json, sys; from spectrum_peft.weights import open_weights; s = open_weights('someone/model');"
        "print(json.dumps([s.model_id, s.revision, str(s.folder), len(s.tensors())]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder = str(repository / "snapshots" / commit)
    assert json.loads(run.stdout) == ["someone/model", commit, folder, len(llama_tensors(1))]


def test_a_hub_id_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'nobody/nothing': no such file or folder here, not in the hub's cache"):
        open_weights("nobody/nothing")
    with pytest.raises(CheckpointError, match="what is this: no such file or folder"):
        open_weights("what is this")


# --- identity --------------------------------------------------------------------------------------------------------


def changed_at(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_the_content_covers_both_ends_of_every_tensor(tmp_path: Path) -> None:
    path = written(tmp_path, {"a.weight": torch.ones(300, 300), "b.weight": torch.ones(2)}) / "model.safetensors"
    before = open_weights(path).fingerprint()
    spans = read_header(path)
    for offset in (spans["a.weight"].begin, spans["a.weight"].end - 1, spans["b.weight"].begin + 3):
        changed_at(path, offset)
        after = open_weights(path).fingerprint()
        assert after.content != before.content
        assert after.structure == before.structure
        changed_at(path, offset)
    assert open_weights(path).fingerprint() == before
    changed_at(path, (spans["a.weight"].begin + spans["a.weight"].end) // 2)  # 64 KiB of either end are sampled
    assert open_weights(path).fingerprint() == before


def test_the_structure_is_of_names_and_shapes_of_matrices_in_blocks(tmp_path: Path) -> None:
    base = open_weights(written(tmp_path / "a", llama_tensors())).fingerprint().structure
    cast = llama_tensors(dtype=torch.bfloat16)
    prefixed = {name.removeprefix("model."): t for name, t in llama_tensors().items()}
    vocabulary = llama_tensors() | {"model.embed_tokens.weight": torch.ones(30, 8)}
    for i, alike in enumerate((cast, prefixed, vocabulary)):
        assert open_weights(written(tmp_path / f"alike{i}", alike)).fingerprint().structure == base
    deeper = llama_tensors(3)
    wider = llama_tensors() | {"model.layers.0.mlp.up_proj.weight": torch.ones(13, 8)}
    for i, other in enumerate((deeper, wider)):
        assert open_weights(written(tmp_path / f"other{i}", other)).fingerprint().structure != base


def test_a_cast_model_is_still_its_checkpoint_and_a_trained_one_is_not(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    content = open_weights(folder).fingerprint().content
    model = loaded("llama", folder)
    identities = {open_weights(model).identity()}
    assert open_weights(model).fingerprint().content == content
    cast = loaded("llama", folder).to(torch.bfloat16)
    assert open_weights(cast).fingerprint().content == content
    identities.add(open_weights(cast).identity())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    trained = open_weights(model)
    assert trained.fingerprint().content is None
    assert trained.fingerprint().structure == open_weights(folder).fingerprint().structure
    assert any("no longer those" in note for note in trained.notes)
    identities.add(trained.identity())
    assert len(identities) == 3


def test_a_model_without_a_folder_has_no_content() -> None:
    source = open_weights(ARCHITECTURES["llama"].build())
    assert source.fingerprint().content is None
    assert (source.model_id, source.folder) == (None, None)


def test_a_model_whose_folder_is_gone_is_still_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("llama"), tmp_path / "copy"))
    model = loaded("llama", folder)
    shutil.rmtree(folder)
    source = open_weights(model)
    assert source.folder is None
    assert source.fingerprint().content is None
    assert source.tensors()


# --- adapters in memory ----------------------------------------------------------------------------------------------

# A product of two low-rank factors that is summed in two orders in float32: some ten roundings of 6e-8, of sums up to about 1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
TARGETS = ["q_proj", "down_proj"]


def with_lora(model: Any, **options: Any) -> Any:
    """A PeftModel whose factors are all random, so that W + dW is not W."""
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": TARGETS, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return peft_model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}, {"use_dora": True}])
def test_a_peft_model_is_read_as_its_merged_weights(saved: Callable[[str], Path], options: dict[str, Any]) -> None:
    folder = saved("llama")
    adapted = with_lora(loaded("llama", folder), **options)
    live, base = open_weights(adapted), open_weights(folder)
    assert {t.name for t in live.tensors()} == {t.name for t in base.tensors()}
    assert live.fingerprint().structure == base.fingerprint().structure
    assert live.fingerprint().content is None
    found = {t.name: live.read(t.name).clone() for t in live.tensors()}
    merged = dict(adapted.merge_and_unload().named_parameters())
    moved = [name for name in found if not torch.equal(found[name], base.read(name))]
    assert sorted(moved) == sorted(n for n in found if any(f".{target}." in n for target in TARGETS))
    for name, weight in found.items():
        torch.testing.assert_close(weight, merged[name].detach(), **ROUNDING)


def test_a_disabled_or_merged_adapter_is_not_added_twice(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    adapted = with_lora(loaded("llama", folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    active = open_weights(adapted).read(name).clone()
    identity = open_weights(adapted).identity()
    with adapted.disable_adapter():
        assert same(open_weights(adapted).read(name), open_weights(folder).read(name))
        assert open_weights(adapted).identity() != identity
    adapted.merge_adapter()
    torch.testing.assert_close(open_weights(adapted).read(name), active, **ROUNDING)


def gpt_oss() -> Any:
    """Its experts are stored as (experts, in, out), the transpose of the others'."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_an_adapter_on_fused_experts_is_read_expert_by_expert(family: str, saved: Callable[[str], Path]) -> None:
    model = gpt_oss() if family == "gpt_oss" else loaded(family, saved(family))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = with_lora(model, target_modules=["q_proj"], target_parameters=targets)
    live = open_weights(adapted)
    units = [f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    found = {f"{name}[{e}]": live.read(f"{name}[{e}]").clone() for name in units for e in range(4)}
    whole = {name: live.read(name).clone() for name in units}
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name in units:
        assert not torch.equal(whole[name], before[name])
        torch.testing.assert_close(whole[name], merged[name].detach(), **ROUNDING)
        for e in range(4):
            torch.testing.assert_close(found[f"{name}[{e}]"], merged[name][e].detach(), **ROUNDING)


def test_a_conv1d_adapter_is_turned(saved: Callable[[str], Path]) -> None:
    adapted = with_lora(loaded("gpt2", saved("gpt2")), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    live = open_weights(adapted)
    found = {n: live.read(f"transformer.h.0.{n}.weight").clone() for n in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}
    merged = adapted.merge_and_unload()
    for name, weight in found.items():
        expected = merged.get_parameter(f"transformer.h.0.{name}.weight").detach()
        torch.testing.assert_close(weight, expected, **ROUNDING)


def test_saved_modules_and_real_weights_stand_for_the_base(saved: Callable[[str], Path]) -> None:
    from peft import get_peft_model

    from spectrum_peft import SpectrumConfig

    folder = saved("llama")
    adapted = with_lora(loaded("llama", folder), modules_to_save=["lm_head"])
    real = get_peft_model(loaded("llama", folder), SpectrumConfig(mode="spectrum", spectrum_ratio=0.5))
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight += 1
        trained = [(n, p) for n, p in real.named_parameters() if p.requires_grad]
        for _, parameter in trained:
            parameter += 1
    head = "lm_head.weight"
    torch.testing.assert_close(open_weights(adapted).read(head), open_weights(folder).read(head) + 1)
    source, base = open_weights(real), open_weights(folder)
    assert {t.name for t in source.tensors()} == {t.name for t in base.tensors()}
    moved = {t.name for t in base.tensors() if not torch.equal(source.read(t.name), base.read(t.name))}
    assert len(moved) == len(trained) > 0
    with real.disable_adapter():
        assert all(torch.equal(open_weights(real).read(name), base.read(name)) for name in moved)


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def quantized(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_model_is_read_from_its_float_folder(kind: str, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    live, base = open_weights(quantized(folder, **QUANTIZATIONS[kind])), open_weights(folder)
    info = {t.name: t for t in live.tensors()}
    assert (info[Q_PROJ].dtype, info[Q_PROJ].shape, info[Q_PROJ].role) == (kind, (64, 64), "linear")
    assert same(live.read(Q_PROJ), base.read(Q_PROJ))
    assert any(f"read from the float checkpoint {folder}" in note for note in live.notes)
    assert live.fingerprint() == dataclasses.replace(base.fingerprint(), source="live")
    assert live.identity() not in (base.identity(), open_weights(loaded("llama", folder)).identity())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_model_without_a_folder_is_dequantized(
    kind: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved("llama"), tmp_path / "copy"))
    model = quantized(folder, **QUANTIZATIONS[kind])
    shutil.rmtree(folder)
    live = open_weights(model)
    assert any("dequantized one matrix at a time" in note for note in live.notes)
    assert live.fingerprint().content is None
    exact, found = open_weights(saved("llama")).read(Q_PROJ), live.read(Q_PROJ)
    assert found.shape == exact.shape
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < (0.02 if kind == "int8" else 0.15)
    # The layer's own product of the identity is what it computes with.
    layer = model.get_submodule(names.module_name(Q_PROJ))
    if kind != "int8":
        with torch.no_grad():
            # The layer's product may be taken in bfloat16 (8 bits, 2^-8), of weights of about 0.1.
            torch.testing.assert_close(layer(torch.eye(64)).T, found.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_checkpoint_is_dequantized_as_its_model(
    kind: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = quantized(saved("llama"), **QUANTIZATIONS[kind])
    model.save_pretrained(tmp_path)
    file = open_weights(tmp_path)
    assert any("dequantized one matrix at a time" in note for note in file.notes)
    assert {t.name for t in file.tensors()} == {t.name for t in open_weights(saved("llama")).tensors()}
    assert file.fingerprint().structure == open_weights(saved("llama")).fingerprint().structure
    model.config._name_or_path = ""  # so that the live model is dequantized too
    live = open_weights(model)
    for info in file.tensors():
        if info.role == "linear":
            assert info.dtype == kind
            torch.testing.assert_close(file.read(info.name), live.read(info.name), rtol=0, atol=0)


def test_an_adapter_on_a_quantized_base_is_added(saved: Callable[[str], Path]) -> None:
    adapted = with_lora(quantized(saved("llama"), **QUANTIZATIONS["nf4"]))
    layer = adapted.get_submodule(f"base_model.model.{names.module_name(Q_PROJ)}")
    expected = open_weights(saved("llama")).read(Q_PROJ) + layer.get_delta_weight("default")
    torch.testing.assert_close(open_weights(adapted).read(Q_PROJ), expected.detach(), **ROUNDING)


# --- GGUF ------------------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, WIDTH = 4, 2, 32


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp keeps q and k: within a head, row i of the first half, then row i of the second."""
    blocks = weight.reshape(heads, -1, weight.shape[1])
    half = blocks.shape[1] // 2
    rows = [blocks[h, part * half + i] for h in range(heads) for i in range(half) for part in (0, 1)]
    return torch.stack(rows)


def gguf_file(path: Path, tensors: dict[str, Tensor], architecture: str = "llama", kind: str = "F32") -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_token_list([f"token {i}" for i in range(50)])  # arrays stand before the tensors and are skipped
    writer.add_array("some.numbers", [1.5, 2.5])
    for name, tensor in tensors.items():
        chosen = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "token_embd.weight": torch.randn(40, WIDTH, generator=generator),
        "blk.0.attn_norm.weight": torch.randn(WIDTH, generator=generator),
        "blk.0.attn_q.weight": torch.randn(WIDTH, WIDTH, generator=generator),
        "blk.0.attn_k.weight": torch.randn(WIDTH // 2, WIDTH, generator=generator),
        "blk.0.ffn_down.weight": torch.randn(WIDTH, 64, generator=generator),
    }


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_gguf_file_is_read_under_the_names_of_transformers(tmp_path: Path, kind: str) -> None:
    import gguf

    stored = gguf_tensors()
    source = open_weights(gguf_file(tmp_path / "m.gguf", stored, kind=kind))
    assert source.kind == "gguf"
    assert source.fingerprint().content is None
    assert source.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert {t.name: (t.shape, t.role, t.dtype) for t in source.tensors()} == {
        "model.embed_tokens.weight": ((40, WIDTH), "embedding", kind.lower()),
        "model.layers.0.input_layernorm.weight": ((WIDTH,), "norm", "f32"),
        "model.layers.0.self_attn.q_proj.weight": ((WIDTH, WIDTH), "linear", kind.lower()),
        "model.layers.0.self_attn.k_proj.weight": ((WIDTH // 2, WIDTH), "linear", kind.lower()),
        "model.layers.0.mlp.down_proj.weight": ((WIDTH, 64), "linear", kind.lower()),
    }
    chosen = gguf.GGMLQuantizationType[kind]
    down = stored["blk.0.ffn_down.weight"].numpy()
    exact = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(down, chosen), chosen).copy())
    assert torch.equal(source.read("model.layers.0.mlp.down_proj.weight").float(), exact)


def test_a_gguf_file_with_a_head_is_not_tied(tmp_path: Path) -> None:
    source = open_weights(gguf_file(tmp_path / "m.gguf", gguf_tensors() | {"output.weight": torch.randn(40, WIDTH)}))
    assert source.tied == ()
    assert {t.name: t.role for t in source.tensors()}["lm_head.weight"] == "head"


def test_the_rows_of_q_and_k_are_put_back(tmp_path: Path) -> None:
    stored = gguf_tensors()
    for architecture, turned in (("llama", True), ("qwen2", False)):
        source = open_weights(gguf_file(tmp_path / f"{architecture}.gguf", stored, architecture))
        for part, live, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)):
            found = source.read(f"model.layers.0.self_attn.{live}.weight")
            kept = interleaved(found, heads) if turned else found
            assert torch.equal(kept, stored[f"blk.0.{part}.weight"])


def test_gguf_experts_are_fused_as_in_the_live_model(tmp_path: Path) -> None:
    experts = {
        f"blk.0.ffn_{part}_exps.weight": torch.randn(3, *shape)
        for part, shape in {"gate": (6, WIDTH), "up": (6, WIDTH), "down": (WIDTH, 64)}.items()
    }
    path = gguf_file(tmp_path / "m.gguf", gguf_tensors() | experts)
    source = open_weights(path)
    owner = "model.layers.0.mlp.experts"
    info = {t.name: t for t in source.tensors()}
    assert info[f"{owner}.gate_up_proj"].shape == (3, 12, WIDTH)
    assert info[f"{owner}.down_proj"].experts == 3
    joined = torch.cat([experts["blk.0.ffn_gate_exps.weight"], experts["blk.0.ffn_up_exps.weight"]], dim=1)
    assert torch.equal(source.read(f"{owner}.gate_up_proj"), joined)
    assert torch.equal(source.read(f"{owner}.gate_up_proj[2]"), joined[2])
    assert torch.equal(source.read(f"{owner}.down_proj[1]"), experts["blk.0.ffn_down_exps.weight"][1])


def test_gemma_norms_lose_the_one_that_llama_cpp_adds(tmp_path: Path) -> None:
    stored = gguf_tensors() | {"blk.0.ffn_norm.weight": torch.ones(WIDTH) * 3}
    source = open_weights(gguf_file(tmp_path / "m.gguf", stored, "gemma2"))
    assert torch.equal(source.read("model.layers.0.pre_feedforward_layernorm.weight"), torch.ones(WIDTH) * 2)
    plain = open_weights(gguf_file(tmp_path / "n.gguf", stored, "llama"))
    assert torch.equal(plain.read("model.layers.0.post_attention_layernorm.weight"), torch.ones(WIDTH) * 3)


def test_a_changed_gguf_file_has_another_identity(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", gguf_tensors())
    before = open_weights(path).identity()
    changed_at(path, path.stat().st_size - 64)
    assert open_weights(path).identity() != before


def test_gguf_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", gguf_tensors())
    whole = path.read_bytes()
    for content, message in (
        (b"", "does not start with 'GGUF'"),
        (b"GGML" + whole[4:], "does not start with 'GGUF'"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "version is 9"),
        (whole[:60], "its header cannot be read"),
        (whole[:-64], "it is truncated"),
    ):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_weights(tmp_path / "broken.gguf")
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'mamba', wanted one of"):
        open_weights(gguf_file(tmp_path / "mamba.gguf", gguf_tensors(), "mamba"))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.what\.weight' has no known name in a llama model"):
        open_weights(gguf_file(tmp_path / "odd.gguf", {"blk.0.what.weight": torch.ones(2, 32)}))


@pytest.mark.slow
def test_a_real_gguf_file_is_read_as_transformers_reads_it() -> None:
    from transformers import AutoModelForCausalLM

    from spectrum_peft import demo

    path = demo.smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    source = open_weights(path)
    assert {t.name for t in source.tensors()} == set(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(source.read(name).float(), parameter.detach()), name
