"""Factors that several LoRA layers share.

The first layer of a group holds the factor, as a parameter under its own `lora_A` or `lora_B`; in the others stands a module
that holds none and looks the first one's up. So there is one tensor in memory, in the optimizer and in the file, its gradient
is the sum over the group because it is one leaf of the graph, and PEFT's own switching, casting, moving, deleting and loading
of a layer's adapters does for it what it does for any.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from .. import names
from ..errors import MismatchError, OptionError
from ..records import Plan, PlanEntry

# Inits that draw one factor without a look at the other; any other would not leave the function as it was.
_INITS = (True, False, "gaussian")


class SharedFactor(nn.Module):
    """One factor of a LoRA, A (rank, in) or B (out, rank), that belongs to a group of layers.

    Args:
        value: the group's factor, held here as the parameter `shared`; or the `SharedFactor` that holds it.
        gain: a trained number of this layer, (1, 1), multiplies the factor; 1 at the start.

    Attributes:
        computes_in: dtype that a factor which FSDP2 shares out is gathered in; None for its own.
    """

    computes_in: torch.dtype | None = None

    def __init__(self, value: nn.Parameter | SharedFactor, gain: bool = False) -> None:
        super().__init__()
        # In a tuple, which torch does not look into: as a child, the holder would be saved once for each layer.
        self._holder: tuple[SharedFactor, ...] = ()
        if isinstance(value, SharedFactor):
            self._holder = (value,)
            like = value.shared
        else:
            self.shared = like = value
        if gain:  # of two dimensions, as PEFT takes all that lies in `lora_A` and `lora_B` to be
            ones = torch.ones(1, 1, dtype=like.dtype, device=like.device)
            self.gain = nn.Parameter(ones, requires_grad=like.requires_grad)

    @property
    def weight(self) -> Tensor:
        """The factor of this layer, its gain applied."""
        shared = gathered(self._holder[0].shared if self._holder else self.shared, self.computes_in)
        return shared * self.gain.to(shared.device) if "gain" in self._parameters else shared

    # Asked for by code that takes any factor for a Linear.
    bias = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., rank) for A, (..., rank) to (..., out) for B."""
        return functional.linear(x, self.weight.to(x.device))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, holds={not self._holder}"


class _MeanOverProcesses(torch.autograd.Function):
    """The identity; its gradient is divided by the number of processes, as FSDP divides those that it sums itself."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.processes, None


def gathered(factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A factor as a whole. FSDP2 gathers it for the block that holds it, and only while that block computes; for the
    others of its group it is gathered here, and its gradient goes back to the shards as the mean over the processes."""
    if not isinstance(factor, DTensor):
        return factor
    mesh = factor.device_mesh
    whole = factor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    mean: Tensor = _MeanOverProcesses.apply(whole, mesh.size())
    return mean if dtype is None else mean.to(dtype)


def share_in_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Say what dtype the blocks of a model compute in under FSDP2, whose own gathering casts and ours has to follow."""
    for module in model.modules():
        if isinstance(module, SharedFactor):
            module.computes_in = dtype


def groups_of(plan: Plan) -> dict[str, list[PlanEntry]]:
    """{group: its live entries, in plan order}."""
    groups: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.group is not None and entry.trains:
            groups.setdefault(entry.group, []).append(entry)
    return groups


def refuse_unshareable(config: Any) -> None:
    """Refuse settings of an adapter that a shared factor cannot have.

    Raises:
        OptionError: DoRA, a bias of the adapter, or an init that looks at both factors or at data.
        MismatchError: members of a group differ in rank, scale, kind or shape.
    """
    groups = groups_of(config.plan)
    if not groups:
        return
    for field, value, fits in (
        ("use_dora", config.use_dora, not config.use_dora),
        ("lora_bias", config.lora_bias, not config.lora_bias),
        ("init_lora_weights", config.init_lora_weights, config.init_lora_weights in _INITS),
    ):
        if not fits:
            raise OptionError(
                f"{field}={value!r} does not go with factors that layers share, as the plan's group {min(groups)}."
            )
    for label, members in groups.items():
        first = members[0]
        for entry in members[1:]:
            for part in ("shape", "rank", "alpha", "kind"):
                if getattr(entry, part) != getattr(first, part):
                    raise MismatchError(
                        f"group {label}: {entry.name} has {part} {getattr(entry, part)}, {first.name} has "
                        f"{getattr(first, part)}; a group shares one factor and needs one {part}."
                    )


def share_factors(model: nn.Module, adapter_name: str, plan: Plan) -> None:
    """Let the layers of each group share the factors that its label names; their own are dropped.

    The group's factor begins as the first layer's did.

    Args:
        model: the base model with the adapter's LoRA layers in it.
    """
    for label, members in groups_of(plan).items():
        layers: list[LoraLayer] = [model.get_submodule(names.module_name(e.name)) for e in members]  # type: ignore[misc]
        for letter in shared_letters(label):
            containers = [layer.lora_A if letter == "A" else layer.lora_B for layer in layers]
            # The gain stands at one factor only, B where both are shared.
            gains = [e.gain and letter == shared_letters(label)[-1] for e in members]
            holder = SharedFactor(containers[0][adapter_name].weight, gains[0])  # type: ignore[arg-type]
            containers[0][adapter_name] = holder
            for container, gain in zip(containers[1:], gains[1:], strict=True):
                container[adapter_name] = SharedFactor(holder, gain)


def shared_letters(group: str) -> str:
    """`A`, `B` or `AB`: what the members of a group share, as its label says."""
    return group.partition(":")[0]
