"""The command `spectrum-peft`: one function for each verb.

Exit code 0: done; 2: an input is wrong (one line on standard error, no traceback); 1: a failure of ours (a traceback).
The verbs that only read weights and plans import neither transformers nor peft; what a verb needs, it imports itself.

Every verb takes `--config FILE`, a YAML or JSON mapping whose keys are the verb's flags; flags on the command line win.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .arguments import Parser, Rest, boolean, dashed, flags_of, keys_of, set_defaults_from, steps, switch, take_config
from .errors import CheckpointError, OptionError, SpectrumError, near_matches
from .policies import MODES
from .records import GradientReport, MemoryReport, Plan, SnrReport, read_mapping, write_text
from .tasks import COLUMNS

PROG = "spectrum-peft"


# --- flags that several verbs share ----------------------------------------------------------------------------------
# None stands for "not given" everywhere: defaults of plan options live in `plan.OPTIONS` and nowhere else.


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("plan options (defaults: `spectrum_peft.plan.OPTIONS`)").add_argument
    group = parser._action_groups[-1]
    add("--mode", help=", ".join(MODES))
    add("--criterion", help="score of a matrix: spectrum, mp, mean_std, row_norm, kappa, fisher, random, last, first")
    add("--spectrum-ratio", "--ratio", type=float, metavar="R", help="share of the matrices of each kind, in (0, 1]")
    add("--snr-threshold", type=float, metavar="X", help="every matrix that scores above X, instead of a ratio")
    add("--scope", help="per_kind (as published) or global")
    add("--measure", help="what the ratio is a share of: count or parameters")
    add("--backward-depth", type=float, metavar="D", help="choose in the last D of the blocks; backward stops there")
    switch(group, "--train-embeddings", help="train the embeddings too")
    switch(group, "--train-head", help="train the output head too")
    switch(group, "--train-norms", help="train the norms too")
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
    add("--keep-base", help="where originals of trained weights are kept: auto, host, file or none")
    add("--trainable-dtype", help="of real weights that train: float32, or base for the dtype of the model as loaded")
    add("--preset", help="published: the selection of the published script, entry for entry")
    add("--seed", type=int, help="of random choices (train: of the run too)")


def _data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="D", help="hub id, or a local .jsonl, .csv or .parquet file")
    add("--dataset-split", metavar="S", help="split of a hub dataset")
    add("--task", help="causal_lm, seq2seq or classification; default: what the checkpoint's architecture says")
    for name in COLUMNS:
        add(f"--{name}-column", metavar="NAME", help=f"the column that holds {name}; default {name}")
    add("--max-length", type=int, metavar="TOKENS", help="longer examples are cut")


def _load_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loading").add_argument
    add("--revision", help="of a hub model")
    add("--dtype", help="to load in: auto (bfloat16 where the device is fast at it), float32, bfloat16 or float16")
    add("--quantization", help="of the base: none, nf4, fp4 or int8")
    add("--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2, ...")
    switch(parser._action_groups[-1], "--trust-remote-code", help="run code that a hub repository ships")


# --- the verbs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """A row of `VERBS`.

    Attributes:
        usage: the positional argument and the flags that cannot be left out.
        summary: one line for the list of verbs.
        example: a command that works, for `--help`.
        arguments: adds the verb's flags to its parser.
        run: (parsed flags, what the parser did not know) -> None.
        passes_on: what the parser does not know goes to the trainer's own arguments.
        reads_config: the config file holds more than flags; the verb gets all of it in `Rest.config`.
    """

    usage: str
    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Rest], None]
    passes_on: bool = False
    reads_config: bool = False


def _scan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="hub id, folder, .safetensors or .gguf file, or the folder of a trained adapter")
    add("-o", "--output", metavar="FILE", help="write the report there (.json or .yaml)")
    add("--criterion", default="spectrum", help="spectrum, mp, mean_std, row_norm, kappa, random, last or first")
    add("--score", nargs="+", default=["linear"], metavar="ROLE", help="which tensors to score; default linear")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--jobs", type=int, metavar="N", help="matrices at a time; default: one for each core")
    add("--revision", help="of a hub model")
    add("--seed", type=int, default=0, help="of the criterion `random`")
    switch(parser, "--cache", default=False, help="use a finished scan of the same weights")


def _scan(options: argparse.Namespace, rest: Rest) -> None:
    from .scan import scan_weights

    model = _required(options, "model", "MODEL")
    check_writable(options.output)
    report = scan_weights(
        model,
        criterion=options.criterion,
        jobs=options.jobs,
        device=options.device,
        score=tuple(options.score),
        cache=options.cache,
        revision=options.revision,
        seed=options.seed,
    )
    print(describe_report(report))
    _write(report, options.output)


def describe_report(report: SnrReport) -> str:
    """A table of the scores by kind: how many matrices, lowest, median and highest score, and the best one."""
    rows = [("kind", "matrices", "lowest", "median", "highest", "best")]
    kinds: dict[str, list[Any]] = {}
    for stat in report.stats:
        if stat.score is not None:
            kinds.setdefault(stat.kind, []).append(stat)
    for kind, stats in kinds.items():
        ordered = sorted(stats, key=lambda s: s.score)
        middle = ordered[(len(ordered) - 1) // 2]
        scores = (f"{s.score:.4g}" for s in (ordered[0], middle, ordered[-1]))
        rows.append((kind, str(len(stats)), *scores, ordered[-1].name))
    scored = sum(map(len, kinds.values()))
    head = f"{report.model_id or 'model'}: {scored} of {len(report.stats)} tensors scored by {report.criterion!r}"
    return "\n".join([head, *_table(rows), *(f"note: {note}" for note in report.notes)])


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("report", nargs="?", help="a report of `scan`, or a published SNR file")
    add("-o", "--output", metavar="FILE", help="write the plan there (.yaml or .json)")
    add("--gradients", metavar="FILE", help="of `probe`; for --criterion fisher and modes that need data")
    add("--diff", nargs=2, metavar=("A", "B"), help="compare two plans instead")
    _plan_options(parser)


def _plan(options: argparse.Namespace, rest: Rest) -> None:
    from .plan import diff_plans, explain, make_plan

    if options.diff:
        print(diff_plans(*(Plan.load(path) for path in options.diff)))
        return
    report = SnrReport.load(_required(options, "report", "REPORT"))
    check_writable(options.output)
    plan = make_plan(report, gradients=options.gradients, **given_plan_options(options))
    print(explain(plan, report))
    _write(plan, options.output)


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="hub id or folder; only its config is read")
    add("--plan", metavar="FILE", help="of `plan`: the memory of this one")
    add("--fit", metavar="SIZE", help="the largest ratio that fits into it, say 24GiB; -o writes its plan")
    add("--margin", type=float, metavar="SHARE", help="of the size that stays free; default 0.05")
    add(
        "--report",
        metavar="FILE",
        help="of `scan`; without it the plans take the first blocks of each kind, through which backward is longest",
    )
    add("--gradients", metavar="FILE", help="of `probe`; for modes that need data")
    add("-o", "--output", metavar="FILE", help="with --fit the plan, else the memory report, or the table as JSON")
    group = parser.add_argument_group("the step (defaults: what `train` does without flags, on one GPU)")
    add = group.add_argument
    add("--batch-size", type=_number_or_auto, metavar="N|auto", help="sequences at a time, on one device")
    add("--max-length", type=int, metavar="TOKENS", help="of a sequence")
    add("--optimizer", help="adamw_torch_fused, adamw_torch, adafactor, sgd or adamw_8bit")
    add(
        "--gradient-checkpointing", type=_boolean_or_auto, nargs="?", const=True, metavar="BOOL|auto",
        help="auto, with --fit: where nothing fits without",
    )  # fmt: skip
    add("--gradient-accumulation-steps", type=int, metavar="N")
    add("--device", help="whose kernels and allocator: cuda or cpu")
    add("--trainer", help="sft (TRL: the loss in chunks) or transformers (all logits at once)")
    add("--mixed-precision", help="auto (that of a 16-bit dtype), no, bf16 or fp16")
    switch(group, "--padding", help="batches hold padding, so that attention has a mask; default true")
    switch(group, "--peft", help="wrap by PEFT in every mode, as the trainers' peft_config does")
    add("--sharding", help="data_parallel, zero1, zero2, zero3 or fsdp2")
    add("--devices", type=int, metavar="N", help="that the training is sharded over")
    _load_options(parser)
    _plan_options(parser)


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _boolean_or_auto(text: str) -> bool | str:
    return text if text == "auto" else boolean(text)


_number_or_auto.__name__ = "number, or 'auto',"
# Flags of `memory` that describe the step, under the names of `memory.Step` and `estimate_memory`.
_STEP = (
    "batch_size", "max_length", "dtype", "optimizer", "gradient_checkpointing", "gradient_accumulation_steps",
    "quantization", "attn_implementation", "device", "trainer", "mixed_precision", "padding", "peft", "sharding", "devices",
)  # fmt: skip


def _memory(options: argparse.Namespace, rest: Rest) -> None:
    from . import memory

    model = _required(options, "model", "MODEL")
    if options.plan and options.fit:
        raise OptionError("--plan and --fit are both given: a plan is fixed, and a fit makes one. Give one of them.")
    if options.fit and options.output and not options.report:
        raise OptionError("--fit with -o writes a plan to train by, which needs the scores of a scan: give --report.")
    check_writable(options.output)
    where: dict[str, Any] = {"revision": options.revision, "trust_remote_code": bool(options.trust_remote_code)}
    given = {name: value for name in _STEP if (value := getattr(options, name)) is not None}
    for name in ("batch_size", "gradient_checkpointing"):
        if given.get(name) == "auto" and not options.fit:
            raise OptionError(f"--{name.replace('_', '-')} auto is for --fit, which looks for what fits.")
    settings = {**memory.usual_step(model, **where), **given, **where}
    print("each step: " + ", ".join(f"{k}={v}" for k, v in settings.items() if k not in where))
    if options.plan:
        found = memory.estimate_memory(model, Plan.load(options.plan), **settings)
        print(memory.describe_memory(found))
        _write(found, options.output)
        return
    chosen = given_plan_options(options)
    if options.report:
        report = SnrReport.load(options.report)
    else:
        report = memory.report_of_config(model, chosen.get("criterion", "first"), seed=chosen.get("seed", 0), **where)
    mode = chosen.pop("mode", None)
    if options.fit:
        margin = {} if options.margin is None else {"margin": options.margin}
        fit = memory.find_fit(
            model, report, mode=mode or "spectrum", budget=options.fit, gradients=options.gradients, **margin,
            **chosen, **settings,
        )  # fmt: skip
        print(fit.plan.notes[-1])
        print(memory.describe_memory(fit.memory))
        _write(fit.plan, options.output)
        return
    ratio = chosen.pop("spectrum_ratio", None)
    ratios = {} if ratio is None else {"ratios": [ratio]}
    rows = memory.memory_table(
        model, report, modes=None if mode is None else [mode], **ratios, gradients=options.gradients, plan_options=chosen,
        **settings,
    )  # fmt: skip
    print(memory.describe_table(rows))
    for note in dict.fromkeys(note for row in rows for note in row.memory.notes):
        print(f"note: {note}")
    if options.output:
        write_text(options.output, json.dumps([row.memory.to_dict() for row in rows], indent=1) + "\n")
        print(f"wrote {options.output}")


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("report", nargs="?", help="a report of `scan`, or a published SNR file")
    add("-o", "--output", metavar="FILE", help="the picture (.png, .pdf, .svg)")
    add("--plan", metavar="FILE", help="mark what this plan chose")
    add(
        "--components",
        nargs="+",
        metavar="PLAN",
        help="draw which singular components these plans of mode lorsa chose instead",
    )
    add("--matrix", metavar="NAME", help="draw the singular values of one matrix instead; needs --model")
    add("--model", metavar="MODEL", help="where the matrix is read from")


def _plot(options: argparse.Namespace, rest: Rest) -> None:
    from . import plots

    output = _required(options, "output", "-o")
    check_writable(output)
    if options.matrix:
        from .scan import spectrum_of

        figure = plots.spectrum(spectrum_of(_required(options, "model", "--model"), options.matrix))
    elif options.components:
        stems = [Path(path).stem for path in options.components]
        labels = stems if len(set(stems)) == len(stems) else options.components
        figure = plots.components(
            {label: Plan.load(path) for label, path in zip(labels, options.components, strict=True)}
        )
    else:
        report = SnrReport.load(_required(options, "report", "REPORT"))
        figure = plots.heat_map(report, plan=Plan.load(options.plan) if options.plan else None)
    plots.save(figure, output)
    print(f"wrote {output}")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", nargs="?", help="folder of a trained adapter, ours or a plain LoRA")
    add("--base", metavar="MODEL", help="folder or hub id; default: the base that the adapter names")
    add("-o", "--output", metavar="FOLDER", help="gets the merged checkpoint; must not exist, or be empty")
    add("--onto", default="original", help="original, or dequantized: the weights that a quantized base computed with")
    add("--dtype", help="of every floating tensor, bfloat16, ...; default: each keeps its own")
    add("--quantization", help="for --onto dequantized: how the base was loaded; default: as the training run noted")
    switch(parser, "--force", default=False, help="merge although the base is not the one that the plan was made for")


def _merge(options: argparse.Namespace, rest: Rest) -> None:
    from .export import merge_into_base

    report = merge_into_base(
        _required(options, "adapter", "ADAPTER"),
        options.base,
        _required(options, "output", "-o"),
        onto=options.onto,
        dtype=options.dtype,
        force=options.force,
        quantization=options.quantization,
    )
    print(report)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", nargs="?", help="folder of a trained adapter; for axolotl a plan file will do")
    add("--format", help="lora: a folder that plain peft opens; axolotl: a YAML file")
    add("-o", "--output", metavar="OUT", help="the folder, or the file")
    add("--quantization", help="axolotl: of the base: none, nf4, fp4 or int8; default: as the training run noted")


def _export(options: argparse.Namespace, rest: Rest) -> None:
    from .export import export_axolotl, export_lora

    adapter = _required(options, "adapter", "ADAPTER")
    output = _required(options, "output", "-o")
    chosen = _required(options, "format", "--format")
    if chosen == "lora":
        if options.quantization is not None:
            raise OptionError("--quantization is for --format axolotl; a LoRA is the same on every base.")
        export_lora(adapter, output)
    elif chosen == "axolotl":
        check_writable(output)
        export_axolotl(adapter, output, quantization=options.quantization)
    else:
        raise OptionError(f"--format is {chosen!r}." + near_matches(chosen, ("lora", "axolotl")))
    print(f"wrote {output}")


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="hub id or folder of a model, or the folder of a trained adapter")
    add("-o", "--output", metavar="FILE", help="write the gradients there (.json)")
    add("--samples", type=int, metavar="N", help="rows that are measured; default 256")
    add("--batch-size", type=int, metavar="N", help="samples at a time; the result does not depend on it; default 8")
    add("--directions", type=int, metavar="N", help="gradient directions that are compared; 0: none; default 8")
    add(
        "--svd-rank",
        type=int,
        metavar="K",
        help="singular components whose importance is measured, for mode lorsa; default 0",
    )
    add("--seed", type=int, default=0, help="of the draw of rows and of the sketches")
    _data_options(parser)
    _load_options(parser)


def _probe(options: argparse.Namespace, rest: Rest) -> None:
    from . import training

    _required(options, "model", "MODEL")
    _required(options, "dataset", "--dataset")
    check_writable(options.output)
    report = training.probe(options)
    print(describe_gradients(report))
    _write(report, options.output)


def describe_gradients(report: GradientReport) -> str:
    """A table by kind: Fisher mass, and how alike neighbours' gradients are where they were compared."""
    rows = [("kind", "matrices", "lowest", "median", "highest", "neighbours alike", "best")]
    alike = {}
    for s in report.similarities:
        steps = [s.subspace[i][i + 1] for i in range(len(s.names) - 1)]
        alike[s.kind] = f"{sum(steps) / len(steps):.2f}"
    kinds: dict[str, list[Any]] = {}
    for stat in report.stats:
        kinds.setdefault(stat.kind, []).append(stat)
    for kind, stats in kinds.items():
        ordered = sorted(stats, key=lambda s: report.scores[s.name])
        middle = ordered[(len(ordered) - 1) // 2]
        masses = (f"{report.scores[s.name]:.3g}" for s in (ordered[0], middle, ordered[-1]))
        rows.append((kind, str(len(stats)), *masses, alike.get(kind, "-"), ordered[-1].name))
    head = f"{report.model_id or 'model'}: Fisher mass of {len(report.stats)} matrices on {report.samples} samples"
    return "\n".join([f"{head}, mean loss {report.loss:.4f}", *_table(rows)])


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="MODEL", help="hub id or folder of the base")
    add("--output-dir", metavar="FOLDER", help="gets the model or adapter, the plan, the report and train_results.json")
    add("--report", metavar="FILE", help="of `scan`; without it the model is scanned")
    add("--plan", metavar="FILE", help="of `plan`; it wins over the report and the plan options")
    add(
        "--gradients",
        metavar="FILE",
        help="of `probe`; without it the first training rows are probed where it is needed",
    )
    add("--calibration-samples", type=int, metavar="N", help="training rows that are probed; default 256")
    switch(parser, "--force", default=False, help="use a report or plan although its fingerprint differs")
    switch(parser, "--help-trainer", default=False, help="list the flags of the task's own training arguments")
    _data_options(parser)
    add("--eval-dataset", metavar="D", help="judge on these rows before and after training")
    add("--eval-split", metavar="S", help="judge on this split of --dataset (or of --eval-dataset)")
    _load_options(parser)
    _plan_options(parser)
    lora = parser.add_argument_group("adapters, as in peft.LoraConfig")
    add = lora.add_argument
    add("--lora-dropout", type=float, metavar="P")
    switch(lora, "--use-dora")
    add("--bias", help="none, all or lora_only")
    add("--target-modules", nargs="+", metavar="NAME", help="narrow the candidates to these modules")
    add("--exclude-modules", nargs="+", metavar="NAME", help="leave these modules out")
    add("--layers-to-transform", nargs="+", type=int, metavar="N", help="narrow the candidates to these blocks")
    add("--modules-to-save", nargs="+", metavar="NAME", help="train these modules whole")
    add(
        "--peft-config",
        metavar="FILE",
        help="a method of PEFT's own instead of a mode: peft_type and its fields, YAML or JSON",
    )


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="folder of a trained adapter or model, or a hub id")
    add("-o", "--output", metavar="FILE", help="write the metrics there as JSON")
    add("--generate", nargs="+", metavar="METRIC", help="complete the prompts and judge the text: exact_match, rouge_l")
    add("--max-new-tokens", type=int, metavar="TOKENS", help="of a completion; default 256")
    switch(parser, "--help-trainer", default=False, help="list the flags of the task's own training arguments")
    _data_options(parser)
    _load_options(parser)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", metavar="FOLDER", default="demo_output", help="default demo_output")
    add("--steps", type=int, default=None, help="optimizer steps of each mode")


