"""Torchtitan's own optimizers, schedule, loader and checkpoints around a small model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed, nn

from tests.trainers_real.course import END, EVERY, ORIGIN, VALID, Course, assert_goes_on, predicted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

schedules = pytest.importorskip("torchtitan.components.optimizer.lr_scheduler")
optimizers = pytest.importorskip("torchtitan.components.optimizer.optimizer")
checkpoints = pytest.importorskip("torchtitan.components.checkpointer.dcp")
loaders = pytest.importorskip("torchtitan.components.dataloader")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own and torch's

BATCH = 4


class Rows(torch.utils.data.IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows by their number, which is its state."""

    next_index = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self.next_index)
            self.next_index += 1
            yield torch.randn(8, generator=generator), torch.randn(2, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"next_index": self.next_index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_index = state["next_index"]


class Run:
    """A trainer as torchtitan's own, with what it saves."""

    def __init__(self, folder: Path, schedule: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        group = optimizers.ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})
        config = optimizers.OptimizersContainer.Config(param_groups=[group], implementation="for-loop")
        self.optimizers = config.build(model_parts=[self.model])
        self.schedules = schedules.LRSchedulersContainer.Config(**schedule).build(
            optimizers=self.optimizers, training_steps=END
        )
        self.rows = Rows()
        self.loader = loaders.ParallelAwareDataloader(self.rows, dp_rank=0, dp_world_size=1, batch_size=BATCH)
        self.step = self.tokens = 0
        config = checkpoints.CheckpointManager.Config(
            enable=True, folder=str(folder), interval=EVERY, keep_latest_k=0, last_save_model_only=False, async_mode="disabled"
        )
        self.checkpointer = config.build(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedules,
            states={"train_state": self},
            sd_adapter=None,
        )

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.tokens = state["step"], state["ntokens_seen"]

    def train(self, until: int, course: Course, *, saves: bool = False) -> None:
        batches = iter(self.loader)
        while self.step < until:
            self.step += 1
            x, y = next(batches)
            self.optimizers.zero_grad()
            loss: Any = nn.functional.mse_loss(self.model(x), y)
            loss.backward()
            course.rates[self.step] = self.optimizers.optimizers[0].param_groups[0]["lr"]
            course.places[self.step] = self.rows.next_index
            self.optimizers.step()
            self.schedules.step()
            self.tokens += 8 * BATCH
            if saves:
                self.checkpointer.save(self.step)

    def adam_steps(self) -> set[float]:
        return {float(state["step"]) for state in self.optimizers.optimizers[0].state.values()}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "schedule",
    [
        {"warmup_steps": 20, "decay_type": "cosine", "min_lr_factor": 0.1},
        {"warmup_steps": 20, "decay_ratio": 0.8, "decay_type": "linear", "min_lr_factor": 0.1},
    ],
)
def test_torchtitan_goes_on_from_a_forecast_as_the_uninterrupted_run(schedule: dict[str, Any], tmp_path: Path) -> None:
    run, whole = Run(tmp_path / "run", schedule), Course()
    run.train(ORIGIN, whole, saves=True)
    run.train(END, whole)
    predicted(tmp_path / "run", tmp_path / "out" / f"step-{VALID}")
    resumed, course = Run(tmp_path / "out", schedule), Course()
    assert resumed.checkpointer.load(VALID)
    assert (resumed.step, resumed.tokens, resumed.adam_steps()) == (VALID, 8 * BATCH * VALID, {float(VALID)})
    resumed.train(END, course)
    assert_goes_on(course, whole)
