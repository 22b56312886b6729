"""Text that a model writes: greedy completions of prompts, how good they are, and how fast they come.

torch and rouge-score are imported inside functions.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data import render, tokenizing
from ..errors import DataError, InstallError, OptionError, near_matches
from .fitting import writing

MAX_NEW_TOKENS = 256
# One text for a prompt, as token ids, word after word: whatever the checkpoint's generation config says of beams and outputs.
ONE_TEXT: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
_BATCH = 8
# The answer of a gsm8k solution: what stands after `####` (Cobbe et al. 2021, arXiv:2110.14168, section 2).
_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def final_answer(text: str) -> str | None:
    """The number after the last `####`, without thousands separators and without zeros that say nothing.

    Returns:
        None where there is no such number.
    """
    found = _ANSWER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    digits = digits.lstrip("0") or "0"
    digits = f"0{digits}" if digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits


def exact_match(completions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of completions that give the reference's answer, and of those that answer at all.

    Where a reference ends in `#### N`, that number is the answer; elsewhere it is the whole text, runs of white space taken
    as one space and none at the ends.
    """
    hits = answered = 0
    for text, reference in zip(completions, references, strict=True):
        wanted, given = final_answer(reference), final_answer(text)
        if wanted is None:
            wanted, given = " ".join(reference.split()), " ".join(text.split()) or None
        hits += given == wanted
        answered += given is not None
    return {"exact_match": hits / len(references), "answered": answered / len(references)}


def rouge_l(completions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of the longest common subsequence of words, stemmed (Lin 2004), by the package rouge-score.

    Raises:
        InstallError: rouge-score is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InstallError("ROUGE-L needs rouge-score: pip install 'spectrum-peft[eval]'.") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(completions, references, strict=True)]
    return {"rouge_l": sum(scores) / len(scores)}


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
}


def check_metric(name: str) -> None:
    """Raises:
    OptionError: no such metric. InstallError: what it needs is not installed.
    """
    if name not in METRICS:
        raise OptionError(f"metric is {name!r}." + near_matches(name, METRICS))
    METRICS[name](["#### 1"], ["#### 1"])  # a missing package shows now and not after hours of training


def check_rows(rows: Any, source: str) -> None:
    """
    Raises:
        DataError: there is nothing to complete.
    """
    if not {"messages", "prompt"} & set(rows.column_names):
        raise DataError(_NO_PROMPT.format(source=source, columns=rows.column_names))


_NO_PROMPT = "{source}: generation needs prompt and completion, or messages; it has {columns}."


def prompts_of(rows: Any, tokenizer: Any, source: str, *, template: bool = True) -> tuple[list[str], list[str], bool]:
    """What is to be completed, as the trainer shows it to the model, and the completions that were written by hand.

    Args:
        rows: dataset with `prompt` and `completion` (strings or messages), or `messages` that end in an answer.
        template: strings are turns of a user where the tokenizer has a chat template, as in `data.encode_row`.
    Returns:
        (prompts, completions, whether the prompts come from the chat template).
    Raises:
        DataError: there is nothing to complete.
    """
    if "messages" in rows.column_names:
        pairs = [(row[:-1], row[-1]["content"]) for row in rows["messages"]]
    elif "prompt" in rows.column_names:
        last = [c if isinstance(c, str) else c[-1]["content"] for c in rows["completion"]]
        pairs = list(zip(rows["prompt"], last, strict=True))
    else:
        raise DataError(_NO_PROMPT.format(source=source, columns=rows.column_names))
    chat = not isinstance(pairs[0][0], str) or (template and tokenizer.chat_template is not None)
    prompts = []
    for prompt, _ in pairs:
        if chat:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = str(render(turns, {}, tokenizer, add_generation_prompt=True, tokenize=False))
        prompts.append(prompt)
    return prompts, [reference for _, reference in pairs], chat


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = _BATCH,
    chat: bool = False,
) -> list[str]:
    """Greedy completions, without the prompts and special tokens.

    Args:
        chat: the prompts come from a chat template, which has written the special tokens.
    Raises:
        CheckpointError: the model gives no numbers.
    """
    import torch

    from .finite import Numbers

    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Long ones together: a batch is as long as its longest prompt.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    try:
        for at in range(0, len(order), batch_size):
            own = order[at : at + batch_size]
            inputs = _encoded(model, tokenizer, [prompts[i] for i in own], chat)
            with torch.no_grad(), writing(model):
                output = model.generate(
                    **inputs, **_greedy(tokenizer), max_new_tokens=max_new_tokens, logits_processor=[Numbers(model)]
                )
            if not model.config.is_encoder_decoder:
                output = output[:, inputs["input_ids"].shape[1] :]
            with tokenizing("the tokenizer cannot read what was written"):
                written = tokenizer.batch_decode(output, skip_special_tokens=True)
            for i, text in zip(own, written, strict=True):
                texts[i] = text
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
    return texts


def _encoded(model: Any, tokenizer: Any, texts: list[str], chat: bool) -> dict[str, Any]:
    with tokenizing():
        inputs = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=not chat)
    return {k: inputs[k].to(model.device) for k in ("input_ids", "attention_mask") if k in inputs}


def _greedy(tokenizer: Any) -> dict[str, Any]:
    """Whatever the checkpoint's generation config says of sampling."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {**ONE_TEXT, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad}


def judge(
    model: Any,
    tokenizer: Any,
    rows: Any,
    metrics: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = _BATCH,
    source: str = "the dataset",
    template: bool = True,
) -> dict[str, float]:
    """Complete the prompts of a dataset and judge the text.

    Args:
        metrics: keys of `METRICS`. template: as in `prompts_of`.
    Returns:
        The values of the metrics, each in [0, 1], and `generated_rows`.
    Raises:
        OptionError, DataError, InstallError.
    """
    for name in metrics:
        check_metric(name)
    prompts, references, chat = prompts_of(rows, tokenizer, source, template=template)
    texts = complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, chat=chat)
    found: dict[str, float] = {}
    for name in metrics:
        found |= METRICS[name](texts, references)
    return {**found, "generated_rows": len(texts)}


def speed(model: Any, tokenizer: Any, prompt: str, *, tokens: int, repeats: int = 3) -> dict[str, Any]:
    """How fast one text is written, token by token, at batch size 1.

    Args:
        tokens: that are written each time, whatever the model would stop at.
    Returns:
        tokens_per_second (median of the repeats, prompt included in the time), and the repeats.
    """
    import torch

    from ..devices import synchronize

    inputs = _encoded(model, tokenizer, [prompt], chat=False)
    fixed: Mapping[str, Any] = {**_greedy(tokenizer), "max_new_tokens": tokens, "min_new_tokens": tokens}
    rates = []
    with torch.no_grad():
        model.generate(**inputs, **{**fixed, "max_new_tokens": 2, "min_new_tokens": 2})
        for _ in range(repeats):
            began = time.perf_counter()
            model.generate(**inputs, **fixed)
            synchronize()
            rates.append(tokens / (time.perf_counter() - began))
    return {"tokens_per_second": statistics.median(rates), "repeats": rates}
