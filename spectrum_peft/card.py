"""The model card of a folder: what was trained from what, on what, by which means, how well, and how it is loaded.

Everything is read from the files of the folder: `train_results.json`, `spectrum_plan.yaml`, `adapter_config.json`,
`config.json`. Metadata is huggingface_hub's, whose checks the hub makes, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .errors import SpectrumError
from .machine import versions
from .records import PLAN_FILE, REPORT_FILE, RESULTS_FILE, Plan, SnrReport, checked, read_mapping, write_text
from .records.schema import Count, Finite, Name, NotNegative, Place, Text

CARD, PICTURE = "README.md", "spectrum_plan.png"
_WRITING, _CLASSIFYING = ("text-generation", "ForCausalLM"), ("text-classification", "ForSequenceClassification")
# Task -> the hub's name of it, ending of the class that loads a model for it.
_TASKS = {
    **dict.fromkeys(("causal_lm", "dpo", "kto", "grpo"), _WRITING),
    **dict.fromkeys(("classification", "multi_label", "regression", "reward"), _CLASSIFYING),
    "seq2seq": ("text2text-generation", "ForSeq2SeqLM"),
    "token_classification": ("token-classification", "ForTokenClassification"),
}


def write_card(
    folder: Path,
    *,
    records: Path | None = None,
    name: str | None = None,
    merged_from: str | None = None,
    base: str | None = None,
) -> Path:
    """Write the README.md of a folder that holds a trained adapter or checkpoint, and the picture of its plan.

    Args:
        records: folder with the results, plan and report of the run; None for the same one.
        name: of the folder, where it has another one while it is made.
        merged_from: the adapter that was merged into it. base: of that adapter, where the folder does not say it.
    Returns:
        the card's path.
    """
    records = records or folder
    results = results_of(records)
    plan = Plan.load(records / PLAN_FILE) if (records / PLAN_FILE).is_file() else None
    picture = _draw(records, plan, folder / PICTURE)
    text = card_of(folder, results, plan, name=name or folder.name, picture=picture, merged_from=merged_from, base=base)
    write_text(folder / CARD, text)
    return folder / CARD


@dataclass(frozen=True)
class _Results:
    """The fields of train_results.json that a card shows."""

    model: Place | None = None
    task: Name | None = None
    mode: Name | None = None
    dataset: Text | None = None
    dtype: Name | None = None
    quantization: Name | None = None
    trainable_parameters: Count | None = None
    total_parameters: Count | None = None
    steps: Count | None = None
    input_tokens: Count | None = None
    seed: Count | None = None
    peak_memory_bytes: NotNegative | None = None
    learning_rate: NotNegative | None = None
    seconds_per_step: NotNegative | None = None
    before: dict[Name, Finite | Name | None] | None = None
    after: dict[Name, Finite | Name | None] | None = None


def results_of(folder: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: a field of `_Results` that is none.
    """
    found = _mapping(folder / RESULTS_FILE)
    checked(found, _Results, folder / RESULTS_FILE)
    return found


def _mapping(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}


def _draw(records: Path, plan: Plan | None, path: Path) -> str | None:
    """The heat map of the scores with what was chosen, where there are scores and matplotlib."""
    if plan is None or not (records / REPORT_FILE).is_file():
        return None
    from . import plots

    try:
        plots.save(plots.heat_map(SnrReport.load(records / REPORT_FILE), plan), path)
    except SpectrumError:  # no matplotlib, or scores that cannot be drawn: a card without a picture
        return None
    return PICTURE


