"""An adapter in the singular basis of its matrix, in PEFT's LoRA layers.

The mathematics is in `svd`: the change of a matrix is [U P] M [V Q]^T with frozen outer factors and a small trained core.
Where PEFT expects `lora_A` stands a `Basis` with all that is frozen, where it expects `lora_B` a `Core` with all that
trains; their `weight` is what LoRA calls A and B, so that PEFT's merge and everything that reads factors knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional

from ..errors import CheckpointError, MismatchError
from ..records import PlanEntry
from ..scan import cache_folder, cached_svd
from ..weights import matrix_of
from ..weights.rotations import core_matrix, digest_of, rotation_bases


class _KeepsDtype(nn.Module):
    """A module whose tensors move between devices and do not change their dtype with `.to()`, `.half()` and the like.

    PEFT casts an adapter to the base's dtype when it moves it, and back afterwards: rounded. Here nothing is.
    """

    keeps_dtype = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _KeepsDtype:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved if self.keeps_dtype else fn, recurse)
        return self


class Basis(_KeepsDtype):
    """The frozen part: chosen singular triplets of the matrix, and the directions that their vectors may turn to.

    Parameters, never trained: `left` (|S|, out), `values` (|S|,), `right` (|S|, in), float32. The random directions P and
    Q follow from a seed and are not in files; `digest`, the sha256 of their bytes, is. Parameters and not buffers, since
    DDP sends buffers round in every forward and writes into them, which breaks a backward that has seen two forwards.

    Args:
        layer: PEFT's layer that it belongs to; its base layer's matrix is decomposed where no file gives the values.
        entry: of the plan; its name, components and rank.
        svd_rank: how many leading components are computed. seed: of P and Q; both as in the plan's options.
    """

    def __init__(self, layer: LoraLayer, entry: PlanEntry, *, svd_rank: int, seed: int) -> None:
        super().__init__()
        assert entry.components is not None and entry.rank is not None
        self.name, self.components, self.rank = entry.name, entry.components, entry.rank
        self.svd_rank, self.seed = svd_rank, seed
        self._layer = (layer,)  # in a tuple: no child of this module
        self.shape = (layer.out_features, layer.in_features)
        count, smaller = len(self.components), min(self.shape)
        if not 0 <= self.components[0] <= self.components[-1] < min(svd_rank, smaller) or not 1 <= self.rank <= smaller:
            raise MismatchError(
                f"{self.name}: the plan has components {self.components[0]} to {self.components[-1]} and rank {self.rank}, "
                f"the matrix of shape {self.shape} has {min(svd_rank, smaller)} and at most {smaller}."
            )
        device = layer.get_base_layer().weight.device
        self._joined = {
            "left": torch.zeros(count + self.rank, self.shape[0], device=device),
            "right": torch.zeros(count + self.rank, self.shape[1], device=device),
        }
        self.values = nn.Parameter(torch.full((count,), torch.nan, device=device), requires_grad=False)
        self.left = nn.Parameter(self._joined["left"][:count], requires_grad=False)
        self.right = nn.Parameter(self._joined["right"][:count], requires_grad=False)
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        # Neither decomposed nor loaded yet.
        self.pending = has_values(self.values)
        if self.pending:
            self.digest.copy_(self._rotations()[2])
            for side in ("left", "right"):
                self._join(side)

    def _rotations(self) -> tuple[Tensor, Tensor, Tensor]:
        """P and Q as rows, on the CPU, and their digest."""
        p, q = rotation_bases(self.seed, self.name, *self.shape, self.rank)
        return p, q, digest_of(p, q)

    def check_digest(self, stored: Tensor, where: str) -> None:
        """Compare the digest in a file with that of the P and Q that are drawn here.

        Raises:
            MismatchError: they differ.
        """
        drawn = self._rotations()[2]
        if stored.dtype != torch.uint8 or not torch.equal(stored.cpu(), drawn):
            raise MismatchError(
                f"{where}: the directions P and Q of {self.name} that the adapter was trained with have digest "
                f"{_hex(stored)}, those drawn from seed {self.seed} here have {_hex(drawn)}. The adapter would compute "
                "something else: the plan's seed or the module's name was changed, or this torch draws other numbers."
            )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also called where a loader puts another tensor in a parameter's place: transformers' makes one that trains."""
        super().register_parameter(name, None if param is None else param.requires_grad_(False))

    def settle(self) -> None:
        """Have the triplets: those of a file that was loaded, else those of the matrix, decomposed through the cache."""
        if not self.pending or not has_values(self.values):
            return
        if bool(self.values.isnan().any()):
            self.decompose()
        else:
            self.check_digest(self.digest, f"{self.name}: the loaded adapter")
        self.pending = False

    @torch.no_grad()
    def decompose(self) -> None:
        """Take the triplets from the matrix that the layer computes with.

        Raises:
            CheckpointError: the matrix holds NaN or Inf.
        """
        matrix = matrix_of(self._layer[0].get_base_layer())
        if not torch.isfinite(matrix).all():
            raise CheckpointError(f"{self.name}: holds NaN or Inf, wanted a finite matrix to decompose.")
        k = min(self.svd_rank, *self.shape)
        found = cached_svd(matrix, k, cache_folder() / "svd").take(torch.tensor(self.components))
        for parameter, value in ((self.left, found.left), (self.values, found.values), (self.right, found.right)):
            parameter.data.copy_(value)
        self.pending = False

    def rows(self, side: str) -> Tensor:
        """[U P]^T (|S| + r, out) for `left`, [V Q]^T (|S| + r, in) for `right`; the parameter is a view of it."""
        self.settle()
        vectors = getattr(self, side)
        if vectors.device != self._joined[side].device:
            self._join(side)
        joined = self._joined[side]
        if torch.compiler.is_compiling():  # a traced graph cannot ask where tensors lie: it copies
            return torch.cat((vectors.detach(), joined[len(vectors) :]))
        if vectors.data_ptr() != joined.data_ptr():  # copied, or replaced by a loader
            self._join(side)
        return self._joined[side]

    @torch.no_grad()
    def _join(self, side: str) -> None:
        vectors = getattr(self, side)
        p, q, digest = self._rotations()
        if not self.pending and not torch.equal(self.digest.cpu(), digest):
            self.check_digest(self.digest, f"{self.name}: the adapter")
        turned = (p if side == "left" else q).to(vectors.device)
        joined = torch.cat((vectors.detach(), turned))
        self._joined[side] = joined
        vectors.data = joined[: len(vectors)]

    @property
    def weight(self) -> Tensor:
        """LoRA's A: [V Q]^T, (|S| + r, in)."""
        return self.rows("right")

    def extra_repr(self) -> str:
        return f"components={len(self.components)}, rotation_rank={self.rank}, shape={self.shape}"


