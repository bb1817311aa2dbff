"""What a user asks of a leap, and what comes of the call."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.folder import folder_of

if TYPE_CHECKING:
    from farcast_cli.choices import ClockName
    from farcast_cli.forecast.momentum import Momentum
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.request import Outcome, Request
    from farcast_cli.run.selection import Selection

WITH_LOSS, WITHOUT_LOSS = 4.0, 1.0  # the largest gain: without a loss, nothing can tell a leap that harms


@dataclass(frozen=True, slots=True)
class Ask:
    """What the user asks of a leap, beside what every forecast is asked."""

    request: Request
    selection: Selection
    every: int | None = None
    """Steps until the next leap; as many as since the last one if None."""
    gain: float | None = None
    """A fixed gain, in place of the steered one."""
    max_gain: float | None = None
    losses: Path | None = None
    """The run's log of losses, if it is not where it is looked for."""

    @property
    def limit(self) -> float:
        """The largest gain."""
        usual = WITHOUT_LOSS if self.request.evaluator is None else WITH_LOSS
        return usual if self.max_gain is None else self.max_gain

    @property
    def is_forced(self) -> bool:
        """Whether to leap whatever the evidence."""
        return self.request.even_if_worse or self.gain is not None

    @property
    def folder(self) -> Path:
        """Where forecasts and the memory lie: the folder that -o names, or that of the file that it names."""
        output = self.request.output
        if output is None:
            return folder_of(self.directory)
        return Path(output) if output.endswith(("/", os.sep)) else Path(output).parent

    @property
    def directory(self) -> Path:
        return self.selection.directory


@dataclass(frozen=True, slots=True)
class Leapt:
    """What came of a call: the outcome, the memory after it, and what a person should know."""

    outcome: Outcome
    momentum: Momentum
    cosine: float
    is_again: bool
    """The newest snapshot is the one that the last leap began at: nothing new was written."""
    every: int
    clock: ClockName
    origin: Path
    """The newest snapshot, from which training goes on where there is no leap."""
    is_last: bool = False
    """The run is so near its end that no leap will follow."""
    notes: tuple[str, ...] = ()
    signal: float = math.nan
    """Of the loss: the share of its usual fall that a stretch more in the remembered direction gives."""
    worth: Worth | None = None
    """What the losses that the run logged say of the last leap."""
    unlogged: tuple[str, ...] = ()
    """Where the numbers could not be logged, and why."""
