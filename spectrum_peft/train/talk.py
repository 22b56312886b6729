"""Talking to what was trained: text as it is written, and the untrained base beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer, set_seed

from ..data import render, tokenizing
from ..errors import CheckpointError, DataError, OptionError
from ..records import RESULTS_FILE, read_mapping
from .finite import Numbers
from .fitting import writing
from .generation import ONE_TEXT
from .saved import Saved

Message = dict[str, str]


class Answer(NamedTuple):
    """What a model wrote.

    Attributes:
        text: without the prompt and special tokens. cut: why it ends where it does, if the model did not end it.
    """

    text: str
    cut: str | None


class _Pieces(TextStreamer):
    """Hands on text as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None], skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.take(text)


def prompt_for(tokenizer: Any, messages: Sequence[Message], source: str) -> str:
    """Messages as the tokenizer's chat template writes them, up to where the answer begins.

    Raises:
        DataError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{source}: its tokenizer has no chat template; use `generate --raw`, which gives the text as it is."
        )
    try:
        return str(render(messages, {}, tokenizer, add_generation_prompt=True, tokenize=False))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def check_writing(max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
    """
    Raises:
        OptionError: temperature below 0, top_p outside (0, 1], max_new_tokens below 1.
    """
    if not 0 <= temperature < math.inf:
        raise OptionError(f"temperature is {temperature:g}, wanted a number of at least 0.")
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p is {top_p:g}, wanted a share in (0, 1].")
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}, wanted at least 1.")


def write(
    saved: Saved,
    prompt: str,
    take: Callable[[str], None],
    *,
    templated: bool,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Answer:
    """Let the model write on from a prompt.

    Args:
        take: gets the text piece by piece, as it is written.
        templated: the prompt comes from a chat template, which has written the special tokens.
        temperature: 0 takes the most probable token each time; above, tokens are drawn.
        top_p: tokens are drawn from the smallest set with this probability. seed: of the drawing.
    Raises:
        OptionError: temperature below 0, top_p outside (0, 1], max_new_tokens below 1.
        DataError: the prompt is no UTF-8, holds no token, or leaves no room for an answer.
        CheckpointError: the model gives no numbers.
    """
    check_writing(max_new_tokens, temperature, top_p)
    model, tokenizer = saved.model, saved.tokenizer
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # what the shell gave that was no UTF-8
        raise DataError("the prompt holds bytes that are no UTF-8.")
    with tokenizing():
        inputs = tokenizer([prompt], return_tensors="pt", add_special_tokens=not templated)
        length = inputs["input_ids"].shape[1]
    if length == 0:
        raise DataError("the prompt is empty.")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length >= most and not model.config.is_encoder_decoder:
        raise DataError(f"the prompt has {length} tokens, and the model has room for {most}, its answer included.")
    if seed is not None:
        set_seed(seed)
    drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pieces: list[str] = []

    def keep(piece: str) -> None:
        pieces.append(piece)
        take(piece)

    room = max_new_tokens if most is None or model.config.is_encoder_decoder else min(max_new_tokens, most - length)
    with torch.no_grad(), writing(model):
        output = model.generate(
            **{k: inputs[k].to(model.device) for k in ("input_ids", "attention_mask") if k in inputs},
            **ONE_TEXT, **drawing, pad_token_id=pad, max_new_tokens=room, logits_processor=[Numbers(model)],
            streamer=_Pieces(tokenizer, keep, skip_prompt=not model.config.is_encoder_decoder),
        )  # fmt: skip
    begun = 1 if model.config.is_encoder_decoder else length
    ends = model.generation_config.eos_token_id
    ends = [*ends] if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
    cut = None
    if output.shape[1] - begun >= room and int(output[0, -1]) not in ends:
        more = (
            "--max-new-tokens allows more"
            if room == max_new_tokens
            else f"the model has room for {most}, prompt included"
        )
        cut = f"after {room} tokens; {more}"
    return Answer("".join(pieces), cut)


def base_of(source: str) -> str | None:
    """The model that a folder of trained weights was trained from, as its own record says it; None where it does not."""
    path = Path(source) / RESULTS_FILE
    found = read_mapping(path).get("model") if path.is_file() else None
    return found if isinstance(found, str) else None


class Beside:
    """The tuned model, and the one that it was trained from.

    An adapter is switched off for the base; beside a plain checkpoint the base is loaded, when it is first asked.

    Args:
        open_base: opens a model by its name, as `open_saved` does.
    """

    def __init__(self, tuned: Saved, open_base: Callable[[str], Saved]) -> None:
        self.tuned, self._open = tuned, open_base
        self._base: Saved | None = None

    def models(self, with_base: bool) -> Iterator[tuple[str, Saved]]:
        """(name, model): `tuned`, and `base` where it is asked for; each is to be used before the next is taken."""
        yield "tuned", self.tuned
        if with_base:
            with self.base() as base:
                yield "base", base

    @contextmanager
    def base(self) -> Iterator[Saved]:
        """The untrained model.

        Raises:
            CheckpointError: the folder does not say which model it was trained from.
        """
        if hasattr(self.tuned.model, "disable_adapter"):
            with self.tuned.model.disable_adapter():
                yield self.tuned
            return
        source = self.tuned.options.model
        if self._base is None:
            name = base_of(source)
            if name is None:
                raise CheckpointError(
                    f"{source}: {RESULTS_FILE} does not say which model it was trained from, so none is beside it."
                )
            self._base = self._open(name)
        yield self._base