def _demo(options: argparse.Namespace, rest: Rest) -> None:
    from .demo import run

    run(Path(options.output), **({} if options.steps is None else {"steps": options.steps}))


# --- train and evaluate ----------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, rest: Rest) -> None:
    from . import training

    if options.help_trainer:
        print(training.trainer_help(options.task or "causal_lm"))
        return
    for name in ("model", "dataset", "output_dir"):
        _required(options, name, f"--{name.replace('_', '-')}")
    check_writable(Path(options.output_dir) / "model.safetensors")
    results = training.train(options, rest, given_plan_options(options), flags_of(verb_parser("train")))
    print(training.describe_training(results))


def _evaluate(options: argparse.Namespace, rest: Rest) -> None:
    from . import training

    if options.help_trainer:
        print(training.trainer_help(options.task or "causal_lm"))
        return
    _required(options, "model", "MODEL")
    _required(options, "dataset", "--dataset")
    check_writable(options.output)
    metrics = training.evaluate_saved(options, rest, flags_of(verb_parser("evaluate")))
    text = json.dumps(metrics, indent=1) + "\n"
    if options.output:
        write_text(options.output, text)
    print(text, end="")


# --- compare ---------------------------------------------------------------------------------------------------------

_COMPARE_LISTS = {
    "modes": str,
    "ratios": float,
    "criteria": str,
    "seeds": int,
    "learning-rates": float,
    "controls": str,
}
# Of a training run, and of no use where its result is only judged.
_EVAL_KEYS = ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end", "metric_for_best_model")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-o",
        "--output-dir",
        metavar="FOLDER",
        help="gets the cells, results.json, results.csv, results.md, report.html",
    )
    for name, kind in _COMPARE_LISTS.items():
        add(f"--{name}", nargs="*" if name == "controls" else "+", type=kind, metavar=name.upper().replace("-", "_"))
    add("--metric", help="what the report ranks by; default accuracy for classification, else loss")
    switch(parser, "--list", default=False, help="say which cells there are and which are finished; run nothing")
    add("--cell", metavar="FOLDER", help="run one cell that a comparison has prepared, in this process")


