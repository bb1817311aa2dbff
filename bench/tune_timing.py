"""How the benchmarks of tune measure, and see that what they measure is right.

Time is CPU time of this process, the smallest of some means.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

np.ones(30 << 17)  # 30 MiB, freed: from here on the C library keeps what is freed, where fresh pages cost more than arithmetic


def per_call(action: Callable[[], object], *, at_least_s: float = 0.3) -> float:
    """The smallest of three mean CPU times, in ms."""
    action()
    times = []
    for _ in range(3):
        count, started = 0, time.process_time()
        while time.process_time() - started < at_least_s / 3 or not count:
            action()
            count += 1
        times.append((time.process_time() - started) / count)
    return 1000 * min(times)


class WrongResultError(Exception):
    """A variant does not do what it is compared with."""


def same(what: str, found: Any, expected: Any, tolerance: float) -> None:
    """See that a variant is right, to a share of the largest number."""
    error = float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
    if not error <= tolerance:
        raise WrongResultError(f"{what}: off by {error:.1e} of the largest number, expected {tolerance:.0e}")


def drawn(inputs: Array, width: int, random: Any) -> Array:
    """Pre-activations (n, m) as m neurons of normal weights, of variance 1 / d, give them; without making the weights where that is less."""
    num_rows, num_inputs = inputs.shape
    if num_rows > num_inputs:
        return inputs @ random.normal(size=(num_inputs, width), scale=1 / np.sqrt(num_inputs))
    return np.linalg.cholesky(inputs @ inputs.T / num_inputs) @ random.normal(size=(num_rows, width))
