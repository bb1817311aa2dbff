"""Texts that every installation has: the topics of `farcast help` and the scripts of `farcast ci`."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

Kind = Literal["topics", "scripts"]


def names_of(kind: Kind) -> list[str]:
    """The names of all texts of a kind; a topic has no ending.

    >>> names_of("scripts")
    ['forecast.sh', 'periodic.sh']
    """
    return sorted(file.name.removesuffix(".md") for file in files(__package__).joinpath(kind).iterdir())


def read_text(kind: Kind, name: str) -> str:
    """One of them."""
    ending = ".md" if kind == "topics" else ""
    return files(__package__).joinpath(kind, name + ending).read_text(encoding="utf-8")


def title_of(topic: str) -> str:
    """What a topic is about.

    >>> title_of("exit-codes")
    'Exit codes'
    """
    return read_text("topics", topic).splitlines()[0].removeprefix("# ")
