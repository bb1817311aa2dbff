"""What a training does step by step, so that a run that resumed from a forecast can be compared with the one that went on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from farcast_cli.formats.tree import dotted
from tests.tiny import forecast_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

EVERY, ORIGIN, VALID, END = 10, 100, 150, 200
MARKS = "farcast_leaps"  # in an optimizer's group, of the leaps that a checkpoint descends from
ROUNDING = 1e-12  # of a rate that farcast or the trainer computes again


@dataclass
class Course:
    """The learning rate and the place in the data of every step, by the number of steps done."""

    rates: dict[int, float] = field(default_factory=dict)
    places: dict[int, Any] = field(default_factory=dict)

    def after(self, step: int) -> Course:
        rates, places = ({s: v for s, v in of.items() if s > step} for of in (self.rates, self.places))
        return Course(rates, places)


def predicted(run: Path, output: Path) -> Path:
    """A forecast for the valid step."""
    return forecast_run(run, output, VALID - ORIGIN)[0]


def assert_goes_on(resumed: Course, whole: Course) -> None:
    """Every step after the valid one has the rate and the place of the uninterrupted run."""
    expected = whole.after(VALID)
    assert list(resumed.rates) == list(range(VALID + 1, END + 1))
    assert _differing(resumed.rates, expected.rates) == {}
    assert _differing(resumed.places, expected.places) == {}


def assert_same_counts(resumed: Any, whole: Any, *, but: tuple[str, ...] = ()) -> None:
    """The numbers of two saved states are equal: counters, Adam's steps, schedules, places in the data; but for marks of leaps.

    Args:
        but: words in the keys of numbers that depend on the weights, such as a loss.
    """
    found, expected = (
        {key: value for key, value in _numbers(tree) if not any(word in key for word in (MARKS, *but))}
        for tree in (resumed, whole)
    )
    assert expected
    assert _differing(found, expected) == {}


def _differing(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> dict[Any, tuple[Any, Any]]:
    """What differs by more than the rounding of a rate, as (found, expected)."""
    pairs = {key: (found.get(key), expected.get(key)) for key in found.keys() | expected.keys()}
    return {key: (a, b) for key, (a, b) in pairs.items() if a is None or b is None or not math.isclose(a, b, rel_tol=ROUNDING)}


def _numbers(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, float]]:
    if isinstance(tree, torch.Tensor):
        if path[-1:] == ("step",):
            yield dotted(path), float(tree)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield dotted(path), float(tree)
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _numbers(value, (*path, key))
