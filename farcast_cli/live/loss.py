"""A loss of the user's own, measured on the live model: the scorer of a leap that runs in this process."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch

from farcast_cli.errors import UsageError
from farcast_cli.evaluation.judge import Trial
from farcast_cli.run.trajectory import open_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from farcast_cli.live.weights import LiveModel
    from farcast_cli.trainers.base import Snapshot

    Loss = Callable[[torch.nn.Module], object]


@dataclass(slots=True)
class LiveLoss:
    """Scores checkpoints by loading them into the model. At the end of the block the model has the origin's weights again."""

    loss: Loss
    live: LiveModel
    origin: Snapshot
    maximize: bool = False
    num_jobs: int = 1
    trials: list[Trial] = field(default_factory=list)

    def judge(self, _logs: Path, _variables: Mapping[str, object], announce: Callable[[str], object]) -> Self:
        announce("in this process")
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.live.restore(self.origin)

    def start(self, strength: float, checkpoint: Path, /) -> None:
        """Load a checkpoint into the model and measure its loss.

        Raises:
            UsageError: the function failed, or gave no finite number.
        """
        self.live.fill(open_snapshot(checkpoint) if strength else self.origin)
        started = time.monotonic()
        with _evaluating(self.live.module):
            value = _measured(self.loss, self.live.module)
        self.trials.append(Trial(strength, value, time.monotonic() - started))

    def wait(self, *, below: int) -> None:
        """Nothing is under way between two calls."""

    def check(self, strength: float, checkpoint: Path, /) -> None:
        """Nobody but this process sees a checkpoint."""


def _measured(loss: Loss, module: torch.nn.Module) -> float:
    try:
        found = loss(module)
        value = float(found)  # type: ignore[arg-type]
    except Exception as error:  # whatever it is, training goes on
        raise UsageError(f"the loss function failed: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise UsageError(f"the loss function returned {value}: expected a finite number")
    return value


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation leaves no trace: not in the modes of the modules, nor in torch's random states."""
    devices = sorted({weight.device.index for weight in module.parameters() if weight.device.type == "cuda"})
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for one, mode in modes:
            one.training = mode
