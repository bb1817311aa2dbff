"""The clock of a run: the learning rates that its trainer really used, as the snapshots tell them."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from farcast_cli.run.pace import MAX_SCALE, Pace
from farcast_cli.run.trajectory import discover
from farcast_cli.state.rates import rate_at, read_pace
from tests.tiny import save_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch.optim import Optimizer

    Build = Callable[[Any], Any]

STEPS = range(4, 41, 6)
LENGTH = 80
TORCHS: dict[str, Build] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, LENGTH, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 9, 2, 1e-3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, LENGTH),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 10), lr_scheduler.CosineAnnealingLR(o, LENGTH)], [10]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1, 10), lr_scheduler.ExponentialLR(o, 0.97)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=30),
    "linear of transformers": lambda o: lr_scheduler.LambdaLR(o, lambda step: max(0.0, (LENGTH - step) / LENGTH)),
}
"""Schedules whose rates after the last snapshot are known."""


@pytest.fixture(autouse=True)
def _quiet_schedules() -> Iterator[None]:
    """SequentialLR itself calls a deprecated function of torch's at each of its milestones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
        yield


def _sgd(*rates: float) -> Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates])


def _train(
    folder: Path, optimizer: Optimizer, schedule: Any, *, keep: Sequence[str] = ("optimizer", "scheduler")
) -> list[float]:
    """A payload at each of STEPS, from a real loop; the first group's rate at every step that was made."""
    used = []
    folder.mkdir(exist_ok=True)
    for step in range(1, LENGTH):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if step in STEPS:
            states = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
            payload = {"model": {"w": torch.full((2,), float(step))}, "step": step, **{key: states[key] for key in keep}}
            torch.save(payload, folder / f"ckpt_{step}.pt")
    return used


def _pace(folder: Path, ahead: int = 0) -> Pace:
    return read_pace(discover(folder).snapshots, ahead=ahead)


@pytest.mark.parametrize("name", TORCHS)
def test_the_clock_adds_up_the_rates_that_the_trainer_used_and_those_that_it_will_use(name: str, tmp_path: Path) -> None:
    optimizer = _sgd(0.1)
    used = _train(tmp_path, optimizer, TORCHS[name](optimizer))
    pace = _pace(tmp_path, ahead=30)
    assert pace.clock == "rate"
    for first, last in [(4, 10), (4, 40), (22, 34), (40, 41), (40, 55), (40, 70), (16, 70)]:
        assert pace.total(first, last) == pytest.approx(sum(used[first:last]), rel=1e-9)


def test_steps_after_those_that_were_asked_for_are_not_known(tmp_path: Path) -> None:
    optimizer = _sgd(0.1)
    _train(tmp_path, optimizer, TORCHS["CosineAnnealingLR"](optimizer))
    pace = _pace(tmp_path, ahead=30)
    assert pace.covers(4, 70)
    assert not pace.covers(4, 71)
    with pytest.raises(ValueError, match="known are those from 4 to 70"):
        pace.total(40, 71)


def test_a_one_cycle_schedule_is_known_up_to_its_end(tmp_path: Path) -> None:
    optimizer = _sgd(0.1)
    _train(tmp_path, optimizer, TORCHS["OneCycleLR"](optimizer))
    assert 75 <= _pace(tmp_path, ahead=500).edges[-1] <= LENGTH + 1


def test_a_constant_rate_is_one_piece_and_its_scale_is_one_to_the_last_bit(tmp_path: Path) -> None:
    optimizer = _sgd(0.1)
    _train(tmp_path, optimizer, lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
    pace = _pace(tmp_path, ahead=77)
    assert (pace.edges, pace.rates) == ((4, 117), (0.1,))
    assert pace.mean(5.3, 9.1) == 0.1
    assert pace.scale((5.3, 9.1), (40, 111)) == 1.0


def test_groups_that_share_a_schedule_have_one_clock_and_a_frozen_one_does_not_matter(tmp_path: Path) -> None:
    optimizer = _sgd(0.1, 0.03, 0.0)
    used = _train(tmp_path, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, LENGTH))
    assert _pace(tmp_path, ahead=20).total(10, 60) == pytest.approx(sum(used[10:60]), rel=1e-9)


def test_the_rate_of_one_snapshot_is_the_highest_of_its_groups(tmp_path: Path) -> None:
    optimizer = _sgd(0.03, 0.1, 0.0)
    _train(tmp_path, optimizer, lr_scheduler.StepLR(optimizer, LENGTH))
    assert rate_at(discover(tmp_path).origin) == 0.1


def test_groups_with_schedules_of_their_own_count_steps_and_say_so(tmp_path: Path) -> None:
    optimizer = _sgd(0.1, 0.03)
    _train(tmp_path, optimizer, lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda step: 0.9**step]))
    pace = _pace(tmp_path)
    assert (pace.clock, pace.why) == ("steps", "the parameter groups follow different learning-rate schedules")
    assert pace.total(10, 60) == 50


