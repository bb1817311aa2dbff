"""What the name of a file or folder tells: its step, or that it is a copy or an average of other snapshots."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.choices import StepUnit

MAX_DIGITS = 15  # of a step; a longer number in a name is a hash or a date
_MAX_LONE_DIGITS = 9  # a lone number is taken on trust; a longer one is a hash or a time
_NUMBER = rf"(0*\d{{1,{MAX_DIGITS}}})(?![\da-z]|\.\d)"  # whole, and no 1k, 1e5, 2.5 or beginning of a hash
_LONE = rf"(0*\d{{1,{_MAX_LONE_DIGITS}}})(?![\da-z]|\.\d)"
_ENDINGS = re.compile(
    r"(?:-v\d+)?(?:\.(?:safetensors?|kept|pt|pth|bin|ckpt|tar|zip|model|th|sft|state|weights|chkpt|checkpoint|pkl|keras))*$",
    re.IGNORECASE,
)
_GLUED = re.compile(rf"(?<![a-z])(?:global[-_]?)?(?:(?:step|iter|iteration|update)s?|(?<!\d)ba)[-_=]?{_NUMBER}", re.IGNORECASE)
_BEFORE = re.compile(
    rf"(?<![a-z\d.])(0*\d{{1,{MAX_DIGITS}}})(?:step|[-_]?(?:steps|iters|iterations|updates))(?![a-z\d])", re.IGNORECASE
)
_CHECKPOINT = re.compile(rf"(?<![a-z])(?:checkpoint|ckpt)[-_=]?{_LONE}(?![-_]\d)", re.IGNORECASE)
_NO_STEPS = "epochs?|ep|seed|rank|fold|shard|part|stage|phase|trial|version|v"
_BARE = re.compile(rf"^(?:(?!(?:{_NO_STEPS})[-_])[a-z]+[-_])?{_LONE}$", re.IGNORECASE)
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])$")

_ALIAS = re.compile(r"(?:.*[-_.])?(?:last|latest|best|final|model|current|ema)(?:-v\d+)?$", re.IGNORECASE)
_MADE_OF_OTHERS = re.compile(r"(?<![a-z])(?:avg|averaged?|ema|swa|mean|soup|merged?|best|top[-_]?k)(?![a-z])", re.IGNORECASE)

_ENDING = re.compile(r"(?<=.)(?:\.(?:pth?|ckpt)\.tar|\.[a-z]\w*)$", re.IGNORECASE)
_COPY = re.compile(r"^copy of |\(\d+\)| - copy|[-_. ]copy(?![a-z])", re.IGNORECASE)
_DIGITS = re.compile(r"\d+")
_MIN_ALIKE = 3  # names
_STEP_AND_EPOCH = 2  # numbers that vary
_EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)[-_=]?$", re.IGNORECASE)
_EPOCH_NUMBER = re.compile(rf"(?<![a-z])(?:epochs?|ep)[-_=]?{_NUMBER}", re.IGNORECASE)
_OTHER_NUMBER = re.compile(
    r"(?<![a-z])(?:seed|rank|fold|shard|part|stage|phase|trial|version|v)[-_=]?$|\d\.$|\d[a-z]$|(?<!\d)(?:19|20)\d\d[-_.]?(?:\d\d[-_.]?)?$",
    re.IGNORECASE,
)
"""What stands before a number that is neither a step nor an epoch: such a word, a decimal point, a year."""


def find_step_in_name(name: str) -> re.Match[str] | None:
    """The number of a file or folder name that is its step; group 1 holds the digits.

    A number glued to `step`, `iter`, `global_step`, `update` or `ba` wins over one before `steps`, that over
    `checkpoint-N`, and that over a lone number. A lone number that is a date, and the N of `-vN`, are no steps.
    """
    stem = _ENDINGS.sub("", name)
    told = _GLUED.search(stem) or _BEFORE.search(stem)
    lone = _CHECKPOINT.search(stem) or _BARE.search(stem)
    return told or (None if lone is None or _DATE.match(lone[1]) else lone)


def says_step(name: str) -> bool:
    """Whether a word beside the number says that it is the step; a lone number may count anything, such as epochs."""
    stem = _ENDINGS.sub("", name)
    return any(pattern.search(stem) for pattern in (_GLUED, _BEFORE, _CHECKPOINT))


def find_epoch_in_name(name: str) -> re.Match[str] | None:
    """The number of a name that follows the word for an epoch; group 1 holds the digits."""
    return _EPOCH_NUMBER.search(_ENDINGS.sub("", name))


def find_number_in_name(name: str, unit: StepUnit) -> re.Match[str] | None:
    """The number of a name that is its step; its epoch, if epochs are counted and the name tells one."""
    return (find_epoch_in_name(name) if unit == "epoch" else None) or find_step_in_name(name)


def is_alias(path: Path) -> bool:
    """Whether a name says which of the others it is, and no step."""
    return _ALIAS.match(split_ending(path.name)[0]) is not None


def split_ending(name: str) -> tuple[str, str]:
    """The stem and the ending of a file's name; a number behind a dot is no ending, and one of two words is whole.

    >>> split_ending("step_5.pth.tar"), split_ending("step_5"), split_ending("loss_0.25")
    (('step_5', '.pth.tar'), ('step_5', ''), ('loss_0.25', ''))
    """
    found = _ENDING.search(name)
    return (name[: found.start()], found[0]) if found else (name, "")


def is_copy(name: str) -> bool:
    """Whether a name is that of a copy, as browsers and desktops give them.

    >>> is_copy("step_500 (1).pt"), is_copy("Copy of step_500.pt"), is_copy("step_500.pt")
    (True, True, False)
    """
    return _COPY.search(name) is not None


def word_of_others(name: str) -> str:
    """The word in a name that says that it was averaged from other snapshots, or chosen among them; "" for none."""
    found = _MADE_OF_OTHERS.search(name)
    return found[0] if found else ""


def varying_numbers(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The number of each name where names are equal but for it, and the word before it: `epoch`, or "" where it may be a step.

    Of two numbers that rise together (`net_3_1200.pth`) it is the step, if only one is another in every name, and the other
    the epoch, which several names share. Three names are needed. Dates, times, decimals, shards, and numbers of versions, seeds and their like are none.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_DIGITS.sub("#", _ENDINGS.sub("", name)), []).append(name)
    found: dict[str, tuple[str, int]] = {}
    for group in groups.values():
        numbers = [list(_DIGITS.finditer(_ENDINGS.sub("", name))) for name in group]
        varying = [place for place, column in enumerate(zip(*numbers, strict=True)) if len({int(n[0]) for n in column}) > 1]
        place = _place_of_step(numbers, varying)
        if len(group) >= _MIN_ALIKE and place is not None:
            told = {name: _told_by(matches[place]) for name, matches in zip(group, numbers, strict=True)}
            words = {one[0] for one in told.values() if one}
            found |= {name: one for name, one in told.items() if one} if len(words) == 1 and all(told.values()) else {}
    return found


def _place_of_step(numbers: Sequence[Sequence[re.Match[str]]], varying: Sequence[int]) -> int | None:
    """Which of the numbers of names that are alike tells them apart: the only one that varies, or the step beside an epoch."""
    if len(varying) != _STEP_AND_EPOCH:
        return varying[0] if len(varying) == 1 else None
    distinct = [place for place in varying if len({int(one[place][0]) for one in numbers}) == len(numbers)]
    if len(distinct) != 1:
        return None
    (step,), (epoch,) = distinct, set(varying) - set(distinct)
    if not all((told := _told_by(one[step])) and not told[0] and _told_by(one[epoch]) for one in numbers):
        return None
    epochs = [int(one[epoch][0]) for one in sorted(numbers, key=lambda one: int(one[step][0]))]
    return step if epochs == sorted(epochs) else None


def _told_by(number: re.Match[str]) -> tuple[str, int] | None:
    before, after = number.string[: number.start()], number.string[number.end() :]
    is_other = _OTHER_NUMBER.search(before) or re.match(r"[a-z]|\.\d|[-_]of[-_]", after, re.IGNORECASE)
    if is_other or len(number[0]) > _MAX_LONE_DIGITS or _DATE.match(number[0]):
        return None
    return ("epoch" if _EPOCH.search(before) else "", int(number[0]))
