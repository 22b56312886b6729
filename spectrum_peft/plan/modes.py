"""The table of modes.

A mode differs from the others in two things: how its entries are chosen (a policy, by the key `Mode.select`) and what
a chosen module becomes (`Mode.action`). Everything else that depends on the mode is a field of its row, so that nobody
asks `if mode ==`. To add a mode, add a row, and a policy if none of these chooses as it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import OptionError, near_matches
from ..records import REAL_WEIGHT_ACTIONS
from .rates import scaled_rate

USUAL_RANK = 16  # of adapters here, where nobody chose
# Where nobody chose, in `train`: nothing that was measured does better with as little memory (docs/results.md).
USUAL_MODE = "lora"


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    Attributes:
        name: as the user writes it.
        summary: one line for tables and help texts.
        select: key of `POLICIES`.
        action: what a chosen module becomes, one of `records.ACTIONS`.
        default_lr: learning rate where the user set none, for AdamW, in a run of `LONG_RUN` steps or more; of LoRA's at rank
            `LORA_RANK`, of real weights where all matrices train.
        needs_data: wants a GradientReport or calibration batches.
        of_each: a ratio is the share of every matrix that trains, and not of the matrices.
        whole_model: every parameter of the model trains, candidates or not.
        importance_rates: the learning rate of an entry grows with its score, within `lr_ratio`.
        rescorable: `rescore_every` may move the choice during training.
        plain_model: the callback alone can carry it out, on a model without a PEFT wrapper.
        own_options: options that mean something in this mode and not in every mode; refused elsewhere.
    """

    name: str
    summary: str
    select: str
    action: str
    default_lr: float
    needs_data: bool = False
    of_each: bool = False
    whole_model: bool = False
    importance_rates: bool = False
    rescorable: bool = False
    plain_model: bool = False
    own_options: frozenset[str] = field(default_factory=frozenset)

    def rate_for(self, steps: int, r: int = USUAL_RANK, ratio: float = 1.0) -> float:
        """Learning rate of a run of so many optimizer steps, where the user set none; to two digits.

        Args:
            r: rank of a LoRA; without effect in modes whose rate does not go `by_rank`.
            ratio: share of the matrices that trains, in (0, 1]; 1 in tasks with a head, as classification, where the share made
                no difference (docs/results.md). Without effect in modes whose rate does not go `by_ratio`.
        """
        return scaled_rate(self.default_lr, steps, r if self.by_rank else None, ratio if self.by_ratio else None)

    @property
    def by_rank(self) -> bool:
        """What trains are factors of rank r, so that the usual rate goes with 1 / sqrt(r)."""
        return self.action in ("lora", "shared")

    @property
    def by_ratio(self) -> bool:
        """Whole matrices train themselves and others do not, so that the usual rate goes with 1 / sqrt(their share)."""
        return self.selective and self.action == "train"

    @property
    def real_weights(self) -> bool:
        """The weights of the base train themselves; there is no adapter."""
        return self.action in REAL_WEIGHT_ACTIONS

    @property
    def selective(self) -> bool:
        """Scores decide which matrices: the ratio, the threshold and the scope mean something."""
        return self.select != "all" and not self.of_each

    @property
    def has_ratio(self) -> bool:
        """A ratio means something: a share of the matrices, or of each."""
        return self.select != "all"


MODES: dict[str, Mode] = {
    row.name: row
    for row in (
        Mode(
            "full", "every parameter trains", select="all", action="train", default_lr=2e-5,
            whole_model=True, plain_model=True,
        ),
        Mode(
            "spectrum", "the best-scored matrices train, as real weights", select="top", action="train",
            default_lr=2e-5, plain_model=True,
        ),
        Mode("lora", "LoRA of one rank on every matrix", select="all", action="lora", default_lr=2e-4),
        Mode(
            "spectra_qlora", "LoRA of one rank on the best-scored matrices", select="top", action="lora",
            default_lr=2e-4, rescorable=True,
        ),
        Mode(
            "alors", "LoRA of two ranks on the best-scored matrices, learning rates by importance", select="tiers",
            action="lora", default_lr=2e-4, importance_rates=True, rescorable=True,
            own_options=frozenset({"r_high", "r_medium", "score_cuts", "trainable_parameters"}),
        ),
        Mode(
            "sgm", "LoRA on the best-scored matrices, a factor shared by those with like gradients", select="alike",
            action="shared", default_lr=2e-4, needs_data=True,
            own_options=frozenset({"similarity", "similarity_threshold", "n_groups", "share", "group_gain"}),
        ),
        Mode(
            "lorsa", "singular values shift and their vectors turn, for the components that the data ask for",
            select="components", action="lorsa", default_lr=1e-3, needs_data=True,
            own_options=frozenset({"n_components", "component_scope", "svd_rank", "rotation_rank"}),
        ),
        Mode(
            "columns", "real weights of some columns of every matrix", select="columns", action="columns", default_lr=2e-4,
            of_each=True,
            own_options=frozenset({"n_columns", "columns_by", "column_block", "rows_of", "coupled", "head_width"}),
        ),
    )
}  # fmt: skip


def get_mode(name: object) -> Mode:
    """The row of a mode.

    Raises:
        OptionError: there is no such mode; the message shows the near ones.
    """
    if not isinstance(name, str) or name not in MODES:
        raise OptionError(f"mode is {name!r}." + near_matches(str(name), MODES))
    return MODES[name]