class Core(_KeepsDtype):
    """The trained part: `shift` (|S|,) of the singular values, `p` and `q` (|S|, r), turns of their vectors. Zero at first.

    Args:
        dtype: that they train in; None for float32 whatever the base's dtype is.
    """

    def __init__(self, basis: Basis, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._basis = (basis,)
        self.keeps_dtype = dtype is None
        count, device = len(basis.components), basis.values.device
        self.shift = nn.Parameter(torch.zeros(count, device=device, dtype=dtype or torch.float32))
        self.p = nn.Parameter(torch.zeros(count, basis.rank, device=device, dtype=dtype or torch.float32))
        self.q = nn.Parameter(torch.zeros(count, basis.rank, device=device, dtype=dtype or torch.float32))

    def matrix(self) -> Tensor:
        """M, (|S| + r, |S| + r), float32."""
        basis = self._basis[0]
        basis.settle()
        return core_matrix(basis.values, self.shift.float(), self.p.float(), self.q.float())

    @property
    def weight(self) -> Tensor:
        """LoRA's B: [U P] M, (out, |S| + r)."""
        return self._basis[0].rows("left").T @ self.matrix()


class SingularBasis(LoraVariant):
    """What PEFT's layer computes with a `Basis` and a `Core`: the core form, over float, 4-bit and 8-bit bases."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: `install` puts the modules in."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + scale * [U P] M [V Q]^T dropout(x), (..., out); in float32, whatever the base computes in."""
        basis: Any = module.lora_A[active_adapter]
        right, left = basis.rows("right"), basis.rows("left")
        core = module.lora_B[active_adapter].matrix()
        if module.scaling[active_adapter] != 1:
            core = core * module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x.to(right.dtype))
        inner = functional.linear(functional.linear(x, right), core)
        if inner.dtype != result.dtype:
            return result + inner @ left
        # One pass over the output instead of two: it is the widest tensor here.
        flat = torch.addmm(result.reshape(-1, result.shape[-1]), inner.reshape(-1, inner.shape[-1]), left)
        return flat.view(result.shape)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def install(
    layer: LoraLayer, adapter: str, entry: PlanEntry, *, svd_rank: int, seed: int, keeps_dtype: bool, from_file: bool
) -> None:
    """Turn a LoRA adapter that PEFT has just made into one in the singular basis.

    Args:
        keeps_dtype: what trains stays float32 whatever the base's dtype.
        from_file: a file with the triplets is expected to be loaded; if none is, they are computed in the first forward.
    """
    trains = any(p.requires_grad for p in layer.lora_A[adapter].parameters())
    basis = Basis(layer, entry, svd_rank=svd_rank, seed=seed)
    core = Core(basis, None if keeps_dtype else layer.lora_B[adapter].weight.dtype)  # type: ignore[arg-type]
    layer.lora_A[adapter], layer.lora_B[adapter] = basis, core
    layer.lora_variant[adapter] = SingularBasis()
    total = len(basis.components) + basis.rank
    layer.r[adapter] = layer.lora_alpha[adapter] = total
    layer.scaling[adapter] = 1.0
    # PEFT's own list of what stays frozen whenever it switches an adapter on.
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: ("lora_A",)}
    core.requires_grad_(trains)
    if basis.pending and not from_file:
        basis.decompose()


def take_base_dtype(layer: Any, adapter: str) -> None:
    """Let what trains have the base's dtype, and follow it; on a quantized base it stays as it is."""
    dtype = layer.get_base_layer().weight.dtype
    if dtype.is_floating_point:
        layer.lora_B[adapter].keeps_dtype = False
        layer.lora_B[adapter].to(dtype)


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and for the fake tensors of a dry run."""
    return tensor.device.type != "meta" and not isinstance(tensor.data, FakeTensor)


def singular_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Basis]]:
    """(module name in `model`, its basis) of the layers that an adapter holds in the singular basis."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.lora_variant.get(adapter), SingularBasis):
            yield name, module.lora_A[adapter]


def _hex(digest: Tensor) -> str:
    return bytes(digest.cpu().tolist()).hex()[:12]
