"""How the benchmarks of tune measure time: CPU time of this process, the smallest of some means."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

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