def test_without_a_saved_schedule_the_rates_between_snapshots_lie_on_lines_and_later_ones_are_not_known(tmp_path: Path) -> None:
    optimizer = _sgd(0.1)
    of_its_own = lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count) ** 0.3)
    used = _train(tmp_path, optimizer, of_its_own, keep=["optimizer"])
    pace = _pace(tmp_path, ahead=30)
    assert pace.edges[-1] == 40
    assert pace.total(4, 40) == pytest.approx(sum(used[4:40]), rel=0.02)


def test_a_half_wave_to_a_floor_is_found_in_the_rates_of_the_groups_alone(tmp_path: Path) -> None:
    optimizer = _sgd(0.1)
    used = _train(tmp_path, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, LENGTH, 0.01), keep=["optimizer"])
    pace = _pace(tmp_path, ahead=30)
    assert pace.edges[-1] == 70
    assert pace.total(4, 70) == pytest.approx(sum(used[4:70]), rel=1e-9)


def test_a_rate_that_follows_a_metric_stays_as_far_as_anybody_can_tell(tmp_path: Path) -> None:
    class Plateau(lr_scheduler.ReduceLROnPlateau):
        def step(self, *_: Any) -> None:
            super().step(1.0)

    optimizer = _sgd(0.1)
    _train(tmp_path, optimizer, Plateau(optimizer, patience=12))
    pace = _pace(tmp_path, ahead=30)
    assert pace.mean(40, 70) == pytest.approx(0.1 * 0.1**3)
    assert pace.mean(4, 10) == 0.1


def test_weights_alone_count_steps_and_say_so(tmp_path: Path) -> None:
    for step in STEPS:
        save_safetensors(tmp_path / f"step_{step}.safetensors", {"w": torch.full((2,), float(step))})
    pace = _pace(tmp_path, ahead=30)
    assert (pace.clock, pace.why) == ("steps", "no snapshot contains its learning rate")
    assert (pace.total(3, 8.5), pace.mean(1, 2), pace.scale((0, 5), (5, 90))) == (5.5, 1.0, 1.0)


@pytest.mark.parametrize("left", ["all", "without scheduler.pt", "the log and the arguments", "the log"])
def test_a_trainers_checkpoints_tell_its_rates(left: str, tmp_path: Path) -> None:
    """Without optimizer.pt and scheduler.pt the log does, with later rates only where the arguments name the schedule."""
    used = _real_trainer(tmp_path)
    for folder in tmp_path.glob("checkpoint-*"):
        gone = {"all": [], "without scheduler.pt": ["scheduler.pt"]}.get(left, ["scheduler.pt", "optimizer.pt"])
        for name in [*gone, *(["training_args.bin"] if left == "the log" else [])]:
            (folder / name).unlink()
    pace = _pace(tmp_path, ahead=20)
    assert pace.edges[-1] == (40 if left == "the log" else 60)
    for first, last in [(5, 20), (5, 40), *([(10, 60)] if left != "the log" else [])]:
        assert pace.total(first, last) == pytest.approx(sum(used[first:last]), rel=0.05 if left == "the log" else 1e-9)


def _real_trainer(folder: Path) -> list[float]:
    """A Trainer's run of 70 steps, saved every 5 up to step 40; the rates that its optimiser used."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    used = []

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Notes the rate of every step before it is made."""

        def on_pre_optimizer_step(self, *_: Any, **found: Any) -> None:
            used.append(found["optimizer"].param_groups[0]["lr"])

    class Model(torch.nn.Module):
        """One weight, and the loss as the Trainer wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3))

        def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((self.w * inputs) ** 2).mean()}

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=70,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=8,
        save_steps=5,
        logging_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_total_limit=None,
    )
    rows = [{"inputs": torch.ones(3)} for _ in range(16)]
    trainer = Trainer(model=Model(), args=arguments, train_dataset=rows, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for step in range(45, 71, 5):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return used


def test_a_damaged_trainers_state_counts_steps_and_does_not_stop_the_fit(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / f"checkpoint-{step}"
        save_safetensors(folder / "model.safetensors", {"w": torch.full((2,), float(step))})
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "scheduler.pt").write_bytes(b"no torch file")
    assert _pace(tmp_path).clock == "steps"


def test_a_slower_stretch_counts_less_and_a_rise_out_of_a_warm_up_at_most_three_times() -> None:
    pace = Pace((0, 10, 20, 30), (0.1, 1.0, 0.5))
    assert pace.total(5, 25) == pytest.approx(0.5 + 10 + 2.5)
    assert pace.scale((10, 20), (20, 30)) == 0.5
    assert pace.scale((0, 10), (10, 20)) == MAX_SCALE
    assert pace.total(7, 7) == 0


@pytest.mark.parametrize(("edges", "rates"), [((0, 0), (1.0,)), ((0, 5), ()), ((0, 5), (-1.0,)), ((0, 5), (float("nan"),))])
def test_a_clock_that_no_run_can_have_is_refused(edges: tuple[int, ...], rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising edges"):
        Pace(edges, rates)
