"""What a run needs of libraries and of the hub, checked before a weight is read."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from ..errors import InstallError, OptionError, near_matches, one_line


def check_needs(args: TrainingArguments, options: argparse.Namespace, config: Any, auto_class: str) -> None:
    """
    Args:
        config: transformers' config of the checkpoint.
        auto_class: of transformers, that will load it.
    Raises:
        InstallError: a library that a flag asks for is not installed.
        OptionError: a tracker that transformers does not know, an attention that the model does not have, a hub that does
            not answer or knows no user.
    """
    _check_trackers(args)
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InstallError("--use-liger-kernel needs liger-kernel: pip install liger-kernel.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise InstallError(f"--optim {args.optim}: {one_line(error)}") from error
    except (ValueError, TypeError):
        pass  # those that want the model as well are asked again by the trainer
    if options.attn_implementation:
        _check_attention(options, config, auto_class)
    if args.push_to_hub:
        _check_hub(args)


def _check_trackers(args: TrainingArguments) -> None:
    wanted = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    available = get_available_reporting_integrations()
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(f"--report-to is {name!r}." + near_matches(str(name), INTEGRATION_TO_CALLBACK))
        if name not in available:
            raise InstallError(f"--report-to {name} needs the package {name}: pip install {name}, or --report-to none.")


def _check_attention(options: argparse.Namespace, config: Any, auto_class: str) -> None:
    """Build the model without memory: it refuses an attention as it would when it is loaded."""
    try:
        kind, asked = getattr(transformers, auto_class), {"attn_implementation": options.attn_implementation}
        with torch.device("meta"):
            if hasattr(kind, "_model_mapping"):
                kind.from_config(config, **asked, trust_remote_code=bool(options.trust_remote_code))
            else:
                kind._from_config(config, **asked)
    except ImportError as error:
        raise InstallError(f"--attn-implementation {options.attn_implementation}: {one_line(error)}") from error
    except ValueError as error:
        raise OptionError(f"--attn-implementation {options.attn_implementation}: {one_line(error)}") from error


def _check_hub(args: TrainingArguments) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:  # no token, no such user, no network, offline mode: each library has its own errors
        raise OptionError(
            f"--push-to-hub: the hub does not answer for a user ({one_line(error)[:200]}). Log in (hf auth login), or leave "
            "the flag out."
        ) from error