def _compare(options: argparse.Namespace, rest: Rest) -> None:
    from . import compare, training

    if options.cell:
        _run_cell(Path(options.cell))
        return
    config = dict(rest.config or {})
    given = {key: config.pop(key) for key in list(config) if key in compare.KEYS}
    for key in compare.KEYS:
        if getattr(options, key, None) is not None:
            given[key] = getattr(options, key)
    output = options.output_dir or config.pop("output_dir", None)
    config.pop("output_dir", None)
    if not isinstance(output, str) or not output:
        raise OptionError(
            "--output-dir is missing." if output is None else f"output_dir is {output!r}, wanted a folder."
        )
    for word in rest.argv:
        key = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and key in compare.KEYS:
            raise OptionError(f"{word}: {key} has no flag; it stands in the file that --config names.")
    shared, trainer = _train_options(config, rest.argv, rest.source)
    for name in ("model", "dataset"):
        _required(shared, name, f"--{name}")
    check_writable(Path(output) / "report.html")
    train = {name: value for name, value in vars(shared).items() if not (value is None or value is False)}
    comparison = compare.read_comparison(
        given, train={**train, **(trainer.config or {})}, arguments=trainer.argv, task=training.task_for(shared),
        output=Path(output), source=rest.source,
    )  # fmt: skip
    if options.list:
        print(compare.list_cells(comparison, check=_checker(comparison)))
        return
    results = compare.run_comparison(comparison, check=_checker(comparison))
    print()
    print(compare.as_markdown(results))
    print(f"wrote {output}/report.html, results.json, results.csv, results.md")


