"""Judging checkpoints by the user's own command: the last number that it prints."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PLACEHOLDER = "{ckpt}"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trial:
    """What the command said of the step at one strength; strength 0 is the origin itself."""

    strength: float
    value: float


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A shell command with {ckpt} in the place of a checkpoint's path; lower is better unless `maximize`."""

    command: str
    maximize: bool = False

    def __post_init__(self) -> None:
        if PLACEHOLDER not in self.command:
            raise UsageError(
                f"--eval-cmd {self.command!r}: expected {PLACEHOLDER} where the checkpoint's path belongs",
                hint="--eval-cmd 'python eval.py {ckpt}'",
            )

    def score(self, checkpoint: Path) -> float:
        """Run the command on a checkpoint.

        Raises:
            UsageError: the command failed, printed no number, or one that is not finite.
        """
        command = self.command.replace(PLACEHOLDER, shlex.quote(str(checkpoint.resolve())))
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S602 - the user's own command
        if done.returncode:
            raise UsageError(
                f"the evaluation command failed with exit code {done.returncode} on {checkpoint.name}: {command}",
                hint="run it by hand to see why; nothing was published",
            )
        numbers = _NUMBER.findall(done.stdout)
        value = float(numbers[-1]) if numbers else math.nan
        if not math.isfinite(value):
            raise UsageError(
                f"the evaluation command printed no finite number on {checkpoint.name}: {command}",
                hint="print the score as the last number on stdout; nothing was published",
            )
        return value


def best_trial(trials: Sequence[Trial], *, maximize: bool) -> Trial:
    """The best of several trials; the earlier one, and so the origin, where they tie."""
    sign = -1.0 if maximize else 1.0
    return min(trials, key=lambda trial: sign * trial.value)
