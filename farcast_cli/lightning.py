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
from farcast_cli.trainers.group_marks import mark_group, marks_in_tree

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from farcast_cli.live.leaps import Landed


class LeapCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Leaps after the saves of a ModelCheckpoint, before the next batch. Weights move ahead; everything else stays.

    All loggers of the trainer get the figures. The optimizer carries the marks of the leaps on
    to all later checkpoints.

    Args:
        options: those of `Leaps`. With `every=N`, only saves at a multiple of N steps are followed by a leap.
    """

    def __init__(self, **options: Any) -> None:
        self._leaps = Leaps(layout="pt", **options)  # the weights alone
        self._saved_at = -1

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
        self._log(trainer, self._leaps.after_resume(live, run, step, marks_in_tree(_optimizer(trainer))))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        self._saved_at = trainer.global_step  # the file is whole before the next batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if self._saved_at == trainer.global_step and self._leaps.is_due(trainer.global_step):
            self._saved_at = -1
            live, run, step = self._now(trainer, pl_module)
            self._log(trainer, self._leaps.after_save(live, run, step, num_steps=_num_steps(trainer, pl_module)))

    def _now(self, trainer: Trainer, pl_module: LightningModule) -> tuple[LiveModel, Path, int]:
        """The live model by the names of its checkpoints, the folder of the run, and its step."""
        saver: Any = trainer.checkpoint_callback
        named = trainer.strategy.lightning_module_state_dict()
        return LiveModel.of(pl_module, named), Path(saver.dirpath), trainer.global_step

    def _log(self, trainer: Trainer, landed: Landed | None) -> None:
        if landed is None:
            return
        if landed.mark:
            mark_group(_optimizer(trainer), landed.mark)
        for logger in trainer.loggers:
            logger.log_metrics(landed.numbers, step=landed.step)


def _optimizer(trainer: Trainer) -> dict[str, Any]:
    """The first live optimizer, as its saved state is read."""
    return {"state": {}, "param_groups": trainer.optimizers[0].param_groups if trainer.optimizers else []}


def _num_steps(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """The steps of the whole run, where Lightning knows them: not of several optimizers, whose steps it all counts."""
    with suppress(MisconfigurationException):  # accumulation that changes
        end = trainer.estimated_stepping_batches if pl_module.automatic_optimization else math.inf
        return int(end) if math.isfinite(end) and end > 0 else None
    return None
