"""Shared fixtures: tiny models built from configs, the folder of shared reference data, markers.

Nothing here touches the network. torch and transformers are imported inside fixtures, so that the tests of plain data
run without them.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any import of the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# No test reads or leaves anything in the user's own cache of scans.
os.environ["SPECTRUM_PEFT_CACHE"] = tempfile.mkdtemp(prefix="spectrum_peft_tests_")

import pytest  # noqa: E402 - the environment comes first

if TYPE_CHECKING:
    import torch
    from stand_in_hub import StandIn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from spectrum_peft.records import GradientReport, SnrReport

MARKERS = (
    "slow: needs a real model or more than a few seconds",
    "gpu: needs a CUDA device",
    "multiprocess: starts more than one process",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["SPECTRUM_PEFT_CACHE"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that lies beside the checkout; it is not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"reference data is not there: {folder}")
    return folder


@pytest.fixture
def seeded() -> torch.Generator:
    """A CPU generator with a fixed seed, fresh for each test."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A running stand-in for the hub, empty; huggingface_hub asks it, with a cache of its own and no token."""
    import transformers.utils.hub
    from huggingface_hub import close_session, constants, hf_api
    from stand_in_hub import StandIn

    with StandIn() as server:
        # What variables of the environment set when huggingface_hub is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        where = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", where)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(
            transformers.utils.hub, "_hf_api", None, raising=False
        )  # keeps the address that it saw first
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # peft reads it itself
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("SPECTRUM_PEFT_CACHE", str(tmp_path / "scans"))
        yield server
        close_session()


# --- tiny models -----------------------------------------------------------------------------------------------------
# `<name>_folder` is a saved checkpoint (session-scoped: read it, never write to it); `<name>` is the same model loaded
# anew for each test, float32, in eval mode, to be changed at will.


