"""mmengine's runner with an iteration-based loop, a warm-up and a cosine to a floor."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.trainers_real.course import END, EVERY, ORIGIN, VALID, Course, assert_goes_on, assert_same_counts, predicted

if TYPE_CHECKING:
    from pathlib import Path

hooks = pytest.importorskip("mmengine.hooks")
models = pytest.importorskip("mmengine.model")
runners = pytest.importorskip("mmengine.runner")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own


class Model(models.BaseModel):  # type: ignore[misc, name-defined]
    """A small regression."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
        return {mode: torch.nn.functional.mse_loss(self.net(x), y)}


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows by their number."""

    def __len__(self) -> int:
        return 4 * END  # mmengine sleeps two seconds where its data ends

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(8, generator=generator), torch.randn(2, generator=generator)


class Rates(hooks.Hook):  # type: ignore[misc, name-defined]
    """Notes the rate that each step uses."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:  # noqa: ARG002 - its hook
        self.course.rates[runner.iter + 1] = runner.optim_wrapper.get_lr()["lr"][0]


def _train(folder: Path, course: Course, checkpoint: Path | None = None) -> Any:
    fall = {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 20, "end": END, "T_max": END - 20, "eta_min": 1e-5}
    runner = runners.Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(Rows(), batch_size=4),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": END},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-3}},
        param_scheduler=[{"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 20}, fall],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": EVERY}},
        custom_hooks=[Rates(course)],
        default_scope="mmengine",
        log_level="ERROR",
        load_from=str(checkpoint) if checkpoint else None,
        resume=checkpoint is not None,
        experiment_name=folder.name,
    )
    runner.train()
    return torch.load(folder / f"iter_{END}.pth")


def test_mmengine_goes_on_from_a_forecast_as_the_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "load", functools.partial(torch.load, weights_only=False)
    )  # mmengine 0.10 is older than torch 2.6
    whole, course = Course(), Course()
    state = _train(tmp_path / "run", whole)
    for path in (tmp_path / "run").glob("iter_*.pth"):
        if int(path.stem.removeprefix("iter_")) > ORIGIN:
            path.unlink()
    forecast = predicted(tmp_path / "run", tmp_path / f"iter_{VALID}.pth")
    resumed = _train(tmp_path / "resumed", course, forecast)
    assert_goes_on(course, whole)
    assert_same_counts(resumed, state, but=("message_hub", "meta.time", "meta.seed", "loss"))
