"""Steering leaps by a loss: from the losses at the origin, a little ahead of it and a little behind, a signal and a limit.

The weights are moved along the mean move that was remembered BEFORE the last stretch, so the move knows nothing of the noise in
the origin. A, B and H are the losses ahead, behind and at the origin; p is how far ahead and behind, in stretches.

    slope_k = (B - A) / 2p                                   fall of the loss per stretch ahead: curvature cancels
    bend_k  = (A + B - 2 H) / p^2                            its curvature; averaged over the calls, a = 0.7
    usual_k = root mean square of the change of H from call to call, a = 0.7
    told_k  = slope_k / usual_k, within -1..1                what the loss says
    trust_k = 1 + min(0, mean of told / mean of |told|), a = 0.7   1: told is noise or speaks for leaps; 0: always against

    signal_k = told_k + trust_k (1 + min(0, told_k)) share_k   moves the gain (momentum.py)
    g_k <= sqrt(2 usual_k / bend_k)                          the gain: curvature lifts the loss by its usual change at most

The slope is local: where training has already gone down along a direction, it is small though the direction leads on, and the
share says that. Where the loss speaks against leaps, now or call after call, the share counts for less, down to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from farcast_cli.forecast.momentum import AGREES, SMOOTHED

PROBE = 0.5  # p: of a stretch's mean move, how far ahead and behind the loss is measured
AGAINST = -0.5  # told by a loss that speaks against a leap at once
DISTRUST = 0.05  # trust left by a loss that has spoken against leaps all along
LARGEST = 1e150  # of a loss: its square is a number too


@dataclass(frozen=True, slots=True)
class Losses:
    """What the losses of past calls have told: running sums, each with the weight of its terms.

    Args:
        level: H of the last call.
        falls: of the squares of the level's changes. told, told_size: of what the loss said, and of its size.
        falls_weight: of these three.
        bend: of the second derivatives, with `bend_weight`.
    """

    level: float | None = None
    falls: float = 0.0
    falls_weight: float = 0.0
    told: float = 0.0
    told_size: float = 0.0
    bend: float = 0.0
    bend_weight: float = 0.0

    @property
    def usual(self) -> float:
        """The usual change of the loss from call to call; 0 until it has been seen to change."""
        return math.sqrt(self.falls / self.falls_weight) if self.falls_weight else 0.0

    @property
    def trust(self) -> float:
        """How far the loss lets the share count, 0 to 1."""
        return 1 + min(0.0, max(-1.0, self.told / self.told_size)) if self.told_size else 1.0

    @property
    def limit(self) -> float:
        """Of the gain; infinite where no curvature is seen, or the loss has not been seen to change."""
        bend = self.bend / self.bend_weight if self.bend_weight else 0.0
        return math.sqrt(2 * self.usual / bend) if bend > 0 and self.usual else math.inf

    def signal(self, told: float, share: float) -> float:
        """What moves the gain."""
        return told + self.trust * (1 + min(told, 0.0)) * share

    def objection(self, told: float, share: float) -> str:
        """Why the loss does not allow a leap; empty where it does, or tells nothing."""
        objections = (
            (told <= AGAINST, "the loss is much higher ahead than behind"),
            (told < 0 and self.trust < DISTRUST, "the loss was higher ahead than behind at every recent call"),
            (told < 0 and share < AGREES, f"share {share:.2g}, needed {AGREES}, and the loss is higher ahead than behind"),
        )
        return next((text for holds, text in objections if holds), "")


def heard(known: Losses, *, ahead: float, behind: float, origin: float) -> tuple[Losses, float]:
    """The losses of one call more, and what the loss says; nan until it has been seen to change. Lower losses are better."""
    ahead, behind, origin = (min(max(loss, -LARGEST), LARGEST) for loss in (ahead, behind, origin))
    bend = (ahead + behind - 2 * origin) / PROBE**2
    found = replace(known, level=origin, bend=_mean(known.bend, bend), bend_weight=_mean(known.bend_weight, 1.0))
    if known.level is None:
        return found, math.nan
    found = replace(found, falls=_mean(known.falls, (known.level - origin) ** 2), falls_weight=_mean(known.falls_weight, 1.0))
    if not found.usual:
        return found, math.nan
    told = min(max((behind - ahead) / (2 * PROBE) / found.usual, -1.0), 1.0)
    return replace(found, told=_mean(known.told, told), told_size=_mean(known.told_size, abs(told))), told


def _mean(before: float, now: float) -> float:
    """A running sum with one term more; over the same sum of ones it is a mean."""
    return SMOOTHED * before + (1 - SMOOTHED) * now
