"""Hooks of the documentation site: the README is its first page, and pictures of benchmarks come along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"\]\(\.\./benchmarks/results/([\w.-]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md, and every picture in benchmarks/results/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = readme.replace("](docs/", "](")
    readme = re.sub(
        r"\[([^\]]+)\]\((?!https?:|#)(?![\w./-]+\.(?:md|png))[^)]*\)", r"`\1`", readme
    )  # folders of the repository
    readme = f"---\nhide: [toc]\n---\n{readme}"  # its table of modes is wide
    files.append(File.generated(config, "index.md", content=readme))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ to those pictures stay right on the site."""
    return _MARK.sub(r"](images/\1)", markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The search works in a page that was opened from the disk, without a network."""
    return output.replace("https://unpkg.com/iframe-worker/shim", "site/search_from_files.js")
