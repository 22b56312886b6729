"""Checkpoints that are quantized by others are scanned as the dense ones that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantizing
import torch
import transformers
from quantizing import FORMATS, LLAMA, both, saved
from running import LIBRARIES
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrum_peft import scan_weights
from spectrum_peft.errors import CheckpointError
from spectrum_peft.weights import open_weights
from spectrum_peft.weights.shards import LocalShards

pytestmark = LIBRARIES


def assert_alike(quantized: Path, dense: Path) -> None:
    """The same tensors and values, and the same scan; float32 products of the same two numbers are equal to the bit."""
    mine, other = open_weights(quantized), open_weights(dense)
    assert [(t.name, t.shape, t.role) for t in sorted(mine.tensors(), key=lambda t: t.name)] == [
        (t.name, t.shape, t.role) for t in sorted(other.tensors(), key=lambda t: t.name)
    ]
    for info in mine.tensors():
        assert torch.equal(mine.read(info.name).float(), other.read(info.name)), info.name
    assert mine.fingerprint().structure == other.fingerprint().structure
    assert scan_weights(quantized).scores == scan_weights(dense).scores


@pytest.mark.parametrize("form", FORMATS)
def test_a_scan_is_that_of_the_dense_checkpoint(form: str, tmp_path: Path) -> None:
    settings, quantize, words = FORMATS[form]
    saved(transformers.LlamaForCausalLM, LLAMA, tmp_path / "base")
    quantized, dense = both(tmp_path / "base", tmp_path, quantize, settings, "_proj.weight")
    assert_alike(quantized, dense)
    (note,) = scan_weights(quantized).notes
    assert note.startswith(f"7 of 12 tensors are stored {words}")


def test_blocks_need_not_be_full_and_a_lone_file_has_only_its_shapes(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    matrix = torch.randn(40, 72)
    stored, dense = quantizing.float8_blocks(name.removesuffix(".weight"), matrix)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}})
    )
    save_file(stored, tmp_path / "model.safetensors")
    assert torch.equal(open_weights(tmp_path).read(name), dense)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"up_proj.weight: has the shape \(40, 72\) .* weight_block_size"):
        open_weights(tmp_path)


@pytest.mark.parametrize("by", ["blocks of float8 e4m3", "GPTQ of 4 bits"])
def test_experts_that_transformers_fuses_are_dequantized_one_by_one(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    saved(transformers.Qwen3MoeForCausalLM, config, tmp_path / "base")
    settings, quantize, _ = FORMATS[by]
    quantized, dense = both(tmp_path / "base", tmp_path, quantize, settings, r"experts\.\d+\.")
    assert_alike(quantized, dense)
    assert reading(quantized, "model.layers.0.mlp.experts.down_proj[2]", monkeypatch) < (64 * 32) * 1.5


def reading(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that are read for one tensor."""
    weights = open_weights(folder)
    sizes: list[int] = []
    plain = LocalShards.read

    def counted(self: LocalShards, path: Path, begin: int, end: int) -> Tensor:
        sizes.append(end - begin)
        return plain(self, path, begin, end)

    monkeypatch.setattr(LocalShards, "read", counted)
    weights.read(name)
    return sum(sizes)


