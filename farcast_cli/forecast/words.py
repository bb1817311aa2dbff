"""The figures of a judgement in words: every command says them alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farcast_cli.choices import StepUnit
    from farcast_cli.forecast.significance import Significance
    from farcast_cli.run.pace import Pace


def counted(number: int, unit: StepUnit) -> str:
    """A number of steps or epochs.

    >>> counted(1, "epoch"), counted(3, "step")
    ('1 epoch', '3 steps')
    """
    return f"{number} {unit}" + "s" * (number != 1)


def shown_number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "unknown"


def chance(significance: Significance) -> str:
    """The p of S in words; what it cannot say where the snapshots are few."""
    p, smallest = significance.p, significance.smallest
    weak = f" (weak: with so few snapshots p is at least {smallest:.2g})" if significance.weak else ""
    return f"p = {p:.2g}{weak}" if math.isfinite(p) else "p unknown"


def recent_half(coherence: float) -> str:
    return f"recent half S = {coherence:.2f}" if math.isfinite(coherence) else "recent half: too few snapshots to tell"


def clock_line(pace: Pace, ahead: float | None = None, length: float = 1.0, *, unit: StepUnit = "step") -> str:
    if pace.clock == "steps":
        return f"clock: {unit}s" + (f" ({pace.why})" if pace.why else "")
    if ahead is None:
        return "clock: learning rate"
    if ahead == 1:
        return "clock: learning rate, constant over the horizon"
    what = (
        "in full length, because enough of the schedule is left to anneal it"
        if length == 1
        else f"at {length:.2f} of its length"
    )
    return f"clock: learning rate, over the horizon {ahead:.2f} of the rate before it; the update is written {what}"
