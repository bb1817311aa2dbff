"""What the losses that a run logged say of a leap: what training reached after it, against the run before, continued.

Nobody knows the run without the leap. In its place stands the curve a + b ln(step) through the losses before the leap: at a
constant learning rate a loss falls ever more slowly. It is continued no farther than it is long. Where a schedule makes the
loss fall faster at the end, the curve lies above the run itself, and the answer is too good.
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

MIN_BEFORE = 4  # losses, for a curve
SHARE_AFTER = 0.25  # of the losses after the leap, the latest, whose mean is what training reached
MAX_AFTER = 20
CLEAR = 2.0  # standard errors
FARTHEST = 2.0  # times its own length, the curve is continued to tell steps


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
    resumes_after: int
    """The trainer's counter when it resumed."""
    kind: LossKind
    trained: int
    """Since the leap, where the loss is compared: later losses do not change the answer once the curve is at its end."""
    before: float
    """The loss before the leap: a mean of as many logged values as `after`."""
    after: float
    """The loss there: a mean of the last values."""
    curve: float | None
    """The losses before the leap, continued to there; None if they were too few."""
    error: float
    """Its standard error, with that of `after`."""
    sooner: float | None
    """Steps by which training reached this loss before the curve does; None if the curve does not fall clearly."""
    is_limit: bool
    """Whether `sooner` is only the least that can be told."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference to the curve is larger than its noise."""
        return self.curve is not None and abs(self.after - self.curve) > CLEAR * self.error

    def told(self) -> str:
        """The same in words."""
        kind = "training loss" if self.kind == "training" else "evaluation loss"
        head = f"Leap at step {self.resumes_after}: {kind} {self.before:.4g} before it, {self.after:.4g} after {self.trained} more steps"
        return f"{head}. {self._against_curve()}"

    def _against_curve(self) -> str:
        if self.curve is None:
            return f"Fewer than {MIN_BEFORE} losses were logged before it, so what it was worth is not known"
        there = f"{self.curve:.4g} +/- {self.error:.2g}"
        return f"{self._judged()}. Estimate for the run without the leap: {there}, the losses before it continued"

    def _judged(self) -> str:
        if not self.is_clear:
            return f"No clear difference: it is under {CLEAR:g} standard errors"
        if self.curve is not None and self.after > self.curve:
            return "The leap has not paid yet"
        if self.sooner is None:
            return "The loss is lower than without the leap"
        return f"The same loss {'at least' if self.is_limit else 'about'} {self.sooner:.0f} steps sooner"


def span_of(leaps: Sequence[Leap], origin_step: int, resumes_after: int) -> LeapSpan:
    """Where a leap lies that a run resumed from.

    Args:
        leaps: all that are known of the run. The curve begins after the one before, whether the run resumed from it or not.
    """
    begin = max((leap.resumes_after for leap in leaps if leap.resumes_after < origin_step), default=-1)
    return LeapSpan(begin, origin_step, resumes_after)


def worth_of(log: LossLog | None, span: LeapSpan) -> Worth | None:
    """What the losses say of a leap: those of evaluation if enough of them lie on both sides, else those of training.

    Returns:
        None if no loss was logged before the leap, or none after it.
    """
    found = [worth for kind in reversed(LOSS_KINDS) if log and (worth := _worth(log.of(kind), kind, span))]
    return next((worth for worth in found if worth.curve is not None), found[-1] if found else None)


def _worth(points: Points, kind: LossKind, span: LeapSpan) -> Worth | None:
    before = np.array([point for point in points if max(span.begin, 0) < point[0] <= span.origin_step], dtype=float)
    after = np.array([point for point in points if point[0] > span.resumes_after], dtype=float)
    if not len(before) or not len(after):
        return None
    base = before[-max(MIN_BEFORE, len(before) // 2) :]
    near = after[: max(1, int(np.searchsorted(after[:, 0], span.resumes_after + np.ptp(base[:, 0]), side="right")))]
    count = min(max(1, round(SHARE_AFTER * len(near))), MAX_AFTER)
    reached = near[-count:]
    levels = float(before[-count:, 1].mean()), float(reached[:, 1].mean())
    curve = _Curve(None, 0.0, None, is_limit=False)
    if len(before) >= MIN_BEFORE:
        at = span.origin_step + float(reached[:, 0].mean()) - span.resumes_after
        curve = _continued(base, at=at, after=levels[1], count=count)
    trained = int(near[-1, 0]) - span.resumes_after
    return Worth(span.origin_step, span.resumes_after, kind, trained, *levels, **curve._asdict())


class _Curve(NamedTuple):
    """The fields of `Worth` that a curve gives."""

    curve: float | None
    error: float
    sooner: float | None
    is_limit: bool


def _continued(base: NDArray[np.float64], *, at: float, after: float, count: int) -> _Curve:
    """The curve through losses (N, 2) at a later step, against `after`, a mean of `count` losses there."""
    logs, losses = np.log(base[:, 0]), base[:, 1]
    middle, level = float(logs.mean()), float(losses.mean())
    spread = float(np.square(logs - middle).sum())
    slope = float((logs - middle) @ losses) / spread
    noise = float(np.sqrt(np.square(losses - level - slope * (logs - middle)).sum() / (len(base) - 2)))
    place = float(np.log(at)) - middle
    curve = level + slope * place
    error = noise * float(np.sqrt(1 / count + 1 / len(base) + place * place / spread))
    if slope > -CLEAR * noise / np.sqrt(spread) or slope >= 0:
        return _Curve(curve, error, None, is_limit=False)
    most = FARTHEST * float(np.ptp(base[:, 0]))
    farthest = np.log(at + most)  # in logarithms: a step itself may overflow
    reaches = middle + (after - level) / slope
    return _Curve(curve, error, float(np.exp(min(reaches, farthest)) - at), is_limit=bool(reaches > farthest))
