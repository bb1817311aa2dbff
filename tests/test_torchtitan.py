"""What torchtitan keeps of its schedule and its data: a count without rates, and a pickled place. Both are moved on."""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim.lr_scheduler import LambdaLR

from farcast_cli.run.trajectory import discover
from farcast_cli.state.rates import read_pace
from farcast_cli.trainers.schedules import infer_rate
from tests import dcp_runs
from tests.tiny import forecast_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's checkpoint reader warns of its own internals

ROWS = 4  # of a batch
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def factor(count: int, *, warmup: int, total: int, decay: int, fall: str = "linear", least: float = 0.0) -> float:
    """Torchtitan's own formula: the first step already takes a share of the warm-up, and the end of the fall is never reached."""
    stable = total + 1 - warmup - decay
    if count < warmup:
        return (count + 1) / warmup
    if count < warmup + stable:
        return 1.0
    return least + (1 - least) * FALLS[fall]((count + 1 - warmup - stable) / decay)


class Run(dcp_runs.Run):
    """Of the schedule only its count is saved, and loading it leaves the groups alone."""

    def __init__(self, *, buffers: bool = False) -> None:
        super().__init__(flat=True)
        for group in self.optimizer.param_groups:
            del group["initial_lr"]
            group["lr"] = 3e-3
        self.scheduler: Any = LambdaLR(
            self.optimizer, lambda count: factor(count, warmup=20, total=dcp_runs.TOTAL, decay=150, fall="cosine", least=0.1)
        )
        self.buffers = buffers

    def state(self) -> dict[str, Any]:
        place = {"dataset_state": {"next_index": ROWS * self.step}, "_num_yielded": self.step, "_finished": False}
        if self.buffers:
            place["tokens"] = [self.step] * (self.step % 7)
        loader = {"dp_rank_0": pickle.dumps(place), "world_size": 1}
        return {**super().state(), "lr_scheduler": {"last_epoch": self.scheduler.last_epoch}, "dataloader": loader}

    def load(self, folder: Path) -> None:
        state = self.state()
        load(state, checkpoint_id=str(folder))
        rest = {key: state.pop(key) for key in ("optimizer", "lr_scheduler", "train_state", "dataloader")}
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state, optim_state_dict=rest["optimizer"], options=self.options
        )
        self.scheduler.last_epoch = rest["lr_scheduler"]["last_epoch"]
        self.scheduler._last_lr = self.scheduler.get_lr()
        self.step, self.place = int(rest["train_state"]["step"]), pickle.loads(rest["dataloader"]["dp_rank_0"])  # noqa: S301 - our own


def make(folder: Path, **options: Any) -> Path:
    run = Run(**options)
    for step in dcp_runs.STEPS:
        run.train(step)
        run.save(folder / f"step-{step}")
    return folder


def used(run: Run, until: int) -> list[float]:
    """The rate of each step, before the schedule is stepped."""
    rates = []
    while run.step < until:
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.train(run.step + 1)
    return rates


def test_the_first_resumed_step_has_its_own_rate_and_the_loader_its_own_place(tmp_path: Path) -> None:
    _, outcome = forecast_run(make(tmp_path / "run"), tmp_path / "step-120", 20)
    resumed, control = Run(), Run()
    resumed.load(tmp_path / "step-120")
    control.train(120)
    assert resumed.place == {"dataset_state": {"next_index": 480}, "_num_yielded": 120, "_finished": False}
    assert used(resumed, dcp_runs.TOTAL) == pytest.approx(used(control, dcp_runs.TOTAL), rel=1e-12)
    assert not any("no schedule is saved" in note for note in outcome.notes)


def test_the_rates_ahead_are_known_so_a_forecast_is_as_much_shorter(tmp_path: Path) -> None:
    pace = read_pace(discover(make(tmp_path / "run")).snapshots, ahead=40)
    control = Run()
    rates = used(control, 140)
    assert pace.total(60, 140) == pytest.approx(sum(rates[60:140]), rel=1e-9)


def test_a_loader_that_keeps_more_than_counts_stays_whole_at_the_origin(tmp_path: Path) -> None:
    """A place that is moved on in part is none: buffered tokens are those of the origin."""
    _, outcome = forecast_run(make(tmp_path / "run", buffers=True), tmp_path / "step-120", 20)
    resumed = Run(buffers=True)
    resumed.load(tmp_path / "step-120")
    assert resumed.place["_num_yielded"] == 100
    assert any("dataloader.dp_rank_0 is copied as the origin has it" in note for note in outcome.notes)


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 300])
@pytest.mark.parametrize("decay", [4000, 9700])
def test_a_rate_on_a_fall_is_found_from_the_rates_before_it(fall: str, least: float, warmup: int, decay: int) -> None:
    def rate(count: int) -> float:
        return 3e-4 * factor(count, warmup=warmup, total=10_000, decay=decay, fall=fall, least=least)

    found = infer_rate([(count, rate(count)) for count in range(7000, 8401, 200)], 3e-4, 9123, None)
    assert found == pytest.approx(rate(9123), rel=1e-9)


def test_behind_a_warm_up_the_rate_is_not_made_up() -> None:
    seen = [(count, 3e-4 * factor(count, warmup=500, total=10_000, decay=9500)) for count in range(50, 401, 50)]
    assert infer_rate(seen, 3e-4, 450, None) == pytest.approx(3e-4 * 451 / 500, rel=1e-12)
    assert infer_rate(seen, 3e-4, 501, None) is None


def test_a_tensor_in_the_place_of_a_pickle_is_left_alone(tmp_path: Path) -> None:
    """Bytes that change and are no pickle, such as a random state's, are copied."""
    for index, step in enumerate(range(10, 81, 10)):
        weights = {"w": torch.full((64,), float(step))}
        torch.save({"model": weights, "step": step, "loader": bytes([index, 255])}, tmp_path / f"step_{step}.pt")
    written, _ = forecast_run(tmp_path, tmp_path.parent / "step_100.pt", 20)
    assert torch.load(written, weights_only=False)["loader"] == bytes([7, 255])