def card_of(
    folder: Path,
    results: Mapping[str, Any],
    plan: Plan | None,
    *,
    name: str,
    picture: str | None = None,
    merged_from: str | None = None,
    base: str | None = None,
) -> str:
    """The text of the card.

    Args:
        results: what `train` noted; may be empty. plan: of the run, or None for a method without one.
        picture: file name in the folder. Others: as `write_card`.
    """
    adapter = _mapping(folder / "adapter_config.json")
    config = _mapping(folder / "config.json")
    base = base or results.get("model") or adapter.get("base_model_name_or_path") or (plan.model_id if plan else None)
    task = results.get("task")
    lines = [_metadata(adapter, base, results), f"# {name}", ""]
    lines.append(_summary(adapter, plan, results, base, merged_from))
    if plan is not None and plan.revision:
        lines.append(f"The base's revision is `{plan.revision}`.")
    lines += ["", "## Use", "", "```python", _snippet(name, adapter, config, task, base), *_answer(folder, task), "```"]
    rows = _rows(plan, results)
    if rows:
        lines += ["", "## How it was trained", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in rows]
    if picture:
        lines += ["", f"![How high each matrix of the base scores within its kind; what trained has a dot]({picture})"]
    if results.get("after"):
        lines += ["", "## How good it is", "", "| on the evaluation rows | before | after |", "| --- | --- | --- |"]
        before = results.get("before") or {}
        for name, value in results["after"].items():
            if name not in {"tokens", "examples", "tags"}:
                lines.append(f"| {name.replace('_', ' ')} | {_number(before.get(name))} | {_number(value)} |")
        if said := _judged(adapter, results, merged_from):
            lines += ["", said]
    lines += ["", "## Made with", ""]
    used = {"spectrum_peft": __version__, **versions()}
    lines.append(", ".join(f"{name} {found}" for name, found in used.items() if name not in {"numpy", "scipy"}) + ".")
    if (folder / PLAN_FILE).is_file():
        lines.append(f"`{PLAN_FILE}` lists what happened to each matrix.")
    return "\n".join(lines) + "\n"


