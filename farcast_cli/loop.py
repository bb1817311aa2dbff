"""A leap in a training loop of one's own: one call after a save, and one after loading a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.live.leaps import Landed, Leaps
from farcast_cli.live.weights import LiveModel, refuse_shards

if TYPE_CHECKING:
    import os

    import torch

__all__ = ["Landed", "leap_in_place"]


def leap_in_place(
    model: torch.nn.Module, run: str | os.PathLike[str], step: int, *, num_steps: int | None = None, **options: Any
) -> Landed | None:
    """Leap from the checkpoint of this step, which the loop has just saved or loaded, and give its weights to the model.

    After loading the checkpoint that an interrupted leap began at, the same leap is made again.

    Args:
        run: the folder of the run's checkpoints.
        num_steps: of the whole run: none of its last tenth is leaped over.
        options: those of `Leaps`: every, loss, gain, max_gain, output, include, exclude, pattern, strict, ...

    Returns:
        what came of it; None where there was no call, or where it failed and a warning was logged.
    """
    leaps = Leaps(**options)
    refuse_shards(model, "weights in shards")
    if not leaps.is_due(step):
        return None
    return leaps.after_save(LiveModel.of(model, model.state_dict()), Path(run), step, num_steps=num_steps)
