"""Forecasts in learning-rate time: lengths, b, the horizon, and what is said of them."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from farcast_cli.forecast.backtest import backtest_ratio
from farcast_cli.forecast.choice import propose_horizon
from farcast_cli.forecast.fitting import fit
from farcast_cli.forecast.forecaster import Task, forecast
from farcast_cli.forecast.forecaster_file import load_fitted, save_fitted
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.run.pace import STEPS
from farcast_cli.run.trajectory import discover
from tests.conftest import fit_run
from tests.tiny import predict_run, save_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.run.pace import Pace
    from tests.conftest import CallCli

LENGTH = 200
SAVED = range(10, 101, 10)
MOVED = 400  # weights
Build = dict[str, "Callable[[Any], Any]"]
SCHEDULES: Build = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, LENGTH),
    "to a floor": lambda o: lr_scheduler.CosineAnnealingLR(o, LENGTH, 0.03),
    "of its own": lambda o: lr_scheduler.LambdaLR(o, lambda count: 1 / (1 + count) ** 0.3),
    "to the end": lambda o: lr_scheduler.CosineAnnealingLR(o, 100),
    "steep": lambda o: lr_scheduler.CosineAnnealingLR(o, 120),
}


def _train(folder: Path, schedule: str, last: int = 100) -> Path:
    """SGD down a slope that is the same everywhere, so that the weights move as far as the rates add up to, and some noise."""
    folder.mkdir()
    random = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(MOVED, generator=random))
    slope = torch.randn(MOVED, generator=random)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = SCHEDULES[schedule](optimizer)
    for step in range(1, last + 1):
        weight.grad = slope + 0.1 * torch.randn(MOVED, generator=random)
        optimizer.step()
        scheduler.step()
        if step in SAVED or step == last:
            state = {"model": {"w": weight.detach().clone()}, "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"scheduler": scheduler.state_dict()}, folder / f"ckpt_{step:03d}.pt")
    return folder


def _fitted(folder: Path) -> Fitted:
    return fit(discover(folder), num_samples=None)


def _task(fitted: Fitted, horizon: float, pace: Pace | None = None, *, anneals: bool = False) -> Task:
    timeline = Timeline(fitted.gram.steps, float(fitted.steps[-1]))
    known = fitted.provenance.pace if pace is None else pace
    return Task(fitted.gram, fitted.sample, timeline, horizon, pace=known, anneals=anneals)


def _size(method: str, task: Task) -> float:
    return task.gram.total_norm(forecast(METHODS[method], task))


def _written(path: Path) -> torch.Tensor:
    weight: torch.Tensor = torch.load(path, weights_only=True)["model"]["w"]
    return weight


@pytest.mark.parametrize("method", ["drift", "line", "line-fit", "blend"])
def test_a_step_is_as_much_shorter_as_the_rate_over_the_horizon_is_lower(method: str, tmp_path: Path) -> None:
    """Against the truth, which the run reaches later: in steps all of these overshoot."""
    fitted = _fitted(_train(tmp_path / "run", "steep"))
    used = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule, rates = SCHEDULES["steep"](used), []
    for _ in range(120):
        rates.append(used.param_groups[0]["lr"])
        used.step()
        schedule.step()
    expected = np.mean(rates[100:110]) / np.mean(rates[80:100])
    assert _task(fitted, 10).pace_ahead == pytest.approx(expected, rel=1e-9)
    assert _size(method, _task(fitted, 10)) == pytest.approx(expected * _size(method, _task(fitted, 10, STEPS)), rel=1e-6)


@pytest.mark.parametrize("method", ["drift", "line", "blend", "k5"])
def test_under_a_cosine_b_is_smaller_in_rate_time_than_in_steps_and_nearer_to_the_real_error(
    method: str, tmp_path: Path
) -> None:
    fitted = _fitted(_train(tmp_path / "run", "steep"))
    later = _written(_train(tmp_path / "longer", "steep", last=110) / "ckpt_110.pt")
    last = _written(tmp_path / "run" / "ckpt_100.pt")
    b, real = {}, {}
    for clock in ("rate", "steps"):
        (outcome,) = predict_run(
            fitted, f"{tmp_path / clock}.pt", horizons=[10], clock=clock, method=method, purpose="evaluation"
        )
        assert outcome.path is not None
        b[clock] = outcome.decision.ratio
        real[clock] = float((_written(outcome.path) - later).norm() / (last - later).norm())
    assert b["rate"] < b["steps"]
    assert real["rate"] < real["steps"]


def test_with_a_constant_rate_the_forecast_has_the_bytes_that_it_has_in_steps(tmp_path: Path) -> None:
    fitted = _fitted(_train(tmp_path / "run", "constant"))
    assert fitted.provenance.pace.rates == (0.1,)
    for method in METHODS:
        found = [forecast(METHODS[method], _task(fitted, 30, pace)).tobytes() for pace in (fitted.provenance.pace, STEPS)]
        assert found[0] == found[1], method
    for clock in ("rate", "steps"):
        (outcome,) = predict_run(fitted, f"{tmp_path / clock}.pt", horizons=[30], clock=clock)
        assert (outcome.pace.clock, outcome.length_factor) == (clock, 1.0)
    assert (tmp_path / "rate.pt").read_bytes() == (tmp_path / "steps.pt").read_bytes()


def test_the_clock_of_steps_gives_the_numbers_of_a_run_whose_rates_nobody_knows(tmp_path: Path, call_cli: CallCli) -> None:
    fitted = _fitted(_train(tmp_path / "run", "steep"))
    save_fitted(fitted, tmp_path / "f.safetensors")
    done = call_cli(
        "backtest", "--clock", "steps", "--horizon", 10, "--method", "blend", "--json", cwd=tmp_path, env=_env(tmp_path)
    )
    found = json.loads(done.stdout)
    task = _task(fitted, 10, STEPS)
    assert found["clock"] == "steps"
    assert found["decisions"][0]["ratio"] == backtest_ratio(METHODS["blend"], task)
    assert found["decisions"][0]["ratio"] > backtest_ratio(METHODS["blend"], _task(fitted, 10))


def _env(folder: Path) -> dict[str, str]:
    return {"FARCAST_FORECASTER": str(folder / "f.safetensors")}


def test_to_resume_a_step_keeps_its_full_length_while_a_quarter_of_the_highest_rate_is_left(tmp_path: Path) -> None:
    """The cosine is at a quarter of its peak two thirds of the way, at step 133 of 200."""
    fitted = _fitted(_train(tmp_path / "run", "cosine"))
    full, steps = (_task(fitted, 30.0, pace, anneals=True) for pace in (None, STEPS))
    late = replace(full, horizon=40.0)
    assert _size("blend", full) == _size("blend", steps)
    assert _size("blend", late) < 0.8 * _size("blend", replace(steps, horizon=40.0))
    assert (full.length_factor, late.length_factor) == (1.0, late.pace_ahead)
    assert full.pace_ahead < 0.7


def test_a_step_to_resume_that_is_longer_than_half_the_history_is_scaled(tmp_path: Path) -> None:
    """At a rate that falls slowly, so that its end is no reason."""
    task = _task(_fitted(_train(tmp_path / "run", "to a floor")), 46.0, anneals=True)
    assert task.length_factor == 1.0
    longer = replace(task, horizon=47.0)
    assert longer.length_factor == longer.pace_ahead < 1.0


def test_a_horizon_that_is_proposed_ends_while_a_quarter_of_the_highest_rate_is_left(tmp_path: Path) -> None:
    task = _task(_fitted(_train(tmp_path / "run", "cosine")), 1.0, anneals=True)
    choose: Any = {"after_leap": False, "steps_left": None}
    assert propose_horizon(METHODS["drift"], replace(task, anneals=False), "resume", **choose) == 45
    assert 30 <= propose_horizon(METHODS["drift"], task, "resume", **choose) <= 36


def test_where_the_decay_is_nearly_over_the_proposal_is_the_usual_one(tmp_path: Path) -> None:
    task = _task(_fitted(_train(tmp_path / "run", "steep")), 1.0, anneals=True)
    assert propose_horizon(METHODS["drift"], task, "resume", after_leap=False, steps_left=None) == 45
    assert replace(task, horizon=19.0).length_factor == replace(task, horizon=19.0).pace_ahead < 0.5


@pytest.mark.parametrize(("schedule", "horizon", "said"), [("cosine", 30, "0.6 to 1.0"), ("steep", 19, "-0.1 to 0.8")])
def test_under_a_falling_rate_predict_says_what_such_leaps_replaced_and_how_to_make_the_control(
    schedule: str, horizon: int, said: str, tmp_path: Path, call_cli: CallCli
) -> None:
    _train(tmp_path / "run", schedule)
    call_cli("fit", "run", cwd=tmp_path, env=_env(tmp_path))
    done = call_cli("predict", "--horizon", horizon, "--even-if-worse", cwd=tmp_path, env=_env(tmp_path))
    (line,) = [line for line in done.stderr.splitlines() if "the learning rate falls" in line]
    assert f"replaced {said} of the skipped training" in line
    control = line.rpartition("farcast ")[2].split()
    made = call_cli(*control, cwd=tmp_path, env=_env(tmp_path))
    assert made.returncode == 0
    assert made.stdout.strip() == f"control/ckpt_{100 + horizon:03d}.pt"
    assert torch.equal(_written(tmp_path / made.stdout.strip()), _written(tmp_path / "run" / "ckpt_100.pt"))
    assert "the learning rate falls" not in made.stderr


def test_nothing_is_skipped_of_a_run_whose_schedule_has_ended(tmp_path: Path, call_cli: CallCli) -> None:
    """A CosineAnnealingLR that is stepped on past T_max rises again, so that a leap would seem to skip training."""
    _train(tmp_path / "run", "to the end")
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    for arguments in (("predict",), ("leap", "run"), ("leap", "run", "--counters", "advance")):
        done = call_cli(*arguments, "--dry-run", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (10, "")
        assert "the run ended at step 100: there is no training to skip" in done.stderr
    done = call_cli("predict", "--horizon", 30, "--even-if-worse", cwd=tmp_path)
    assert done.returncode == 2
    assert done.errors[0].endswith(
        "expected a step before the end of the run, run/ckpt_100.pt says CosineAnnealingLR.T_max = 100"
    )


def test_a_horizon_past_the_floor_of_a_cosine_says_that_the_rate_rises_again(tmp_path: Path, call_cli: CallCli) -> None:
    fit_run(_train(tmp_path / "run", "steep"), tmp_path / "forecaster.safetensors")
    said = {h: call_cli("predict", "--horizon", h, "--even-if-worse", cwd=tmp_path).stderr for h in (20, 21)}
    note = "ckpt_100.pt.scheduler: the learning rate rises again after step 120, T_max of CosineAnnealingLR"
    assert [f"note: {note}" in said[h].splitlines() for h in (20, 21)] == [False, True]


def test_several_horizons_under_a_falling_rate_share_one_note_and_one_control(tmp_path: Path, call_cli: CallCli) -> None:
    _train(tmp_path / "run", "cosine")
    call_cli("fit", "run", cwd=tmp_path, env=_env(tmp_path))
    done = call_cli("predict", "--horizon", "20,30", "--even-if-worse", cwd=tmp_path, env=_env(tmp_path))
    (line,) = [line for line in done.stderr.splitlines() if "the learning rate falls" in line]
    made = call_cli(*line.rpartition("farcast ")[2].split(), cwd=tmp_path, env=_env(tmp_path))
    assert made.stdout.splitlines() == ["control/ckpt_120.pt", "control/ckpt_130.pt"]


def test_nothing_is_said_of_a_decay_where_the_rate_stays_or_the_counters_do(tmp_path: Path, call_cli: CallCli) -> None:
    for schedule, options in (("constant", ()), ("cosine", ("--counters", "keep"))):
        _train(tmp_path / schedule, schedule)
        call_cli("fit", schedule, cwd=tmp_path, env=_env(tmp_path))
        done = call_cli("predict", "--horizon", 30, *options, cwd=tmp_path, env=_env(tmp_path))
        assert done.returncode == 0
        assert "the learning rate falls" not in done.stderr


def test_the_clock_is_always_said(tmp_path: Path, call_cli: CallCli) -> None:
    _train(tmp_path / "run", "steep")
    call_cli("fit", "run", cwd=tmp_path, env=_env(tmp_path))
    predicted: Any = ("predict", "--horizon", 10, "--even-if-worse", "--overwrite", "--json")
    for options, clock, line in (
        (
            (),
            "rate",
            "clock: learning rate, over the horizon 0.27 of the rate before it; the update is written at 0.27 of its length",
        ),
        (("--clock", "steps"), "steps", "clock: steps (as --clock asks)"),
    ):
        done = call_cli(*predicted, *options, cwd=tmp_path, env=_env(tmp_path))
        found = json.loads(done.stdout)
        assert found["clock"] == clock
        assert line in done.stderr.splitlines()
        assert json.loads((tmp_path / f"{found['path']}").with_suffix(".pt.farcast.json").read_text())["clock"] == clock
    done = call_cli("backtest", "--horizon", 10, cwd=tmp_path, env=_env(tmp_path))
    assert "clock: learning rate" in done.stdout.splitlines()


def test_where_the_rates_are_not_known_steps_are_counted_and_asking_for_rates_is_refused(
    tmp_path: Path, call_cli: CallCli
) -> None:
    for step in SAVED:
        save_safetensors(tmp_path / "run" / f"step_{step}.safetensors", {"w": torch.arange(MOVED) * float(step)})
    call_cli("fit", "run", cwd=tmp_path, env=_env(tmp_path))
    done = call_cli("backtest", "--horizon", 10, cwd=tmp_path, env=_env(tmp_path))
    assert "clock: steps (no snapshot contains its learning rate)" in done.stdout.splitlines()
    refused = call_cli("predict", "--horizon", 10, "--clock", "rate", cwd=tmp_path, env=_env(tmp_path))
    assert refused.returncode == 2
    assert refused.errors == ["error: --clock rate: no snapshot contains its learning rate"]
    assert refused.hints == ["hint: --clock steps, or no --clock"]


def test_a_forecaster_of_an_older_farcast_counts_steps(tmp_path: Path) -> None:
    fitted = _fitted(_train(tmp_path / "run", "cosine"))
    path = tmp_path / "f.safetensors"
    save_fitted(fitted, path)
    assert load_fitted(path).provenance.pace == fitted.provenance.pace
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    record = json.loads(header["__metadata__"]["farcast"])
    del record["pace"]
    header["__metadata__"]["farcast"] = json.dumps(record, separators=(",", ":"))
    older = json.dumps(header).encode()
    older += b" " * (-len(older) % 8)
    path.write_bytes(struct.pack("<Q", len(older)) + older + raw[8 + size :])
    pace = load_fitted(path).provenance.pace
    assert pace.clock == "steps"
    assert "older farcast" in pace.why


def test_a_forecast_past_the_rates_that_are_known_counts_steps_and_says_so(tmp_path: Path) -> None:
    _train(tmp_path / "run", "of its own")
    for path in (tmp_path / "run").iterdir():
        state = torch.load(path, weights_only=True)
        del state["scheduler"]
        torch.save(state, path)
    (outcome,) = predict_run(_fitted(tmp_path / "run"), tmp_path / "out.pt", horizons=[30])
    assert outcome.pace.clock == "steps"
    assert outcome.pace.why == "the learning rates after step 100 are unknown"


def test_a_forecast_longer_than_fit_looks_ahead_says_how_far_the_rates_are_known(tmp_path: Path, call_cli: CallCli) -> None:
    fit_run(_train(tmp_path / "run", "cosine"), tmp_path / "forecaster.safetensors")
    until = "235, 1.5 times the history ahead"
    done = call_cli("predict", "--horizon", 5000, cwd=tmp_path)
    assert f"clock: steps (the forecaster has the learning rates up to step {until})" in done.stderr
    assert "up to step " + until in call_cli("backtest", "--horizon", 5000, cwd=tmp_path).stdout


def test_verify_says_how_much_of_the_stretch_was_trained_in_learning_rate(tmp_path: Path, call_cli: CallCli) -> None:
    fitted = _fitted(_train(tmp_path / "run", "steep"))
    predict_run(fitted, tmp_path / "out.pt", horizons=[19])
    _train(tmp_path / "longer", "steep", last=110)
    done = call_cli("verify", "out.pt", "--against", "longer/ckpt_110.pt", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    pace = fitted.provenance.pace
    assert found["clock"] == "rate"
    assert found["trained"] == pytest.approx(pace.total(100, 110) / pace.total(100, 119), rel=1e-3)
    assert "training covered 0.86 of the horizon, in learning rate" in done.stderr
