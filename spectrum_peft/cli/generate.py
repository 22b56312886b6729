"""The verb `generate`."""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

from ..arguments import Rest, switch
from ..errors import OptionError
from .options import add_load_options, required
from .verb import Verb

DEFAULT_TOKENS = 256


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """How text is written, for `generate` and `chat`."""
    add = parser.add_argument_group("writing").add_argument
    add("--max-new-tokens", type=int, default=DEFAULT_TOKENS, metavar="TOKENS", help=f"default {DEFAULT_TOKENS}")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: always the most probable token; above: drawn")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the smallest set with this probability")
    add("--seed", type=int, help="of the drawing")
    switch(parser._action_groups[-1], "--beside", default=False, help="let the untrained base write, too")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="folder of a trained adapter or model, or a hub id")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; default: each line of standard input",
    )
    add("--system", metavar="TEXT", help="a system message before the prompt")
    switch(parser, "--raw", default=False, help="the prompt as it is, without the chat template")
    add("--task", help="causal_lm or seq2seq; default: what the checkpoint's architecture says")
    add_writing_options(parser)
    add_load_options(parser)


def opened(options: argparse.Namespace, model: str) -> Any:
    """A model that writes, by its name, with the other flags.

    Raises:
        OptionError: it classifies.
    """
    from ..train.saved import open_saved

    asked = copy.copy(options)
    asked.model = model
    saved = open_saved(asked, Rest())
    if saved.task.head is not None:
        raise OptionError(f"{model}: its task is {saved.task.name}, which writes no text; `evaluate` judges it.")
    return saved


def speakers(options: argparse.Namespace) -> Any:
    """The model that the flags name, and its base."""
    from ..train.arguments import quiet_progress
    from ..train.talk import Beside, check_writing

    quiet_progress()
    check_writing(**writing(options))
    return Beside(opened(options, required(options, "model", "MODEL")), lambda name: opened(options, name))


def writing(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_writing_options`, as `talk.write` takes them."""
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}


def say_cut(reason: str | None) -> None:
    """One line beside an answer that the model did not end itself."""
    if reason is not None:
        print(f"[cut {reason}]", file=sys.stderr)


def show(piece: str) -> None:
    print(piece, end="", flush=True)


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..train.talk import prompt_for, write

    required(options, "model", "MODEL")
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise OptionError("--prompt is missing, and standard input is empty.")
    for prompt in prompts:
        if not prompt.strip():
            raise OptionError(f"--prompt is {prompt!r}, wanted a text to write on from.")
    pair = speakers(options)
    for prompt in prompts:
        for name, saved in pair.models(options.beside):
            if options.beside:
                print(f"[{name}]")
            templated = not options.raw and saved.tokenizer.chat_template is not None
            if templated:
                system = [{"role": "system", "content": options.system}] if options.system else []
                text = prompt_for(saved.tokenizer, [*system, {"role": "user", "content": prompt}], options.model)
            else:
                text = f"{options.system}\n{prompt}" if options.system else prompt
            answer = write(saved, text, show, templated=templated, **writing(options))
            print(flush=True)
            say_cut(answer.cut)


VERB = Verb(
    "generate",
    "generate MODEL --prompt TEXT [flags]",
    "let a trained model or adapter write on from prompts; with --beside its untrained base, too",
    'generate out --prompt "What is a norm?" --beside',
    add_arguments,
    run,
)