def _tiny_llama(tied: bool) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7 if tied else 0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
        pad_token_id=256, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _tiny_gpt2() -> PreTrainedModel:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=264, n_embd=64, n_layer=3, n_head=4, n_positions=256,
        pad_token_id=256, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then <pad> 256, <s> 257, </s> 258; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=_CHAT_TEMPLATE
    )


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama, hidden 64, 4 layers, 4 heads over 2 key-value heads, 264 tokens, untied head; with a byte tokenizer."""
    return _saved(_tiny_llama(tied=False), tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_llama_tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_llama_folder` with other values and the head tied to the embeddings."""
    return _saved(_tiny_llama(tied=True), tmp_path_factory.mktemp("tiny_llama_tied"))


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, hidden 64, 3 layers: Conv1D weights are stored transposed, the head is tied."""
    return _saved(_tiny_gpt2(), tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture
def tiny_llama(tiny_llama_folder: Path) -> PreTrainedModel:
    return _loaded(tiny_llama_folder)


@pytest.fixture
def tiny_llama_tied(tiny_llama_tied_folder: Path) -> PreTrainedModel:
    return _loaded(tiny_llama_tied_folder)


@pytest.fixture
def tiny_gpt2(tiny_gpt2_folder: Path) -> PreTrainedModel:
    return _loaded(tiny_gpt2_folder)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


# --- reports without a model -----------------------------------------------------------------------------------------


def _llama_report(
    layers: int = 4, *, seed: int = 0, hidden: int = 64, tied: bool = False, experts: int = 0, order: int | None = None
) -> SnrReport:
    """A report with a Llama's names and shapes, and random scores that differ by kind in scale, as real ones do.

    Args:
        experts: a fused mixture of experts instead of the MLP where above 0, with a router.
        order: seed to shuffle the rows with; None: model order.
    """
    from spectrum_peft import names
    from spectrum_peft.records import Fingerprint, MatrixStat, SnrReport

    random_ = random.Random(seed)
    wide, small = 2 * hidden - 16, hidden // 2
    attention = {"q_proj": (hidden, hidden), "k_proj": (small, hidden), "v_proj": (small, hidden)}
    attention["o_proj"] = (hidden, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (264, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{leaf}.weight": shape for leaf, shape in attention.items()}
        if experts:
            shapes[f"{block}.mlp.gate.weight"] = (experts, hidden)
            for e in range(experts):
                shapes[f"{block}.mlp.experts.gate_up_proj[{e}]"] = (2 * wide, hidden)
                shapes[f"{block}.mlp.experts.down_proj[{e}]"] = (hidden, wide)
        else:
            shapes |= {f"{block}.mlp.{leaf}_proj.weight": (wide, hidden) for leaf in ("gate", "up")}
            shapes[f"{block}.mlp.down_proj.weight"] = (hidden, wide)
        shapes |= {f"{block}.{leaf}.weight": (hidden,) for leaf in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (264, hidden)
    bare = [name.partition("[")[0] for name in shapes]
    kinds = names.kinds(dict.fromkeys(bare))
    stats = []
    for (name, shape), plain in zip(shapes.items(), bare, strict=True):
        role = names.role(plain, (experts, *shape) if "[" in name else shape)
        kind = kinds[plain]
        score = random_.lognormvariate(len(kind) % 5 - 2, 0.7) if role == "linear" else None
        stats.append(
            MatrixStat(name, kind, shape, math.prod(shape), "bfloat16", score, None if score is None else 3, None, role)
        )
    if order is not None:
        random.Random(order).shuffle(stats)
    groups = (("model.embed_tokens.weight", "lm_head.weight"),) if tied else ()
    return SnrReport(tuple(stats), "spectrum", Fingerprint("a" * 64, "b" * 64, "file"), "some/llama", tied=groups)


@pytest.fixture(scope="session")
def llama_report() -> Callable[..., SnrReport]:
    """Makes a report without a model: `llama_report(layers=4, seed=0, tied=False, experts=0, order=None)`."""
    return _llama_report


def _gradients_of(report: SnrReport, seed: int = 0) -> GradientReport:
    """Gradients for a report without a model: the residual side is the one of the embeddings' width; blocks are the more alike
    the nearer they are."""
    from spectrum_peft import names
    from spectrum_peft.records import GradientReport, GradientStat, Similarity

    random_ = random.Random(seed)
    hidden = next(s.shape[1] for s in report.stats if s.role == "embedding" and s.shape)
    linear = sorted((s for s in report.stats if s.role == "linear"), key=lambda s: names.block_index(s.name) or 0)
    stats: list[GradientStat] = []
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for s in linear:
        name = s.name.partition("[")[0]
        assert s.shape is not None
        if all(name != known.name for known in stats):
            mass, few = random_.lognormvariate(-20, 1), random.Random(name)
            values = tuple(sorted((few.lognormvariate(0, 0.5) for _ in range(min(s.shape))), reverse=True))
            importance = tuple(few.lognormvariate(-5, 2) for _ in values)
            stats.append(GradientStat(name, s.kind, s.shape, mass, values, importance))
            if name == s.name:
                alike.setdefault((s.kind, s.shape), []).append(name)
    tables = []
    for (kind, shape), members in alike.items():
        side = names.residual_side(kind, shape, hidden)
        near = tuple(tuple(0.5 ** abs(i - j) for j in range(len(members))) for i in range(len(members)))
        tables.append(Similarity(kind, shape, side, hidden, tuple(members), near, near))
    return GradientReport(tuple(stats), tuple(tables), samples=8, loss=2.0, fingerprint=report.fingerprint)


@pytest.fixture(scope="session")
def gradients_of() -> Callable[..., GradientReport]:
    """Makes the gradients that go with `llama_report`: `gradients_of(report, seed=0)`."""
    return _gradients_of


# --- real models, for tests that are marked slow ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted once a session from its wheel; never write to it."""
    from spectrum_peft.demo import smollm2_folder

    return smollm2_folder()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, a BERT encoder, inside its wheel; read it, never write to it."""
    from spectrum_peft.demo import minilm_folder

    return minilm_folder()
