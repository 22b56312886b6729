"""The verb `push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Rest, switch
from ..errors import OptionError, printable
from .options import required
from .verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="?", help="folder that train, merge or export wrote; or the file of a report or a plan")
    add(
        "--to", metavar="ORG/NAME", help="the repository, made where there is none; default: yours, named as the folder"
    )
    add("--base", metavar="ORG/NAME", help="hub id of the base, for an adapter that was trained on a local folder")
    add("--model-id", metavar="ORG/NAME", help="of a report or a plan: the model that it is of, where it says a folder")
    add("--repo-type", help="of a report or a plan: model (default) or dataset")
    add("--revision", metavar="BRANCH", help="branch that gets the commit; default: the main one")
    add("--message", help="of the commit")
    switch(parser, "--private", help="a repository that is made is private")
    switch(parser, "--checkpoints", default=False, help="push checkpoint-* too, with the optimizer's state")


def run(options: argparse.Namespace, rest: Rest) -> None:
    from ..push import push_folder, push_record

    path = required(options, "path", "PATH")
    how = {"private": options.private, "revision": options.revision, "message": options.message}
    if Path(path).is_file():
        if options.base is not None or options.checkpoints:
            raise OptionError("--base and --checkpoints are for folders; a report or a plan takes --model-id.")
        if options.repo_type not in (None, "model", "dataset"):
            raise OptionError(f"--repo-type is {options.repo_type!r}, wanted model or dataset.")
        to = required(options, "to", "--to")
        sent = push_record(path, to, model_id=options.model_id, kind=options.repo_type or "model", **how)
        print(printable(f"pushed {', '.join(sent.files)}\nto {sent.url}"))
        return
    if options.model_id is not None or options.repo_type is not None:
        raise OptionError("--model-id and --repo-type are for reports and plans; a folder takes --base.")
    print(printable(str(push_folder(path, options.to, base=options.base, checkpoints=options.checkpoints, **how))))


VERB = Verb(
    "push",
    "push FOLDER [--to ORG/NAME] [flags]   |   push REPORT|PLAN --to ORG/NAME",
    "put what was trained, merged or exported on the hub with its card; or a report or plan",
    "push tuned --to someone/tuned",
    add_arguments,
    run,
)