def _train_options(config: dict[str, Any], argv: Sequence[str], source: str) -> tuple[argparse.Namespace, Rest]:
    """Flags of `train` from a mapping and a command line, and what goes to the trainer's own arguments."""
    parser = verb_parser("train")
    unknown = set_defaults_from(parser, source, config)
    options, rest = parser.parse_known_args(list(argv))
    return options, Rest(tuple(rest), unknown, source)


def _checker(comparison: Any) -> Callable[[Any], None]:
    """What refuses a cell's settings before any cell is run; datasets are read once."""
    from . import compare, training

    training.quiet_progress()
    flags = [*flags_of(verb_parser("train")), *(f"--{key}" for key in (*_COMPARE_LISTS, "metric"))]
    read: dict[Any, Any] = {}

    def check(cell: Any) -> None:
        options, rest = _train_options(dict(cell.train), cell.arguments, comparison.source)
        options.output_dir = str(comparison.output)
        data = tuple(v for k, v in vars(options).items() if k.endswith(("dataset", "split", "column", "task")))
        with tempfile.TemporaryDirectory() as scratch:
            if cell.peft is not None:
                options.peft_config = str(Path(scratch) / "peft.json")
                write_text(options.peft_config, json.dumps(dict(cell.peft)))
            run = training.settle(options, rest, given_plan_options(options), flags, read.get(data))
        if data not in read:
            compare.check_measures(comparison, run)
        read[data] = run.train_rows, run.eval_rows

    return check


