"""Horizons as a person writes them: 1000, 1k, 1.5M, or 20% of the history."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from farcast_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.forecast.forecaster_file import Fitted

MAX_DIGITS = 15  # of a number of steps
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6}
_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKM%]?)", re.ASCII)

Horizon = int | Fraction
"""Whole steps, or a share of the history."""


def parse_horizons(text: str | None) -> tuple[Horizon, ...]:
    """The horizons of an option; none where it is not given.

    >>> parse_horizons("500, 1.5k,20%")
    (500, 1500, Fraction(1, 5))
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if any(len(part) > MAX_DIGITS for part in parts):
        raise UsageError(f"--horizon {text[:40]}: expected fewer than {10**MAX_DIGITS} steps")
    found = tuple(_horizon(part, text) for part in parts)
    _check_different(found, text)
    return found


def _horizon(part: str, text: str) -> Horizon:
    form = _FORM.fullmatch(part)
    number = Fraction(form[1]) if form else Fraction(0)
    if form and form[2] == "%" and number:
        return number / 100
    steps = number * _UNITS.get(form[2], 1) if form else number
    if not steps or steps.denominator > 1:
        raise UsageError(f"--horizon {text}: expected positive whole numbers of steps, such as 1000, 500,1k or 20%")
    return int(steps)


def _check_different(found: Sequence[Horizon], text: str) -> None:
    if len(set(found)) != len(found):
        raise UsageError(f"--horizon {text}: expected different horizons, found one twice")


def in_steps(horizons: Sequence[Horizon], fitted: Fitted, *, origin: int | None = None) -> tuple[int, ...]:
    """The same in whole steps, at least one.

    Args:
        origin: step of the snapshot at which the history ends; the last by default.

    Raises:
        UsageError: two of them are the same number of steps.
    """
    length = (fitted.steps[-1] if origin is None else origin) - fitted.steps[0]
    found = tuple(max(1, round(one * length)) if isinstance(one, Fraction) else one for one in horizons)
    _check_different(found, ",".join(map(str, found)))
    return found


def text_of(horizon: int | str | Sequence[int | str] | None) -> str | None:
    """A horizon as the command line has it.

    >>> text_of(500), text_of(["1k", 20]), text_of(None)
    ('500', '1k,20', None)
    """
    if horizon is None or isinstance(horizon, str):
        return horizon
    return ",".join(map(str, [horizon] if isinstance(horizon, int) else horizon))
