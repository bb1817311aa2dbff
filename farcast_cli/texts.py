"""Texts that every installation has: the topics of `farcast help` and the scripts of `farcast ci`."""

from __future__ import annotations

import re
from importlib.resources import files
from textwrap import fill
from typing import Literal

Kind = Literal["topics", "scripts"]
_PROSE = re.compile(r"^\S.*(?:\n(?:  )?(?!- )\S.*)*", re.MULTILINE)
"""A heading, a paragraph or the entry of a list; lines of code begin with four blanks."""


def names_of(kind: Kind) -> list[str]:
    """The names of all texts of a kind; a topic has no ending.

    >>> names_of("scripts")
    ['capture.py', 'forecast.sh', 'periodic.sh']
    """
    found = (file for file in files(__package__).joinpath(kind).iterdir() if file.is_file())  # and no __pycache__
    return sorted(file.name.removesuffix(".md") for file in found)


def read_text(kind: Kind, name: str) -> str:
    """One of them."""
    ending = ".md" if kind == "topics" else ""
    return files(__package__).joinpath(kind, name + ending).read_text(encoding="utf-8")


def wrapped(text: str, width: int) -> str:
    r"""A topic with its paragraphs and the entries of its lists in lines no wider than that; lines of code stay as they are.

    >>> wrapped("One two\nthree.\n\n    code that stays\n\n- Four\n  five six.\n", 10)
    'One two\nthree.\n\n    code that stays\n\n- Four\n  five\n  six.\n'
    """
    if max(map(len, text.splitlines())) <= width:
        return text
    return _PROSE.sub(lambda found: _filled(found[0], width), text)


def _filled(block: str, width: int) -> str:
    hanging = "  " if block.startswith("- ") else ""
    return fill(" ".join(block.split()), width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def title_of(topic: str) -> str:
    """What a topic is about.

    >>> title_of("exit-codes")
    'Exit codes'
    """
    return read_text("topics", topic).splitlines()[0].removeprefix("# ")