def _metadata(adapter: Mapping[str, Any], base: str | None, results: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    named = base if base and not Path(base).exists() else None  # a folder of this machine means nothing to a reader
    dataset = results.get("dataset")
    data = ModelCardData(
        base_model=named,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_TASKS.get(str(results.get("task")), (None, ""))[0],
        datasets=[dataset]
        if dataset and not Path(str(dataset)).exists() and "." not in Path(str(dataset)).suffix
        else None,
        tags=[
            "spectrum_peft",
            *([str(results["mode"])] if results.get("mode") else []),
            *(["lora"] if adapter else []),
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _summary(
    adapter: Mapping[str, Any], plan: Plan | None, results: Mapping[str, Any], base: str | None, merged_from: str | None
) -> str:
    origin = f"`{base}`" if base else "a base that its files do not name"
    if merged_from:
        return f"{origin} with the adapter `{Path(merged_from).name}` merged into it: a plain checkpoint."
    what = "An adapter for" if adapter else "A plain checkpoint, fine-tuned from"
    trained, total = results.get("trainable_parameters"), results.get("total_parameters")
    share = f"; {trained:,} of {total:,} parameters trained ({trained / total:.2%})" if trained and total else ""
    means = f", mode `{results['mode']}` of spectrum_peft" if plan is not None and results.get("mode") else ""
    return f"{what} {origin}{means}{share}."


def _rows(plan: Plan | None, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, Any]] = [("data", results.get("dataset") and f"`{Path(str(results['dataset'])).name}`")]
    rows.append(("method", results.get("mode")))
    trained, total = results.get("trainable_parameters"), results.get("total_parameters")
    if plan is not None:
        amounts = {name: plan.options.get(name) for name in ("spectrum_ratio", "snr_threshold", "trainable_parameters")}
        chosen = [f"{name} {value:g}" for name, value in amounts.items() if value is not None]
        rows += [("chosen by", f"criterion {plan.criterion}, {chosen[0]}" if chosen else None)]
        rows += [("matrices that train", f"{len(plan.trainable_names)} of {len(plan.entries)}")]
        ranks = Counter(entry.rank for entry in plan.entries if entry.trains and entry.rank)
        each = [f"{rank} in {n} of them" for rank, n in sorted(ranks.items(), reverse=True)]
        rows += [("rank", f"{next(iter(ranks))}" if len(ranks) == 1 else ", ".join(each))]
    rows += [
        ("parameters that train", f"{trained:,} of {total:,} ({trained / total:.2%})" if trained and total else None)
    ]
    if plan is not None and plan.fingerprint is not None and plan.fingerprint.content:
        rows += [("digest of the base's weights", f"`{plan.fingerprint.content[:16]}`")]
    steps, tokens = results.get("steps"), results.get("input_tokens")
    rows += [
        ("base held in", results.get("quantization") if results.get("quantization") not in (None, "none") else None),
        ("dtype", results.get("dtype")),
        ("learning rate", _number(results.get("learning_rate")) if results.get("learning_rate") else None),
        ("steps", f"{steps:,}" + (f", {tokens:,} tokens without padding" if tokens else "") if steps else None),
        (
            "seconds a step, median",
            _number(results.get("seconds_per_step")) if results.get("seconds_per_step") else None,
        ),
        (
            "peak memory",
            f"{results['peak_memory_bytes'] / 2**30:.2f} GiB" if results.get("peak_memory_bytes") else None,
        ),
        ("seed", results.get("seed")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None and value != ""]


def _judged(adapter: Mapping[str, Any], results: Mapping[str, Any], merged_from: str | None) -> str:
    """In what form the model was judged, where that is not the one that lies in the folder."""
    held = results.get("quantization")
    held = f"its base held in {held}, as in training" if held not in (None, "none") else ""
    if merged_from:
        before = "Judged was the adapter before it was merged" + (f", {held}" if held else "")
        return f"{before}; `spectrum-peft evaluate` judges this folder."
    return f"Judged with {held}; on another base the figures are others." if held and adapter else ""


def _answer(folder: Path, task: Any) -> list[str]:
    """Lines that let a model that talks answer."""
    if _TASKS.get(str(task)) != _WRITING or not (folder / "chat_template.jinja").is_file():
        return []
    return [
        "",
        'messages = [{"role": "user", "content": "What is a norm?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "answer = model.generate(**inputs, max_new_tokens=100)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else str(value)


def snippet(folder: Path, name: str, base: str | None = None) -> str:
    """Code that loads what a folder holds, from where it is called `name`."""
    results = results_of(folder)
    adapter, config = _mapping(folder / "adapter_config.json"), _mapping(folder / "config.json")
    return _snippet(name, adapter, config, results.get("task"), base or adapter.get("base_model_name_or_path"))


def _snippet(
    folder: str, adapter: Mapping[str, Any], config: Mapping[str, Any], task: str | None, base: str | None
) -> str:
    """Code that loads this folder, with what is installed beside transformers in its first lines."""
    name = json.dumps(folder)
    endings = [ending for _, ending in _TASKS.values()]
    suffix = _TASKS.get(str(task), (None, ""))[1] or next(
        (s for s in endings for a in config.get("architectures") or () if a.endswith(s)), "ForCausalLM"
    )
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    if not adapter:
        load = f"model = AutoModel{suffix}.from_pretrained({name})"
        return f"from transformers import AutoModel{suffix}, AutoTokenizer\n\n{load}\n{tokenizer}"
    known = "" if adapter.get("peft_type") == "LORA" else "import spectrum_peft  # makes PEFT know the method\n"
    where = "" if base and not Path(base).exists() else "  # its base is looked for where it was trained from"
    labels = (
        f", num_labels={len(config['id2label'])}"
        if suffix in ("ForSequenceClassification", "ForTokenClassification") and "id2label" in config
        else ""
    )
    load = f"model = AutoPeftModel{suffix}.from_pretrained({name}{labels}){where}"
    classes = f"from peft import AutoPeftModel{suffix}\nfrom transformers import AutoTokenizer"
    return f"{known}{classes}\n\n{load}\n{tokenizer}"
