"""The measurements on a pretrained model: which there are, what each is called, and where its result lies."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pretrained_tasks as tasks
from pretrained_tasks import Setting
from store import LEAPING, code_digest

if TYPE_CHECKING:
    from pathlib import Path

PLAIN, ONE, LEAPS, JUDGED, RANDOM = "plain", "one-leap", "leaps", "judged", "random"
MODES = (PLAIN, ONE, LEAPS, JUDGED, RANDOM)
STRETCHES = 20  # of a run, each with a checkpoint and an evaluation at its end
ORIGIN, HORIZON = 0.6, 0.2  # of the one leap under the schedule, as shares of the run
SEEDS = (11, 12)
FORECASTING = ("forecast.*", "state.*", "engine.*", "prediction")
CODE = {PLAIN: (), ONE: FORECASTING, LEAPS: LEAPING, JUDGED: LEAPING, RANDOM: LEAPING}
STEP_S = {"sections": {"full": 0.65, "lora": 0.5}, "modules": {"full": 1.3, "lora": 1.1}}
JUDGE_S = {"sections": 3.0, "modules": 8.0}
"""Measured on one core of a two-core machine."""


@dataclass(frozen=True)
class Trial:
    """One run in one mode.

    `plain`: as it is. `one-leap`: a forecast, the control and a random direction, each trained to the end. `leaps`: a
    leap after every stretch. `judged`: the same, steered by the loss. `random`: leaps of the same norms in random directions.
    """

    setting: Setting
    mode: str

    @property
    def label(self) -> str:
        return f"{self.setting.label}-{self.mode}"

    @property
    def path(self) -> Path:
        return tasks.OUT / f"{self.label}-{_digest(self)}.json"

    @property
    def is_done(self) -> bool:
        return bool(tasks.data_digest(self.setting.task)) and self.path.exists()

    def read(self) -> dict[str, Any] | None:
        """The stored result; None where there is none."""
        with suppress(FileNotFoundError):
            return dict(json.loads(self.path.read_text())["result"])
        return None

    @property
    def expected_s(self) -> float:
        steps = self.setting.steps
        trained = 3 * (1 - ORIGIN - HORIZON) * steps if self.mode == ONE else steps
        judged = 4 if self.mode == ONE else STRETCHES
        judging = judged * (1 + (self.mode in {LEAPS, JUDGED, RANDOM})) * JUDGE_S[self.setting.task]
        return (
            trained * STEP_S[self.setting.task][self.setting.kind]
            + judging
            + STRETCHES * (3 * (self.mode == LEAPS) + 8 * (self.mode == JUDGED))
        )


@functools.cache
def _digest(trial: Trial) -> str:
    versions = [platform.python_version(), *map(version, ("torch", "transformers", "peft", "numpy"))]
    own = ("finetune_judged", "judge") if trial.mode == JUDGED else ()
    code = code_digest(("pretrained_tasks", "finetune", *own), CODE[trial.mode])
    data = tasks.data_digest(trial.setting.task)
    text = json.dumps([asdict(trial), versions, code, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settings() -> list[Setting]:
    """The fine-tuning runs; the rates of `full` go from a little too small to a little too large."""
    found: list[Setting] = []
    for seed in SEEDS:
        found += [Setting("sections", "full", "linear", lr, 400, seed) for lr in (5e-5, 1e-4, 3e-4)]
        found += [
            Setting("sections", "full", "cosine", 1e-4, 400, seed),
            Setting("sections", "lora", "linear", 1e-3, 400, seed),
        ]
        found += [Setting("modules", "full", schedule, 1e-4, 240, seed) for schedule in ("linear", "cosine")]
        found += [Setting("modules", "lora", "cosine", 1e-3, 240, seed)]
    return found


def trials() -> list[Trial]:
    return [Trial(setting, mode) for setting in settings() for mode in MODES]
