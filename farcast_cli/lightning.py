"""Leaps in PyTorch Lightning: `Trainer(callbacks=[ModelCheckpoint(...), LeapCallback()])`."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from farcast_cli.errors import UsageError
from farcast_cli.live.leaps import Leaps
from farcast_cli.live.weights import LiveModel, refuse_shards, sharded
from farcast_cli.trainers.base import LeapMark
from farcast_cli.trainers.lightning import CALLBACK, LEAPS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from farcast_cli.live.leaps import Landed


class LeapCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Leaps after the saves of a ModelCheckpoint, before the next batch. Weights move ahead; everything else stays.

    All loggers of the trainer get the figures. Later checkpoints contain the marks of the leaps, as this callback's state.

    Args:
        options: those of `Leaps`. With `every=N`, only saves at a multiple of N steps are followed by a leap.
    """

    def __init__(self, **options: Any) -> None:
        self._leaps = Leaps(layout="pt", **options)  # the weights alone
        self._saved_at = -1
        self._marks: list[LeapMark] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights in shards, and a run that saves nothing.

        Raises:
            UsageError: there is nothing to leap from.
        """
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise sharded(type(trainer.strategy).__name__)
        refuse_shards(pl_module, "weights in shards")
        if stage == "fit" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise UsageError("LeapCallback: expected a ModelCheckpoint among the callbacks, found none")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live, run, step = self._now(trainer, pl_module)
        self._log(trainer, self._leaps.after_resume(live, run, step, self._marks))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        self._saved_at = trainer.global_step  # the file is whole before the next batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if self._saved_at == trainer.global_step and self._leaps.is_due(trainer.global_step):
            self._saved_at = -1
            live, run, step = self._now(trainer, pl_module)
            self._log(trainer, self._leaps.after_save(live, run, step, num_steps=_num_steps(trainer, pl_module)))

    @property
    def state_key(self) -> str:
        return CALLBACK

    def state_dict(self) -> dict[str, Any]:
        return {LEAPS: [(mark.step, mark.origin_step, mark.valid_step) for mark in self._marks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._marks = [LeapMark(*numbers) for numbers in state_dict[LEAPS]]

    def _now(self, trainer: Trainer, pl_module: LightningModule) -> tuple[LiveModel, Path, int]:
        """The live model by the names of its checkpoints, the folder of the run, and its step."""
        saver: Any = trainer.checkpoint_callback
        named = trainer.strategy.lightning_module_state_dict()
        return LiveModel.of(pl_module, named), Path(saver.dirpath), trainer.global_step

    def _log(self, trainer: Trainer, landed: Landed | None) -> None:
        if landed is None:
            return
        if landed.mark:
            self._marks.append(landed.mark)
        for logger in trainer.loggers:
            logger.log_metrics(landed.numbers, step=landed.step)


def _num_steps(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """The steps of the whole run, where Lightning knows them: not of several optimizers, whose steps it all counts."""
    with suppress(MisconfigurationException):  # accumulation that changes
        end = trainer.estimated_stepping_batches if pl_module.automatic_optimization else math.inf
        return int(end) if math.isfinite(end) and end > 0 else None
    return None
