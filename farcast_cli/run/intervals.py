"""The distances between a run's snapshots: the usual one, and those that a leap may have made."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_ALIKE = 4  # equal distances that make a distance the usual one
SHARE_ALIKE = 0.75  # of all distances, so that another one is unusual
TOLERANCE = 0.25  # of the usual distance; a trainer that saves once an epoch is a step early or late


@dataclass(frozen=True, slots=True)
class Gap:
    """Two neighbouring snapshots whose distance is not the usual one."""

    early: int
    late: int
    usual: int


def usual_interval(steps: Sequence[int]) -> int:
    """The median distance between snapshots, in steps."""
    gaps = sorted(late - early for early, late in itertools.pairwise(steps))
    return gaps[len(gaps) // 2]


def odd_gaps(steps: Sequence[int]) -> tuple[Gap, ...]:
    """The unusual distances of a run that saves at equal distances; none where it does not.

    A shorter distance at either end is no gap: trainers save their first and their last step.
    """
    pairs = list(itertools.pairwise(steps))
    if len(pairs) <= MIN_ALIKE:
        return ()
    usual = usual_interval(steps)
    odd = [index for index, (early, late) in enumerate(pairs) if abs(late - early - usual) > TOLERANCE * usual]
    if len(pairs) - len(odd) < max(MIN_ALIKE, SHARE_ALIKE * len(pairs)):
        return ()
    ends = {0, len(pairs) - 1}
    found = [pairs[index] for index in odd if not (index in ends and pairs[index][1] - pairs[index][0] < usual)]
    return tuple(Gap(early, late, usual) for early, late in found)
