"""The verdict on a forecast for people: what to do, why, and how sure that is. `predict` and the report say it alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from farcast_cli.forecast.words import counted

if TYPE_CHECKING:
    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.significance import Significance
    from farcast_cli.request import Outcome

CONTROL = "persistence"
"""The method that moves no weight."""


@dataclass(frozen=True, slots=True)
class Advised:
    """The verdict in three words, why in a sentence, and how sure; "" where no chance is known."""

    title: str
    why: str
    sure: str = ""

    @property
    def line(self) -> str:
        """The same as one line of a terminal."""
        return f"{self.title.upper()}: {' '.join(filter(None, (self.why, self.sure)))}"


def advised(outcome: Outcome, purpose: Purpose, *, is_one_of_many: bool = False) -> Advised:
    """What the verdict on a forecast advises; one against a forecast names its horizon if there are several."""
    said = _advised(outcome, purpose)
    if is_one_of_many and outcome.decision.verdict != "forecast":
        return replace(said, title=f"{said.title}, horizon {outcome.horizon}")
    return said


def _advised(outcome: Outcome, purpose: Purpose) -> Advised:
    if outcome.method == CONTROL and outcome.decision.verdict == "forecast":
        return Advised(
            f"Write a control for {outcome.rule.unit} {outcome.valid_step}", "It has the origin's weights: no weight moves."
        )
    if purpose == "evaluation":
        return Advised(*_to_evaluate(outcome))
    over = outcome.decision.is_over
    return Advised(*_to_resume(outcome), "" if over else sureness(outcome.decision.significance))


def _to_resume(outcome: Outcome) -> tuple[str, str]:
    decision = outcome.decision
    if decision.verdict == "forecast":
        farther = " Its weights are farther from the later ones at first; the direction decides." if decision.is_farther else ""
        return f"Leap {counted(outcome.horizon, outcome.rule.unit)}", (
            f"The run keeps its direction. farcast supports resuming from a forecast of {outcome.rule.unit} {outcome.valid_step}."
            f"{farther}"
        )
    causes = (
        (decision.is_over, "Nothing is left to skip"),
        (decision.verdict == "untestable", "It is too early to tell"),
        (not math.isfinite(decision.coherence), "There is no direction to follow"),
        (bool(outcome.trials), "The evaluation is against a leap"),
        (decision.is_weak, "The run's direction is too weak for a leap"),
        (True, "The run's history does not support this leap"),
    )
    cause = next(text for holds, text in causes if holds)
    return "Do not leap" if decision.is_over else "Keep training", f"{cause}: {decision.reason}."


def _to_evaluate(outcome: Outcome) -> tuple[str, str]:
    decision = outcome.decision
    if decision.verdict != "forecast":
        return "Evaluate the last snapshot", f"No forecast is expected to be nearer to later weights: {decision.reason}."
    if decision.is_average:
        return f"Evaluate the {outcome.method} at {outcome.rule.unit} {outcome.valid_step}", (
            "It combines the last snapshots, so that the weights lose their noise. Do not resume from it."
        )
    return (
        f"Evaluate a forecast of {outcome.rule.unit} {outcome.valid_step}",
        f"{decision.reason.capitalize()}. Do not resume from it.",
    )


def sureness(significance: Significance) -> str:
    """How sure a direction is, by its p, in a sentence.

    >>> from farcast_cli.forecast.significance import Significance
    >>> sureness(Significance(0.125, 0.002))
    'Chance alone gives such a direction in 13 of 100 cases.'
    """
    if not math.isfinite(significance.p):
        return ""
    weak = " With so few snapshots the number cannot be smaller." if significance.weak and significance.passes else ""
    return f"Chance alone gives such a direction in {_of_100(significance.p)} of 100 cases.{weak}"


def _of_100(share: float) -> str:
    return "fewer than 1" if share < 0.01 else f"{math.floor(100 * share + 0.5)}"  # noqa: PLR2004 - one of 100
