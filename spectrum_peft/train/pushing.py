"""`train --push-to-hub`: at the end of a run, what it wrote and nothing else."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import OptionError
from ..push import Pushed, is_on_hub, push_folder


def check_base(model: str, *, real_weights: bool) -> None:
    """
    Raises:
        OptionError: before a run whose adapter nobody could load: its base is a folder of this machine.
    """
    if not real_weights and not is_on_hub(model):
        raise OptionError(
            f"--push-to-hub: an adapter on {model!r}, a folder that nobody else has, cannot be loaded by others: train from the "
            "hub id of the base, or push the folder afterwards with `spectrum-peft push FOLDER --base ORG/NAME`."
        )


def pushed(output: Path, args: TrainingArguments) -> Pushed:
    """Push a run's folder as the trainer's own flags say: --hub-model-id, --hub-private-repo, --hub-revision, --hub-token, and
    the checkpoints where --hub-strategy names them."""
    return push_folder(
        output,
        args.hub_model_id,
        checkpoints=args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS),
        private=args.hub_private_repo,
        revision=args.hub_revision,
        token=args.hub_token,
    )