def _run_cell(folder: Path) -> None:
    from . import compare

    settings, cell = read_mapping(folder / "train.yaml"), read_mapping(folder / "cell.json")

    def train() -> None:
        _run(["train", "--config", str(folder / "train.yaml"), *cell["arguments"]])

    def options_for(model: str) -> tuple[argparse.Namespace, Rest, list[str]]:
        config = {key: value for key, value in settings.items() if key not in _EVAL_KEYS}
        options, rest = _train_options(config, cell["arguments"], str(folder / "train.yaml"))
        options.model = model
        return options, rest, flags_of(verb_parser("train"))

    compare.measure(folder, train=train, options_for=options_for)


# --- putting it together ---------------------------------------------------------------------------------------------

VERBS: dict[str, Verb] = {
    "scan": Verb(
        "scan MODEL [-o FILE] [flags]",
        "score every matrix of a checkpoint; streams the files, loads no model",
        "scan HuggingFaceTB/SmolLM2-135M-Instruct -o report.json",
        _scan_arguments,
        _scan,
    ),
    "probe": Verb(
        "probe MODEL --dataset D [-o FILE] [flags]",
        "measure gradients on data: for --criterion fisher, and for modes that need data",
        "probe HuggingFaceTB/SmolLM2-135M-Instruct --dataset train.jsonl -o gradients.json",
        _probe_arguments,
        _probe,
    ),
    "plan": Verb(
        "plan REPORT [-o FILE] [flags]   |   plan --diff A B",
        "decide what trains, from a report; or compare two plans",
        "plan report.json --mode spectrum --ratio 0.25 -o plan.yaml",
        _plan_arguments,
        _plan,
    ),
    "train": Verb(
        "train --model MODEL --dataset D --output-dir FOLDER [flags]",
        "train a model in any mode; takes every flag of the trainer's own arguments too",
        "train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset train.jsonl --mode spectrum --ratio 0.25 "
        "--output-dir out --num-train-epochs 1",
        _train_arguments,
        _train,
        passes_on=True,
    ),
    "evaluate": Verb(
        "evaluate MODEL --dataset D [-o FILE] [flags]",
        "loss, perplexity and accuracy of a model or adapter on a dataset",
        "evaluate out --dataset validation.jsonl -o metrics.json",
        _evaluate_arguments,
        _evaluate,
        passes_on=True,
    ),
    "compare": Verb(
        "compare --config FILE [flags]   |   compare --model MODEL --dataset D -o FOLDER [flags]",
        "train in every mode, and in ways that a claim must beat, on your own task; tables, pictures and a report",
        "compare --config compare.yaml",
        _compare_arguments,
        _compare,
        passes_on=True,
        reads_config=True,
    ),
    "merge": Verb(
        "merge ADAPTER -o FOLDER [--base MODEL] [flags]",
        "write a plain checkpoint: the base's shards with a trained adapter merged in",
        "merge out --base HuggingFaceTB/SmolLM2-135M-Instruct -o merged",
        _merge_arguments,
        _merge,
    ),
    "export": Verb(
        "export ADAPTER --format lora|axolotl -o OUT",
        "write an adapter as a LoRA for plain peft, or its plan as a config for axolotl",
        "export out --format lora -o lora",
        _export_arguments,
        _export,
    ),
    "memory": Verb(
        "memory MODEL [--plan FILE | --fit SIZE] [-o FILE] [flags]",
        "what training needs at its peak, by a dry run; the largest ratio that fits a card; a table of modes and ratios",
        "memory meta-llama/Llama-3.1-8B --fit 24GiB --batch-size 2 --max-length 1024",
        _memory_arguments,
        _memory,
    ),
    "plot": Verb(
        "plot REPORT -o FILE [--plan PLAN]   |   plot --matrix NAME --model MODEL -o FILE   |   plot --components PLANS -o FILE",
        "draw the scores of a report by layer and kind, the spectrum of one matrix, or the components that plans chose",
        "plot report.json --plan plan.yaml -o scores.png",
        _plot_arguments,
        _plot,
    ),
    "demo": Verb(
        "demo [-o FOLDER]",
        "scan, plan and train a real 135M model three ways, with a table and pictures at the end",
        "demo -o demo_output",
        _demo_arguments,
        _demo,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (a failure that is not an input error raises)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # For developers of the libraries below; a user of the command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy, level in {
        "httpx": "WARNING",
        "datasets": "WARNING",
        "filelock": "WARNING",
        "bitsandbytes": "ERROR",
    }.items():
        logging.getLogger(noisy).setLevel(level)
    try:
        # What asks a process to end, a scheduler or `timeout`, lets it clean up as Ctrl-C does.
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        _run(argv)
    except SpectrumError as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(_overview())
        return
    if argv[0] in {"-V", "--version"}:
        print(f"{PROG} {__version__}")
        return
    name = argv[0]
    if name not in VERBS:
        raise OptionError(f"{name!r} is not a command." + near_matches(name, VERBS))
    verb = VERBS[name]
    parser = verb_parser(name)
    config = take_config(argv := dashed(argv[1:]))
    unknown = {} if not config else config[1] if verb.reads_config else set_defaults_from(parser, *config)
    options, rest = parser.parse_known_args(argv)
    source = config[0] if config else "command line"
    if not verb.passes_on:
        for key in unknown:
            raise OptionError(f"{source}: unknown key {key!r}." + near_matches(key, keys_of(parser)))
        if rest:
            raise OptionError(f"{name}: unknown argument {rest[0]!r}." + near_matches(rest[0], flags_of(parser)))
    verb.run(options, Rest(tuple(rest), unknown, source))


def _overview() -> str:
    lines = [f"{PROG} {__version__}: selective fine-tuning by weight spectrum", "", "commands:"]
    lines += [f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "examples:", *(f"  {PROG} {verb.example}" for verb in VERBS.values())]
    lines += ["", f"{PROG} COMMAND --help lists a command's flags. --config FILE reads them from YAML."]
    return "\n".join(lines)


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one verb, with `--config`."""
    verb = VERBS[name]
    epilog = f"example:\n  {PROG} {verb.example}"
    if verb.passes_on:
        epilog += (
            "\n\nEvery other flag goes to the trainer's own arguments: TRL's SFTConfig (causal_lm), transformers' "
            "Seq2SeqTrainingArguments\n(seq2seq) or TrainingArguments (classification). --help-trainer lists them."
        )
    parser = Parser(prog=f"{PROG} {name}", usage=f"{PROG} {verb.usage}", description=verb.summary, epilog=epilog)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with these flags as keys; flags win")
    verb.arguments(parser)
    return parser


def given_plan_options(options: argparse.Namespace) -> dict[str, Any]:
    """The plan options that were given, under the names of `make_plan`."""
    from .plan import OPTIONS

    return {name: value for name in OPTIONS if (value := getattr(options, name, None)) is not None}


def _required(options: argparse.Namespace, name: str, flag: str) -> Any:
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
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, wanted the name of a file.")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written, {folder} refuses ({error.strerror}).") from error


def _write(record: SnrReport | GradientReport | Plan | MemoryReport, output: str | None) -> None:
    if output is not None:
        record.save(output)
        print(f"wrote {output}")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first and last column to the left, numbers between them to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
