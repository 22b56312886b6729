"""Files for llama.cpp: transformers reads them back, a LoRA is added up by hand, llama.cpp itself computes with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, dequantize
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spectrum_peft import SpectrumConfig, merge_into_base
from spectrum_peft.cli.main import main
from spectrum_peft.errors import SpectrumError
from spectrum_peft.export import export_gguf

_SIZES = {
    "vocab_size": 270, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_LONG = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),  # the width that transformers takes for granted when it reads one
    "llama3": ("Llama", {"rope_parameters": _LONG}),
}
IDS = torch.arange(65, 145)[None]


def tokenizer() -> Any:
    """Byte-level BPE with a few merges, split as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=266, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<s>", "</s>"]
    )
    made.train_from_iterator(["the rain in Spain stays mainly in the plain"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    for name, (word, fields) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{word}Config")(**_SIZES, **fields)
        model = getattr(transformers, f"{word}ForCausalLM")(config)
        for parameter in model.parameters():  # norms and biases of one and zero would hide where they go
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return root


def opened(folder: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def adapted(folder: Path, out: Path, **options: Any) -> Any:
    """An adapter with factors that matter, saved; the model."""
    config = SpectrumConfig(task_type="CAUSAL_LM", **{"mode": "alors", "spectrum_ratio": 1.0, "r": 8, **options})
    model = get_peft_model(opened(folder), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama3"])
def test_transformers_reads_the_same_model_and_tokenizer(folders: Path, tmp_path: Path, name: str) -> None:
    """Bit for bit: float32 is stored as it is, and the rows of queries and keys come back to their places."""
    export_gguf(folders / name, tmp_path / "model.gguf")
    again = opened(tmp_path, gguf_file="model.gguf")
    if name == "llama_tied":  # its reader knows no biases in this architecture
        again = _with_biases(tmp_path / "model.gguf", again, opened(folders / name))
    assert torch.equal(logits(again), logits(opened(folders / name)))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "the main plan, in Spain: 12 + x\n"
    assert read(text).input_ids == tokenizer()(text).input_ids
    assert len(tokenizer()(text).input_ids) < len(text)


def _with_biases(path: Path, read: Any, model: Any) -> Any:
    """What transformers read, in a model with biases, which come from the file; those of queries and keys turned
    back as llama.cpp turns rows: (heads, d/2, 2) to (heads, 2, d/2)."""
    state = read.state_dict()
    stored = {t.name: torch.from_numpy(np.array(t.data)) for t in GGUFReader(path).tensors}
    for block in range(2):
        for word, leaf, heads in (("q", "q_proj", 4), ("k", "k_proj", 2), ("v", "v_proj", 0), ("output", "o_proj", 0)):
            bias = stored[f"blk.{block}.attn_{word}.bias"]
            turned = bias.reshape(heads, -1, 2).transpose(1, 2).reshape(-1) if heads else bias
            state[f"model.layers.{block}.self_attn.{leaf}.bias"] = turned
    model.load_state_dict(state)
    return model


def test_llama_3s_frequencies_are_those_of_transformers(folders: Path, tmp_path: Path) -> None:
    """llama.cpp divides by what is stored; transformers' function gives the quotients. float32 rounds both once or twice."""
    export_gguf(folders / "llama3", tmp_path / "model.gguf")
    [stored] = [t.data for t in GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight"]
    config = transformers.AutoConfig.from_pretrained(folders / "llama3")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(stored, plain / scaled, rtol=1e-6)
    assert 1 < stored[1] < 8 and stored[0] == 1 and stored[-1] == 8


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types_round_each_value_once(folders: Path, tmp_path: Path, kind: str) -> None:
    """f16 and bf16: half a step in the last of 11 or 8 bits. q8_0: 127 steps to the largest of 32 values, a step kept in f16."""
    export_gguf(folders / "qwen2", tmp_path / "model.gguf", type=kind)
    exact = {n: p.detach().numpy() for n, p in opened(folders / "qwen2").named_parameters()}
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "model.gguf").tensors}
    weight, found = exact["model.layers.1.mlp.up_proj.weight"], stored["blk.1.ffn_up.weight"]
    if kind == "q8_0":
        largest = np.abs(weight.reshape(-1, 32)).max(axis=1, keepdims=True)
        bound = (largest * (0.5 / 127 + 2**-11)).repeat(32, axis=1).reshape(weight.shape)
    else:
        bound = np.abs(weight) * (2**-11 if kind == "f16" else 2**-8) + 2**-25
    assert (np.abs(found - weight) <= bound).all() and not np.array_equal(found, weight)
    np.testing.assert_array_equal(stored["output_norm.weight"], exact["model.norm.weight"])


@pytest.mark.parametrize(
    ("name", "mode"), [("llama", "alors"), ("qwen3", "alors"), ("llama", "columns"), ("mistral", "lorsa")]
)
def test_an_adapter_adds_up_to_the_merged_model(folders: Path, tmp_path: Path, name: str, mode: str) -> None:
    """As llama.cpp adds it, alpha over the tensor's own rank, in the file's own layout. Merging rounds to float32 once."""
    options: dict[str, Any] = {"mode": mode}
    if mode == "lorsa":
        data = [{"input_ids": IDS, "labels": IDS}]
        options |= {"n_components": 4, "svd_rank": 8, "rotation_rank": 2, "calibration_data": data}
    adapted(folders / name, tmp_path / "adapter", **options)
    export_gguf(tmp_path / "adapter", tmp_path / "lora.gguf", modelfile=True, base="tiny")
    merge_into_base(tmp_path / "adapter", folders / name, tmp_path / "merged")
    export_gguf(tmp_path / "merged", tmp_path / "merged.gguf")
    export_gguf(folders / name, tmp_path / "base.gguf")
    reader = GGUFReader(tmp_path / "lora.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
    factors = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
    base, merged = (
        {t.name: np.array(t.data) for t in GGUFReader(tmp_path / f"{f}.gguf").tensors} for f in ("base", "merged")
    )
    changed = set()
    for key, a in factors.items():
        if key.endswith(".lora_a"):
            stored = key.removesuffix(".lora_a")
            b = factors[f"{stored}.lora_b"]
            # Merging computes B A in float32 and rounds W + dW once: some ten units of 2**-24 of entries of order one.
            np.testing.assert_allclose(base[stored] + alpha / b.shape[1] * b @ a, merged[stored], rtol=0, atol=2e-6)
            changed.add(stored)
    assert changed == {key for key in base if not np.array_equal(base[key], merged[key])}
    assert len({factors[f"{key}.lora_a"].shape[0] for key in changed}) > 1 or mode != "alors"
    assert (tmp_path / "Modelfile").read_text() == "FROM tiny\nADAPTER ./lora.gguf\n"


def test_the_command_and_its_modelfile(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folders / "qwen2"), "--format", "gguf", "-o", f"{tmp_path}/m.gguf", "--modelfile"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/m.gguf and {tmp_path}/Modelfile\n"
    assert (tmp_path / "Modelfile").read_text() == "FROM ./m.gguf\n"
    assert GGUFReader(tmp_path / "m.gguf").fields["general.architecture"].contents() == "qwen2"


def _spm(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(fields))


def _family(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "gpt2"}))


def _rope(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(fields))


def _field(file: str, *path: str, value: Any) -> Callable[[Path], None]:
    """Puts a value where the file has another one."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        inner = fields
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        (folder / file).write_text(json.dumps(fields))

    return damage


_TOKENS = "tokenizer.json"


@pytest.mark.parametrize(
    ("damage", "options", "says"),
    [
        (_field(_TOKENS, "added_tokens", value=[{"content": "a"}]), {}, "added_tokens.*field 'id' is missing"),
        (_field(_TOKENS, "added_tokens", value=[{"content": "a", "id": -1}]), {}, r"added_tokens\[0\].id is -1"),
        (_field(_TOKENS, "model", "vocab", "a", value=-1), {}, r"tokenizer.json: model.vocab"),
        (_field(_TOKENS, "model", "vocab", value=[["a", 1]]), {}, r"tokenizer.json: model.vocab is a list"),
        (_field(_TOKENS, "model", "merges", value=5), {}, r"tokenizer.json: model.merges is 5"),
        (_field(_TOKENS, "pre_tokenizer", value=[1]), {}, r"tokenizer.json: pre_tokenizer"),
        (_field(_TOKENS, "post_processor", value=[1]), {}, "its tokenizer files hold what gguf cannot read"),
        (
            _field("tokenizer_config.json", "chat_template", value=[1]),
            {},
            "its tokenizer files hold what gguf cannot read",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("{"),
            {},
            "its tokenizer files hold what gguf cannot read .JSONDecodeError",
        ),
        (_spm, {}, "splits text by a rule for which no name of llama.cpp is known"),
        (_family, {}, "model_type is 'gpt2'; known here are llama, mistral, qwen2, qwen3"),
        (_rope, {}, "rope_type is 'yarn'"),
        (lambda folder: (folder / "tokenizer.json").unlink(), {}, "has no tokenizer.json"),
        (None, {"type": "q4_k"}, "type is 'q4_k'"),
        (None, {"base": "llama3"}, "is what the Modelfile of an adapter starts from"),
    ],
)
def test_what_is_not_known_here_is_refused(
    folders: Path, tmp_path: Path, damage: Any, options: dict[str, Any], says: str
) -> None:
    opened(folders / "llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    if damage is not None:
        damage(tmp_path / "model")
    with pytest.raises(SpectrumError, match=says):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", **options)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("options", [{"train_norms": True}, {"use_dora": True}, {"mode": "spectrum"}])
def test_an_adapter_with_more_than_low_rank_is_to_be_merged(
    folders: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapted(folders / "llama", tmp_path / "adapter", **options)
    with pytest.raises(SpectrumError, match=r"merge it, and export the merged checkpoint"):
        export_gguf(tmp_path / "adapter", tmp_path / "out.gguf")


_LLAMA_CPP = """
import json, sys
import xllamacpp as cpp
p = cpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], 256, 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
if len(sys.argv) > 3:
    p.lora_adapters = [cpp.CommonAdapterLoraInfo(sys.argv[3], 1.0)]
said = cpp.Server(p).handle_completions(
    {"prompt": json.loads(sys.argv[2]), "max_tokens": 1, "logprobs": 20, "temperature": 0.0, "ignore_eos": True})
top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER", json.dumps([said["usage"]["prompt_tokens"], {t["id"]: t["logprob"] for t in top}]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3"])
def test_llama_cpp_computes_the_same(folders: Path, tmp_path: Path, name: str) -> None:
    """Log-probabilities of the next token after 80, without and with an adapter of two ranks. llama.cpp sums in blocks and in
    another order: 1e-3 is some hundred times what was seen, and a hundredth of what a wrong frequency, scale or row does."""
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    model = adapted(folders / name, tmp_path / "adapter")
    export_gguf(folders / name, tmp_path / "base.gguf")
    export_gguf(tmp_path / "adapter", tmp_path / "lora.gguf")
    text = "the rain stays in Spain, and the plain rain in the main stays plain; "
    ids = tokenizer()(text).input_ids
    for lora, of in ((), opened(folders / name)), (("lora.gguf",), model):
        words = [str(tmp_path / "base.gguf"), json.dumps(text), *(str(tmp_path / file) for file in lora)]
        ran = subprocess.run([sys.executable, "-c", _LLAMA_CPP, *words], capture_output=True, text=True)
        [line] = [line for line in ran.stdout.splitlines() if line.startswith("ANSWER")]
        count, found = json.loads(line.removeprefix("ANSWER"))
        with torch.no_grad():
            wanted = of(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert count == len(ids)
        assert max(abs(wanted[int(i)].item() - value) for i, value in found.items()) < 1e-3
    assert isinstance(model, PeftModel)
