"""What the name of a file or folder tells: its step, or that it is a copy or an average of other snapshots."""

from __future__ import annotations

import re

MAX_DIGITS = 15  # of a step; a longer number in a name is a hash or a date
_MAX_LONE_DIGITS = 9  # a lone number is taken on trust; a longer one is a hash or a time
_NUMBER = rf"(0*\d{{1,{MAX_DIGITS}}})(?![\da-z]|\.\d)"  # whole, and no 1k, 1e5, 2.5 or beginning of a hash
_LONE = rf"(0*\d{{1,{_MAX_LONE_DIGITS}}})(?![\da-z]|\.\d)"
_ENDINGS = re.compile(r"(?:-v\d+)?(?:\.(?:safetensors|kept|pt|pth|bin|ckpt|tar))*$")
_GLUED = re.compile(rf"(?<![a-z])(?:global[-_]?)?(?:(?:step|iter|iteration|update)s?|(?<!\d)ba)[-_=]?{_NUMBER}", re.IGNORECASE)
_BEFORE = re.compile(
    rf"(?<![a-z\d.])(0*\d{{1,{MAX_DIGITS}}})(?:step|[-_]?(?:steps|iters|iterations|updates))(?![a-z\d])", re.IGNORECASE
)
_CHECKPOINT = re.compile(rf"(?<![a-z])(?:checkpoint|ckpt)[-_=]?{_LONE}(?![-_]\d)", re.IGNORECASE)
_NO_STEPS = "epochs?|ep|seed|rank|fold|shard|part|stage|phase|trial|version|v"
_BARE = re.compile(rf"^(?:(?!(?:{_NO_STEPS})[-_])[a-z]+[-_])?{_LONE}$", re.IGNORECASE)
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])$")

ALIAS = re.compile(r"(?:.*[-_.])?(?:last|latest|best|final|model|current|ema)(?:-v\d+)?$", re.IGNORECASE)
"""The stem of a name that says which of the others it is, and no step."""
_MADE_OF_OTHERS = re.compile(r"(?<![a-z])(?:avg|averaged?|ema|swa|mean|soup|merged?|best|top[-_]?k)(?![a-z])", re.IGNORECASE)


def find_step_in_name(name: str) -> re.Match[str] | None:
    """The number of a file or folder name that is its step; group 1 holds the digits.

    A number glued to `step`, `iter`, `global_step`, `update` or `ba` wins over one before `steps`, that over
    `checkpoint-N`, and that over a lone number. A lone number that is a date, and the N of `-vN`, are no steps.
    """
    stem = _ENDINGS.sub("", name)
    told = _GLUED.search(stem) or _BEFORE.search(stem)
    lone = _CHECKPOINT.search(stem) or _BARE.search(stem)
    return told or (None if lone is None or _DATE.match(lone[1]) else lone)


def word_of_others(name: str) -> str:
    """The word in a name that says that it was averaged from other snapshots, or chosen among them; "" for none."""
    found = _MADE_OF_OTHERS.search(name)
    return found[0] if found else ""
