"""How many snapshots of a long run enter a fit, and which.

A fit keeps, for each tensor, the inner products of all snapshots with all others: K T^2 numbers. So for T snapshots of K tensors
there is a limit. Below it every snapshot enters.

    T_max = max(20, sqrt(64 MiB / (8 K)) - 1):   456 for 40 tensors, 288 for 100, 128 for 500, 90 for 1,000, 39 for 5,000

Of a longer run the last five enter, and the others evenly by their steps from the first on. The steps alone decide. More of the
last would crowd the history's end, in which methods look for places that are spread over all of it; without them an average
would reach far back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.run.alignment import align
from farcast_cli.run.closed import reopened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.trainers.base import Snapshot

GRAM_BYTES = 64 << 20  # of all inner products
MIN_LIMIT = 20  # snapshots, however many tensors: fewer, and the recent half could not be judged
MAX_DENSE = 5  # of the last snapshots, all of which enter; with 10 or 20 the error of window-means rose by .1, with 1 that of an average


def thinned(
    snapshots: Sequence[Snapshot], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[tuple[Snapshot, ...], str]:
    """The snapshots that enter a fit, opened, and a line that says what does not; "" where all do."""
    last = reopened(snapshots[-1])
    num_tensors = len(align([last], include=include, exclude=exclude).tensors)
    limit = most_snapshots(num_tensors)
    if len(snapshots) <= limit:
        return tuple(map(reopened, snapshots)), ""
    keep = chosen([snapshot.step for snapshot in snapshots], limit)
    told = (
        f"{len(keep)} of {len(snapshots)} snapshots are used, to limit memory ({num_tensors} tensors): the last"
        f" {_num_dense(limit)}, and others at even distances from step {snapshots[0].step}; --steps FROM:TO selects a part of the run"
    )
    return tuple(reopened(snapshots[index]) for index in keep), told


def most_snapshots(num_tensors: int) -> int:
    """How many snapshots of so many tensors enter a fit at most."""
    return max(MIN_LIMIT, math.isqrt(GRAM_BYTES // (8 * max(1, num_tensors))) - 1)


def chosen(steps: Sequence[int], count: int) -> list[int]:
    """The indices of `count` of the steps, which rise: the last ones, and for the rest the nearest to even places.

    >>> chosen(range(0, 1000, 10), 8)
    [0, 24, 48, 72, 96, 97, 98, 99]
    """
    if len(steps) <= count:
        return list(range(len(steps)))
    first_dense = len(steps) - _num_dense(count)
    free = np.arange(first_dense)  # not taken yet
    known = np.asarray(steps)
    kept = []
    for place in np.linspace(steps[0], steps[first_dense], count - _num_dense(count) + 1)[:-1]:
        nearest = int(np.argmin(np.abs(known[free] - place)))
        kept.append(int(free[nearest]))
        free = np.delete(free, nearest)
    return [*sorted(kept), *range(first_dense, len(steps))]


def _num_dense(count: int) -> int:
    return min(MAX_DENSE, count // 2)