def test_the_experts_of_gpt_oss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over numbers, against transformers' own function, and against the model that transformers loads."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    saved(transformers.GptOssForCausalLM, transformers.GptOssConfig(**quantizing.GPT_OSS), tmp_path / "base")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    quantized, dense = both(tmp_path / "base", tmp_path, quantizing.mxfp4, settings, r"experts\.(gate_up|down)_proj$")
    assert_alike(quantized, dense)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(quantized / "model.safetensors")
    theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(open_weights(quantized).read(f"{name}[2]").float(), theirs[2])
    model = transformers.GptOssForCausalLM.from_pretrained(
        quantized, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    assert torch.equal(model.get_parameter(name), theirs)
    assert reading(quantized, f"{name}[1]", monkeypatch) == 64 * (64 // 2 + 64 // 32)
    assert "in MXFP4, blocks of 32" in scan_weights(quantized).notes[0]


def test_float8_is_what_transformers_loads(tmp_path: Path) -> None:
    saved(transformers.LlamaForCausalLM, LLAMA, tmp_path / "base")
    settings, quantize, _ = FORMATS["blocks of float8 e4m3"]
    quantized, _ = both(tmp_path / "base", tmp_path, quantize, settings, "_proj.weight")
    model = transformers.LlamaForCausalLM.from_pretrained(
        quantized, dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    mine = open_weights(quantized)
    for name, parameter in model.named_parameters():
        assert torch.equal(mine.read(name), parameter), name
    assert open_weights(model).fingerprint() == mine.fingerprint().__class__(
        mine.fingerprint().structure, mine.fingerprint().content, "live"
    )


def test_fused_float8_and_pairs_of_four_bits() -> None:
    """3-D float8 with scales by expert; DeepSeek-V4's experts, two numbers of four bits in a byte called int8."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    from spectrum_peft.weights.unpacking import block_of, e2m1, scaled

    theirs = Fp8Dequantize(None)._dequantize_one
    values = torch.randn(3, 32, 48).to(torch.float8_e4m3fn)
    by_expert = torch.rand(3)
    block = block_of(values.shape, by_expert.shape)
    assert block is not None
    assert torch.equal(scaled(values, by_expert, block), values.float() * by_expert[:, None, None])
    assert block_of((32, 48), (3, 2, 3)) is block_of((32,), (2,)) is block_of(values.shape, (2, 2, 3)) is None
    for scale in (torch.rand(3, 2, 3), torch.rand(3, 1, 1), torch.rand(3, 32, 1)):
        block = block_of(values.shape, scale.shape)
        assert block is not None
        assert torch.equal(scaled(values, scale, block), theirs(values, scale, torch.float32))
    pairs = torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    scale = torch.randint(120, 130, (8, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert torch.equal(scaled(e2m1(pairs), scale, (1, 32)), theirs(pairs, scale, torch.float32))


def test_the_same_numbers_as_from_transformers_own_unpacking_of_pairs() -> None:
    """Numbers of four bits as compressed-tensors and modelopt pack them are packed as gpt-oss's experts are."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, dense = quantizing.float4("m", torch.randn(8, 64), of=32)
    blocks, scales = stored["m.weight_packed"].reshape(1, 8, 2, 16), stored["m.weight_scale"].reshape(1, 8, 2)
    assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"m.weight_scale": t["m.weight_scale"][:, :-1].clone()}), r"is U8 \(8, 32\) and .* \(8, 3\)"),
        (lambda t: t.pop("m.weight_scale"), "m.weight_scale missing, wanted NVFP4"),
        (lambda t: t.pop("m.weight_global_scale"), "F8_E4M3 .* wanted NVFP4 .* or MXFP4"),
    ],
)  # fmt: skip
def test_numbers_of_four_bits_without_what_belongs_to_them_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    tensors, _ = quantizing.float4("m", torch.randn(8, 64))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"m.qzeros": t["m.qzeros"][:, :-1].clone()}),
            r"m.qweight: has the shape \(8, 32\), qzeros \(4, 3\)",
        ),
        (lambda t: t.pop("m.scales"), "m.qweight: has no qzeros beside it|m.qweight: has no scales beside it"),
        (lambda t: t.update({"m.g_idx": t["m.g_idx"] + 9}), "m.g_idx: names groups that m.weight has no scales for"),
        (lambda t: t.update({"m.weight": torch.randn(2, 2)}), "tensor 'm.weight' is there twice"),
        (
            lambda t: t.update({"n.B": torch.zeros(4, 4, dtype=torch.int32)}),
            r"tensor 'n.B' is I32 \(4, 4\) .* by 'gptq'",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    tensors, _ = quantizing.gptq("m", torch.randn(32, 64))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path).read("m.weight")


def test_a_conv1d_that_gptq_has_turned_scores_as_it_did(tmp_path: Path) -> None:
    """GPTQ holds (out, in) of every layer; the norms of rows and of columns differ."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
    saved(transformers.GPT2LMHeadModel, config, tmp_path / "base")

    def quantize(module: str, matrix: Tensor) -> quantizing.Quantized:
        stored, dense = quantizing.gptq(module, matrix.T)
        return stored, dense.T.contiguous()

    settings = {"quant_method": "gptq", "bits": 4}
    quantized, dense = both(tmp_path / "base", tmp_path, quantize, settings, r"c_(attn|proj|fc).weight")
    # A float32 sum over a transposed view takes the numbers in another order.
    assert scan_weights(quantized, "row_norm").scores == pytest.approx(scan_weights(dense, "row_norm").scores, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1, 1), (3, 2, 3)])
def test_an_expert_of_fused_float8_is_read_with_its_own_scales(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values, scale = torch.randn(3, 32, 48).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    save_file({name: values, f"{name}_scale_inv": scale}, tmp_path / "x.safetensors")
    weights = open_weights(tmp_path / "x.safetensors")
    whole = weights.read(name)
    spread = scale
    if len(shape) == 3:
        spread = scale.repeat_interleave(32 // shape[1], 1).repeat_interleave(48 // shape[2], 2)
    elif shape == (3,):
        spread = scale[:, None, None]
    assert torch.equal(whole, values.float() * spread)
    for e in range(3):
        assert torch.equal(weights.read(f"{name}[{e}]"), whole[e])


def test_a_live_model_that_keeps_float8_scans_as_its_folder(tmp_path: Path) -> None:
    """As transformers leaves it on a GPU with float8 products: layers with float8 weights and their scales."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    saved(transformers.LlamaForCausalLM, LLAMA, tmp_path / "base")
    settings, quantize, _ = FORMATS["blocks of float8 e4m3"]
    quantized, dense = both(tmp_path / "base", tmp_path, quantize, settings, "_proj.weight")
    model = transformers.LlamaForCausalLM(LLAMA)
    config = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    model = replace_with_fp8_linear(model, ["lm_head"], config, pre_quantized=True)
    model.load_state_dict(load_file(quantized / "model.safetensors"), assign=True)
    live, other = open_weights(model), open_weights(dense)
    assert {t.name for t in live.tensors()} == {t.name for t in other.tensors()}
    assert all(torch.equal(live.read(t.name), other.read(t.name)) for t in other.tensors())
    assert scan_weights(model).scores == scan_weights(dense).scores
    assert any("7 float8_e4m3fn weights were dequantized one matrix at a time" in note for note in live.notes)
