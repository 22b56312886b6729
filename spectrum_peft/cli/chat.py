"""The verb `chat`."""

from __future__ import annotations

import argparse
import re
import sys

from ..arguments import Rest
from .generate import add_writing_options, say_cut, show, speakers, writing
from .options import add_load_options
from .verb import Verb

# What a line that begins with a slash asks for.
COMMANDS = {"/reset": "forgets what was said", "/quit": "leaves, as the end of input does", "/help": "says this"}
_ASKED = re.compile(r"/\w+(\s|$)")  # a path, `/etc/hosts`, is something to talk about
HELP = "; ".join(f"{name} {does}" for name, does in COMMANDS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="folder of a trained adapter or model, or a hub id")
    add("--system", metavar="TEXT", help="a system message before the conversation")
    add("--task", help="causal_lm or seq2seq; default: what the checkpoint's architecture says")
    add_writing_options(parser)
    add_load_options(parser)


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..train.talk import Message, prompt_for, write

    pair = speakers(options)
    system = [Message(role="system", content=options.system)] if options.system else []
    prompt_for(
        pair.tuned.tokenizer, [*system, Message(role="user", content="x")], options.model
    )  # refused before the first line
    said: dict[str, list[Message]] = {}
    print(HELP, file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        words = line.strip()
        if not line or words == "/quit":
            return
        if words == "/reset":
            said = {}
        elif words == "/help":
            print(HELP, file=sys.stderr)
        elif _ASKED.match(line):
            print(f"{words.split()[0]} is no command. {HELP}; a space before it makes it a message", file=sys.stderr)
        elif words:
            for name, saved in pair.models(options.beside):
                history = said.setdefault(name, list(system))
                history.append(Message(role="user", content=words))
                if options.beside:
                    print(f"[{name}]")
                text = prompt_for(saved.tokenizer, history, options.model)
                answer = write(saved, text, show, templated=True, **writing(options))
                print(flush=True)
                say_cut(answer.cut)
                history.append(Message(role="assistant", content=answer.text))


VERB = Verb(
    "chat",
    "chat MODEL [flags]",
    "talk to a trained model or adapter; with --beside its untrained base answers, too",
    "chat out --beside",
    add_arguments,
    run,
)
