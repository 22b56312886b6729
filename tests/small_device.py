"""An accelerator that torch knows nothing of but what it is told here: `small`, which holds its tensors on the CPU.

It has no float64 and no eigen- and singular values, as MPS has none, and refuses tensors of another device, as all do. torch
finds it by `torch.accelerator`, like any other. It stays for the life of the process, so tests that want it run a process of
their own: `python tests/small_device.py PART FOLDER`, with what is to be true there as asserts.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

KIND = "small"
ABSENT = ("_linalg_eigh", "_linalg_svd")


class OnSmall(torch.Tensor):
    """A tensor there; `held` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnSmall:
        if held.dtype == torch.float64:
            raise TypeError(f"{KIND} has no float64")
        made: OnSmall = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(KIND, 0)
        )
        return made

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # torch's own copies a storage, of which there is none
        made: Any = OnSmall(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: OnSmall) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation, computed on what is held."""
    name, where = op.overloadpacket.__name__, kwargs.get("device")
    if name in ABSENT:
        raise NotImplementedError(f"{KIND} has no {name}")
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if name in ("copy_", "_copy_from"):
        here, there = args[:2] if name == "copy_" else args[1::-1]
        _held(here).copy_(_held(there))
        return here
    strangers = [t for t in given if not isinstance(t, OnSmall) and t.ndim]
    if strangers and any(isinstance(t, OnSmall) for t in given):
        raise RuntimeError(f"{op}: a tensor on the CPU among those on {KIND}")
    mine = {id(t.held): t for t in given if isinstance(t, OnSmall)}
    found = op(*pytree.tree_map(_held, args), **pytree.tree_map(_held, kwargs))
    for tensor in mine.values():
        if tensor.shape != tensor.held.shape:  # a wrapper keeps the shape that it was made with
            raise RuntimeError(f"{op}: gives a tensor on {KIND} another shape")
    stays = where is None or where.type == KIND

    def outside(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not stays:
            return value
        return mine[id(value)] if id(value) in mine else OnSmall(value)

    return pytree.tree_map(outside, found)


def _made(op: Any, *args: Any, dtype: Any = None, **_: Any) -> OnSmall:
    return OnSmall(op(*args, dtype=dtype))


def _from_values(plain: Any, data: Any, *, device: Any = None, **how: Any) -> torch.Tensor:
    """`torch.tensor`, which on such a device ends in an assertion of torch's own."""
    made: torch.Tensor = plain(data, **how)
    return made if device is None else made.to(device)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, OnSmall) else value


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """`torch.small`."""

    def get_rng_state(self, device: Any = KIND) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = KIND) -> None:
        """Nothing is random there."""


