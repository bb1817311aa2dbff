"""What the losses that a run logged say of a leap: what training reached after it, against the run before, continued.

Nobody knows the run without the leap. In its place stands a straight line through the losses before the leap. A loss falls
ever more slowly at a constant learning rate, so that the line lies below the run itself, and the answer is a cautious one;
where a schedule makes the loss fall faster at the end, it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from farcast_cli.run.losses import LOSS_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.forecast.ledger import Leap
    from farcast_cli.run.losses import LossKind, LossLog, Points

MIN_BEFORE = 4  # losses, for a line
SHARE_AFTER = 0.25  # of the losses after the leap, the latest, whose mean is what training reached
MAX_AFTER = 20
CLEAR = 2.0  # standard errors
FARTHEST = 2.0  # times its own length, a line is continued to tell steps


@dataclass(frozen=True, slots=True)
class LeapSpan:
    """Where a leap lies on the trainer's counter: the losses before it, from `begin` on, and those after it."""

    begin: int
    """The step after which the run made no other leap."""
    origin_step: int
    resumes_after: int


@dataclass(frozen=True, slots=True)
class Worth:
    """What a leap was worth, by the run's own losses. Steps are trained steps."""

    origin_step: int
    kind: LossKind
    trained: int
    """Since the leap."""
    before: float
    """The loss before the leap: a mean of as many logged values as `after`."""
    after: float
    """The loss now."""
    line: float | None
    """The line through the losses before the leap, at as many steps after it; None if they were too few."""
    error: float
    """Its standard error, with that of `after`."""
    sooner: float | None
    """Steps by which training reached this loss before the line does; None if the line does not fall clearly."""
    is_limit: bool
    """Whether `sooner` is only the least that can be told."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference to the line is larger than its noise."""
        return self.line is not None and abs(self.after - self.line) > CLEAR * self.error

    def told(self) -> str:
        """The same in words."""
        kind = "training loss" if self.kind == "training" else "evaluation loss"
        head = f"leap at step {self.origin_step}: {kind} {self.before:.4g} before it, {self.after:.4g} after {self.trained} more steps of training"
        return f"{head}; {self._against_line()}. The run without the leap is not known"

    def _against_line(self) -> str:
        if self.line is None:
            return f"fewer than {MIN_BEFORE} losses before it: what it was worth is not known"
        line = f"the line through the losses before it gives {self.line:.4g} +/- {self.error:.2g} there"
        if not self.is_clear:
            return f"{line}: no clear difference yet"
        if self.after > self.line:
            return f"{line}: the leap has not paid yet"
        if self.sooner is None:
            return f"{line}: lower by {self.line - self.after:.2g}"
        return f"{line}: the same loss {'at least' if self.is_limit else 'about'} {self.sooner:.0f} steps sooner"


def span_of(leaps: Sequence[Leap], origin_step: int, resumes_after: int) -> LeapSpan:
    """Where a leap lies that a run resumed from.

    Args:
        leaps: all that are known of the run. The line begins after the one before, whether the run resumed from it or not.
    """
    begin = max((leap.resumes_after for leap in leaps if leap.resumes_after < origin_step), default=-1)
    return LeapSpan(begin, origin_step, resumes_after)


def worth_of(log: LossLog | None, span: LeapSpan) -> Worth | None:
    """What the losses say of a leap: those of evaluation if enough of them lie on both sides, else those of training.

    Returns:
        None if no loss was logged before the leap, or none after it.
    """
    found = [worth for kind in reversed(LOSS_KINDS) if log and (worth := _worth(log.of(kind), kind, span))]
    return next((worth for worth in found if worth.line is not None), found[-1] if found else None)


def _worth(points: Points, kind: LossKind, span: LeapSpan) -> Worth | None:
    before = np.array([point for point in points if span.begin < point[0] <= span.origin_step], dtype=float).reshape(-1, 2)
    after = np.array([point for point in points if point[0] > span.resumes_after], dtype=float).reshape(-1, 2)
    if not len(before) or not len(after):
        return None
    count = min(max(1, round(SHARE_AFTER * len(after))), MAX_AFTER)
    reached = after[-count:]
    trained = reached[:, 0].mean() - span.resumes_after
    levels = float(before[-count:, 1].mean()), float(reached[:, 1].mean())
    last = int(after[-1, 0]) - span.resumes_after
    if len(before) < MIN_BEFORE:
        return Worth(span.origin_step, kind, last, *levels, **_Line(None, 0.0, None, is_limit=False)._asdict())
    line = _line_through(before, at=span.origin_step + trained, after=levels[1], count=count)
    return Worth(span.origin_step, kind, last, *levels, **line._asdict())


class _Line(NamedTuple):
    """The fields of `Worth` that a line gives."""

    line: float | None
    error: float
    sooner: float | None
    is_limit: bool


def _line_through(before: NDArray[np.float64], *, at: float, after: float, count: int) -> _Line:
    """The line through the recent half of the losses before, (N, 2), against `after`, a mean of `count` losses, at a step."""
    points = before[-max(MIN_BEFORE, len(before) // 2) :]
    steps, losses = points[:, 0] - points[:, 0].mean(), points[:, 1]
    spread = float(steps @ steps)
    slope, middle = float(steps @ losses) / spread, float(losses.mean())
    noise = float(np.sqrt(np.square(losses - middle - slope * steps).sum() / (len(points) - 2)))
    place = at - float(points[:, 0].mean())
    line = middle + slope * place
    error = noise * float(np.sqrt(1 / count + 1 / len(points) + place * place / spread))
    if slope > -CLEAR * noise / np.sqrt(spread) or slope >= 0:
        return _Line(line, error, None, is_limit=False)
    sooner, most = (line - after) / -slope, FARTHEST * float(np.ptp(points[:, 0]))
    return _Line(line, error, min(sooner, most), is_limit=sooner > most)
