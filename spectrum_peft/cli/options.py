"""Flags that several verbs share, and what verbs do with files."""

from __future__ import annotations

import argparse
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..arguments import steps, switch
from ..data import COLUMNS
from ..errors import CheckpointError, OptionError
from ..plan import MODES, OPTIONS, get_mode
from ..records import GradientReport, MemoryReport, Plan, SnrReport, is_stream, mode_of, repository_named

# What REPORT and --report mean wherever they are taken: `scan.report_named`.
REPORT_HELP = (
    "of `scan`, or a published file; auto: kept here, else in the model's repository, else scanned; or ORG/NAME"
)
PLAN_HELP = "of `plan`, or ORG/NAME on the hub"

# --- flags that several verbs share ----------------------------------------------------------------------------------
# None stands for "not given" everywhere: defaults of plan options live in `plan.OPTIONS` and nowhere else.


def add_plan_options(parser: argparse.ArgumentParser, several_modes: bool = False, usual: str | None = None) -> None:
    add = parser.add_argument_group("plan options (defaults: `spectrum_peft.plan.OPTIONS`)").add_argument
    group = parser._action_groups[-1]
    if several_modes:
        add("--mode", nargs="+", metavar="MODE", help=", ".join(MODES) + "; of several --fit takes the first that fits")
    else:
        add("--mode", help=", ".join(MODES) + (f"; default {usual}" if usual else ""))
    add(
        "--criterion",
        help="score of a matrix: spectrum, mp, mean_std, row_norm, kappa, fisher, random, last, first, spaced",
    )
    add("--spectrum-ratio", "--ratio", type=float, metavar="R", help="share of the matrices of each kind, in (0, 1]")
    add("--snr-threshold", type=float, metavar="X", help="every matrix that scores above X, instead of a ratio")
    add("--scope", help="per_kind (as published) or global")
    add("--measure", help="what the ratio is a share of: count or parameters")
    add("--coverage", type=int, metavar="N", help="cut the depth into N runs and take the best-scored of each in turn")
    add("--backward-depth", type=float, metavar="D", help="choose in the last D of the blocks; backward stops there")
    switch(group, "--train-embeddings", help="train the embeddings too")
    switch(group, "--train-head", help="train the output head too")
    switch(group, "--train-norms", help="train the norms too")
    add("--towers", help="of a model that sees or hears: language (the default), vision, audio or all")
    switch(group, "--train-projectors", help="train what leads from one tower to another too")
    add("--r", type=int, help="rank of adapters")
    add("--lora-alpha", type=int, help="adapters are scaled by lora_alpha / r")
    switch(group, "--use-rslora", help="scale by lora_alpha / sqrt(r)")
    add("--r-high", type=int, help="alors: rank of the high tier")
    add("--r-medium", type=int, help="alors: rank of the medium tier")
    add("--score-cuts", type=float, nargs=2, metavar=("HIGH", "MEDIUM"), help="alors: tiers by score")
    add("--trainable-parameters", type=int, metavar="N", help="alors: an exact budget instead of a ratio")
    add("--lr-ratio", type=float, nargs=2, metavar=("LOW", "HIGH"), help="alors: bounds of the learning-rate ratio")
    add("--rescore-every", type=steps, metavar="N|epoch", help="steps between two evaluations of the choice")
    add("--similarity", help="sgm: what makes two matrices alike: subspace or cosine")
    add("--similarity-threshold", type=float, metavar="S", help="sgm: how alike the members of a group are at least")
    add("--n-groups", type=int, metavar="N", help="sgm: groups of each kind and shape, instead of a threshold")
    add("--share", help="sgm: residual_side shares the factor that faces the residual stream, both shares both")
    switch(group, "--group-gain", help="sgm: a trained gain for each matrix of a group")
    add("--n-components", type=int, metavar="N", help="lorsa: singular components that train")
    add("--component-scope", help="lorsa: components of each layer, or the same number over all (global)")
    add("--svd-rank", type=int, metavar="K", help="lorsa: how many leading components are looked at")
    add("--rotation-rank", type=int, metavar="R", help="lorsa: rank of the rotations of singular vectors")
    add("--n-columns", type=int, metavar="N", help="columns: how many of each matrix train, instead of --r or a ratio")
    add("--columns-by", help="columns: which ones: random, spectrum, activation or fisher")
    add("--column-block", type=int, metavar="N", help="columns: they come in runs of N")
    add("--rows-of", nargs="+", metavar="NAME", help="columns: rows of these modules train instead")
    switch(group, "--coupled", help="columns: rows follow the columns of the matrix that takes in what they put out")
    add("--head-width", type=int, metavar="N", help="columns: hidden features of an attention come in whole heads of N")
    add("--keep-base", help="where originals of trained weights are kept: auto, host, file or none")
    add("--trainable-dtype", help="of real weights that train: float32, or base for the dtype of the model as loaded")
    add("--preset", help="published: the selection of the published script, entry for entry")
    add("--seed", type=int, help="of random choices (train: of the run too)")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="D", help="hub id, local .jsonl, .csv, .parquet or .txt; several with weights: A,B=2")
    add("--dataset-split", metavar="S", help="split of a hub dataset")
    add(
        "--task",
        help="causal_lm (or sft), dpo, kto, reward, grpo, seq2seq, classification, multi_label, regression or "
        "token_classification; default: what the checkpoint's architecture says",
    )
    add(
        "--reward-function", nargs="+", metavar="F",
        help="grpo: file.py:function or module:function, which runs as it is, or the folder of a reward model",
    )  # fmt: skip
    for name in COLUMNS:
        add(f"--{name}-column", metavar="NAME", help=f"the column that holds {name}; default {name}")
    add("--max-length", type=int, metavar="TOKENS", help="longer examples are cut")
    add("--loss-on", help="all tokens, assistant (every turn), or completion (the last); default: as the rows are")
    switch(
        parser._action_groups[-1],
        "--apply-chat-template",
        help="prompt and completion are turns where the tokenizer has a chat template; default true",
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loading").add_argument
    add("--revision", help="of a hub model")
    add("--dtype", help="to load in: auto (bfloat16 where the device is fast at it), float32, bfloat16 or float16")
    add("--quantization", help="of the base: none, nf4, fp4 or int8")
    add("--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2, ...")
    switch(parser._action_groups[-1], "--trust-remote-code", help="run code that a hub repository ships")


def given_plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """The plan options that were given, under the names of `make_plan`."""
    return {name: value for name in OPTIONS if (value := getattr(options, name, None)) is not None}


def report_of(options: argparse.Namespace, model: str | None, given: Mapping[str, Any]) -> SnrReport:
    """The report that REPORT or --report names, for plans with these options; a file is read without torch.

    Raises:
        as `scan.report_named`.
    """
    name, criterion = options.report, given.get("criterion")
    if name is not None and name != "auto" and (model is None or repository_named(name) is None):
        return SnrReport.named(name, criterion=None if criterion == "fisher" else criterion)
    from ..scan import report_named

    mode = given.get("mode", OPTIONS["mode"])
    scored = any(get_mode(one).selective for one in (mode if isinstance(mode, list) else [mode]))
    revision, seed = getattr(options, "revision", None), given.get("seed", OPTIONS["seed"])
    return report_named(name, model, criterion, revision, seed, scored=scored)


def required(options: argparse.Namespace, name: str, flag: str) -> Any:
    value = getattr(options, name)
    if value is None:
        raise OptionError(f"{flag} is missing.")
    return value


def check_writable(path: str | os.PathLike[str] | None) -> None:
    """Refuse an output that could not be written, before the work is done; creates nothing that stays.

    Raises:
        CheckpointError: an ancestor is a file, or the nearest folder that exists cannot be written.
    """
    if path is None:
        return
    path = Path(path)
    if stat.S_ISDIR(mode_of(path)):
        raise CheckpointError(f"{path}: is a folder, wanted the name of a file.")
    if is_stream(path):
        return
    folder = path.parent
    try:
        with suppress(FileNotFoundError):
            path.stat()  # refuses a name that is too long, or below a file
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, NotADirectoryError):
            file = next((p for p in path.parents if mode_of(p) and not stat.S_ISDIR(mode_of(p))), folder)
            raise CheckpointError(f"{file}: is a file, wanted a folder.") from error
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written, {folder} refuses ({why}).") from error


def write_record(record: SnrReport | GradientReport | Plan | MemoryReport, output: str | None) -> None:
    if output is not None:
        record.save(output)
        print(f"wrote {output}")