def install() -> torch.device:
    """Let torch have the device."""
    _setup_privateuseone_for_python_backend(KIND, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")  # which torch would make by giving an empty tensor another shape
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        own.impl(name, partial(_made, op), "PrivateUse1")
    _kept.extend((library, own))
    torch.tensor = partial(_from_values, torch.tensor)  # type: ignore[assignment]
    return torch.device(KIND, 0)


_kept: list[Any] = []


# --- what is to be true there ----------------------------------------------------------------------------------------


def basics() -> None:
    from spectrum_peft import devices

    there = torch.device(KIND, 0)
    matrix = torch.randn(6, 4)
    for lacks in (lambda m: m.double(), torch.linalg.eigvalsh, torch.linalg.svdvals):
        try:
            lacks((matrix @ matrix.T).to(there))
        except (TypeError, NotImplementedError):
            continue
        raise AssertionError(f"{KIND} was to lack {lacks}")
    assert devices.default_device().type == KIND == devices.device_named("auto").type
    assert not devices.has_float64(there) and devices.exact(matrix.to(there)).device.type == "cpu"
    assert devices.summed(matrix.to(there), 0).dtype == torch.float64
    assert torch.allclose(devices.summed(matrix.to(there)), matrix.double().sum())
    assert devices.name_of(there) == KIND and not devices.memory_is_measured() and devices.peak_memory() > 0


def scan(folder: Path) -> None:
    """Every criterion, of a matrix for which float32 is enough and of one for which it is not; decompositions; a checkpoint."""
    basics()
    from spectrum_peft.scan import CRITERIA, scan_weights
    from spectrum_peft.scan.criteria import score
    from spectrum_peft.scan.svd import truncated_svd

    one = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    doubtful = torch.diag(torch.tensor([1.0, 1e-6, 1e-7]))
    for name, criterion in CRITERIA.items():
        if not criterion.needs_data:
            for matrix in (one, doubtful):
                here, there = score(matrix, name, name="m"), score(matrix.to(KIND), name, name="m")
                assert here == there, (name, here, there)
    for k in (2, 30):  # by the range finder, and by the Gram matrix
        here, there = truncated_svd(torch.cat([one] * 3, 1), k), truncated_svd(torch.cat([one] * 3, 1).to(KIND), k)
        assert torch.equal(here.values, there.values.cpu())
    from architectures import ARCHITECTURES

    ARCHITECTURES["llama"].build().save_pretrained(folder)
    reports = [scan_weights(folder, device=where, cache=False) for where in ("cpu", KIND)]
    assert reports[0].digest == reports[1].digest


def modes(folder: Path) -> None:
    """Made, trained, moved in rank and merged there; the values are those of the CPU."""
    import copy

    from architectures import ARCHITECTURES
    from peft import get_peft_model
    from running import IDS, logits, options_of

    from spectrum_peft import SpectrumConfig
    from spectrum_peft.plan import MODES
    from spectrum_peft.probe import column_energies, probe_gradients
    from spectrum_peft.tuner.adapter_files import sliced_layers
    from spectrum_peft.tuner.ranks import set_rank

    whole = ARCHITECTURES["llama"].build()
    whole.config.use_cache = False  # whose first tensor is made in a way that a device in Python has not
    for mode in sys.argv[3:] or MODES:
        found = {}
        for where in ("cpu", KIND):
            ids, base = IDS.to(where), copy.deepcopy(whole).to(where)
            options = options_of(mode, [{"input_ids": ids, "labels": ids}])
            if MODES[mode].rescorable:
                options |= {"rescore_every": 1}
            torch.manual_seed(1)
            model = get_peft_model(base, SpectrumConfig(mode=mode, task_type="CAUSAL_LM", **options))
            model.base_model.attended()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            for step in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                for name, layer in sliced_layers(model.base_model, "default").items() if not step else ():
                    set_rank(layer, "default", 2, name=name, step=1, seed=0, optimizer=optimizer)
            found[where] = logits(model, ids).cpu()
            assert torch.allclose(logits(model.merge_and_unload(), ids).cpu(), found[where], atol=1e-5), mode
        apart = float((found["cpu"] - found[KIND]).abs().max())
        assert apart < 1e-5, (mode, apart)  # of logits of order 1
    for measure in (
        lambda model, batch: probe_gradients(model, [batch], svd_rank=8, columns="fisher"),
        lambda model, batch: probe_gradients(model, [batch], fisher=False, columns="activation"),
        lambda model, batch: column_energies(model),
    ):
        reports = []
        for where in ("cpu", KIND):
            ids = IDS.to(where)
            reports.append(measure(copy.deepcopy(whole).to(where), {"input_ids": ids, "labels": ids}))
        for one, other in zip(*(report.stats for report in reports), strict=True):
            for field in ("fisher", "importance", "columns"):
                # The first token attends to itself alone: the gradient by its query is zero, or rounding noise, by the kernel,
                # and `activation` counts tokens with a gradient.
                if field == "columns" and "q_proj" in one.name:
                    continue
                mine, theirs = (torch.tensor(getattr(stat, field) or 0.0) for stat in (one, other))
                assert torch.allclose(mine, theirs, rtol=1e-4), (one.name, field)


def command_line(folder: Path) -> None:
    """What cannot be there is one line."""
    import contextlib
    import io

    from architectures import ARCHITECTURES
    from conftest import byte_tokenizer

    from spectrum_peft.cli.main import main

    ARCHITECTURES["llama"].build().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    train = [
        "train",
        "--model",
        str(folder),
        "--dataset",
        str(folder / "rows.jsonl"),
        "--output-dir",
        str(folder / "o"),
    ]
    for words, said in (
        (["scan", str(folder), "--device", "cuda:7", "-o", str(folder / "r.json")], "sees no cuda here, only small"),
        (["scan", str(folder), "--device", "small:7", "-o", str(folder / "r.json")], "there are 1 of its kind"),
        (
            [*train, "--mode", "lora", "--quantization", "nf4", "--dtype", "float32"],
            "bitsandbytes has no kernels for small",
        ),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as screen:
            code = main(words)
        assert code == 2 and screen.getvalue().count("\n") == 1 and said in screen.getvalue(), screen.getvalue()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    install()
    globals()[sys.argv[1]](Path(sys.argv[2]))
