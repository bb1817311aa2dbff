"""Schedules stepped on from their state give the learning rates of an uninterrupted run."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from farcast_cli.run.trajectory import discover
from farcast_cli.state.advance import advance
from farcast_cli.trainers.schedules import Observation, advance_scheduler, ended_at, infer_rate
from tests.tiny import save_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch.optim import Optimizer

    from farcast_cli.state.advance import Advanced

    Build = Callable[[Any], Any]

LENGTH = 70  # steps of a whole run
LEAPS = [(3, 1), (4, 9), (9, 1), (12, 30), (20, 5), (39, 1)]  # (steps before the leap, horizon)


@pytest.fixture(autouse=True)
def _quiet_schedules() -> Iterator[None]:
    """SequentialLR itself calls a deprecated function of torch's at each of its milestones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
        yield


def _sgd() -> Optimizer:
    """Two groups with rates of their own."""
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.03}], lr=0.1, momentum=0.9)


def _adam() -> Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


STEPPED: dict[str, Build] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 15, 15, 40], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 12),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 30),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 50, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 25, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 9, 2, 1e-3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, LENGTH),
    "OneCycleLR in three phases": lambda o: lr_scheduler.OneCycleLR(o, 0.2, LENGTH, three_phase=True, anneal_strategy="linear"),
    "CyclicLR triangular": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 8),
    "CyclicLR triangular2": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 8, mode="triangular2"),
    "CyclicLR exp_range": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 5, 9, mode="exp_range", gamma=0.99),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, 1, 10),
            lr_scheduler.CosineAnnealingLR(o, 30),
            lr_scheduler.CosineAnnealingWarmRestarts(o, 6),
        ],
        [10, 40],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1, 10), lr_scheduler.ExponentialLR(o, 0.97)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=30),
    "SWALR on a line": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=30, anneal_strategy="linear"),
}
"""Schedules whose state holds all of their formula."""

LAMBDAS: dict[str, Build] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / math.sqrt(1 + epoch)),
    "SequentialLR of lambdas": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LambdaLR(o, lambda epoch: (epoch + 1) / 10), lr_scheduler.CosineAnnealingLR(o, 40)],
        [10],
    ),
    "ChainedScheduler of lambdas": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.LambdaLR(o, lambda epoch: min(1, (epoch + 1) / 10)),
            lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
        ]
    ),
}
"""Schedules whose formula is a function, which no file holds."""


def _rates(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Everything that a schedule sets."""
    return [{key: group[key] for key in ("lr", "momentum", "betas") if key in group} for group in optimizer.param_groups]


def _train(optimizer: Optimizer, schedule: Any, count: int) -> list[list[dict[str, Any]]]:
    """Step both; the rates after each step."""
    found = []
    for _ in range(count):
        optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(1.0)  # a metric that never falls
        else:
            schedule.step()
        found.append(_rates(optimizer))
    return found


def _uninterrupted(make: Callable[[], Optimizer], build: Build) -> list[list[dict[str, Any]]]:
    """The rates after steps 1 .. LENGTH - 1; OneCycleLR would not do one more than LENGTH."""
    optimizer = make()
    return _train(optimizer, build(optimizer), LENGTH - 1)


def _states_after(make: Callable[[], Optimizer], build: Build, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    optimizer = make()
    schedule = build(optimizer)
    _train(optimizer, schedule, steps)
    return copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedule.state_dict())


def _resumed(
    make: Callable[[], Optimizer], build: Build, groups: list[dict[str, Any]], state: dict[str, Any], count: int
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Fresh objects with the given states: the rates as loaded, and after each of `count` steps."""
    optimizer = make()
    schedule = build(optimizer)
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    schedule.load_state_dict(copy.deepcopy(state))  # CyclicLR takes keys out of what it is given
    return _rates(optimizer), _train(optimizer, schedule, count)


# --- torch's schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_sgd, _adam])
@pytest.mark.parametrize("name", STEPPED)
def test_a_schedule_of_torchs_own_continues_with_the_rates_of_an_uninterrupted_run(
    name: str, make: Callable[[], Optimizer]
) -> None:
    """Exact equality at every step: the leap does the very operations that training would have done."""
    build = STEPPED[name]
    expected = _uninterrupted(make, build)
    for before, horizon in LEAPS:
        optimizer_state, state = _states_after(make, build, before)
        note = advance_scheduler(state, optimizer_state["param_groups"], before + horizon)
        loaded, later = _resumed(make, build, optimizer_state["param_groups"], state, LENGTH - 1 - before - horizon)
        assert note == ""
        assert loaded == expected[before + horizon - 1]
        assert later == expected[before + horizon :]


@pytest.mark.parametrize("name", STEPPED)
def test_a_schedule_of_torchs_own_ends_up_in_the_state_of_an_uninterrupted_run(name: str) -> None:
    for before, horizon in LEAPS:
        optimizer_state, state = _states_after(_sgd, STEPPED[name], before)
        advance_scheduler(state, optimizer_state["param_groups"], before + horizon)
        _, expected = _states_after(_sgd, STEPPED[name], before + horizon)
        assert state == expected


def test_one_cycle_moves_the_momentum_with_the_rate() -> None:
    build = STEPPED["OneCycleLR"]
    sgd, state = _states_after(_sgd, build, 10)
    advance_scheduler(state, sgd["param_groups"], 20)  # the peak, .3 of the cycle
    assert sgd["param_groups"][0]["momentum"] == pytest.approx(0.85, abs=1e-12)
    adam, state = _states_after(_adam, build, 10)
    advance_scheduler(state, adam["param_groups"], 20)
    assert adam["param_groups"][0]["betas"][0] == pytest.approx(0.85, abs=1e-12)
    assert adam["param_groups"][0]["betas"][1] == 0.999


@pytest.mark.parametrize("name", LAMBDAS)
def test_a_schedule_made_of_functions_has_the_right_rates_from_the_second_resumed_step_on(name: str) -> None:
    """The first one need not be exact, for the function is in no file; that is said in a note."""
    build = LAMBDAS[name]
    expected = _uninterrupted(_sgd, build)
    for before, horizon in LEAPS:
        optimizer_state, state = _states_after(_sgd, build, before)
        note = advance_scheduler(state, optimizer_state["param_groups"], before + horizon)
        loaded, later = _resumed(_sgd, build, optimizer_state["param_groups"], state, LENGTH - 1 - before - horizon)
        assert loaded == expected[before + horizon - 1] or "first resumed step" in note
        assert later == expected[before + horizon :]


def test_a_multiplicative_schedule_of_a_constant_factor_continues_exactly() -> None:
    """Within 1e-12: the rate is worked out as a power, where torch multiplies step by step."""

    def build(optimizer: Optimizer) -> Any:
        return lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.97)

    expected = _uninterrupted(_sgd, build)
    seen = [Observation(step, tuple(group["lr"] for group in expected[step - 1])) for step in (8, 12, 16, 20)]
    optimizer_state, state = _states_after(_sgd, build, 20)
    advance_scheduler(state, optimizer_state["param_groups"], 30, observations=seen)
    loaded, later = _resumed(_sgd, build, optimizer_state["param_groups"], state, LENGTH - 1 - 30)
    for got, wanted in zip([loaded, *later], expected[29:], strict=True):
        assert [group["lr"] for group in got] == pytest.approx([group["lr"] for group in wanted], rel=1e-12)


def test_a_multiplicative_schedule_of_another_factor_is_not_said_to_mend_itself() -> None:
    """Its rate is a product over all steps: one that was missed is missed for good."""

    def build(optimizer: Optimizer) -> Any:
        return lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9 if epoch % 3 else 1.05)

    expected = _uninterrupted(_sgd, build)
    seen = [Observation(step, tuple(group["lr"] for group in expected[step - 1])) for step in (8, 12, 16, 20)]
    optimizer_state, state = _states_after(_sgd, build, 20)
    note = advance_scheduler(state, optimizer_state["param_groups"], 30, observations=seen)
    _, later = _resumed(_sgd, build, optimizer_state["param_groups"], state, LENGTH - 1 - 30)
    assert later != expected[30:]
    assert "MultiplicativeLR" in note


def test_lambdas_of_their_own_for_each_group_never_get_a_rate_of_another_group() -> None:
    """Group 0 is constant, group 1 decays: group 0's formula must not set group 1's rate."""

    def build(optimizer: Optimizer) -> Any:
        return lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda epoch: 1 / (1 + epoch)])

    expected = _uninterrupted(_sgd, build)
    seen = [Observation(step, tuple(group["lr"] for group in expected[step - 1])) for step in (8, 12, 16, 20)]
    optimizer_state, state = _states_after(_sgd, build, 20)
    note = advance_scheduler(state, optimizer_state["param_groups"], 30, observations=seen)
    second = optimizer_state["param_groups"][1]["lr"]
    assert second == expected[29][1]["lr"] or (second == expected[19][1]["lr"] and "first resumed step" in note)


def test_a_plateau_schedule_keeps_its_rate_its_best_value_and_its_patience() -> None:
    """Its rate follows a metric that lies in the future: nothing but its own count of calls can move."""
    optimizer = _sgd()
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    for metric in (1.0, 0.9, 0.95, 0.95, 0.95, 0.95):
        schedule.step(metric)
    state, groups = copy.deepcopy(schedule.state_dict()), copy.deepcopy(optimizer.state_dict()["param_groups"])
    note = advance_scheduler(state, groups, 10)
    assert state == {**schedule.state_dict(), "last_epoch": 10}
    assert [group["lr"] for group in groups] == [0.05, 0.015]
    assert "metric" in note


# --- schedules in the files of a run ---------------------------------------------------------------------------------


def _advanced(tmp_path: Path, build: Build, *, horizon: int, with_optimizer: bool = True) -> Advanced:
    """The state of a run of .pt files with snapshots at steps 8, 12, 16 and 20, `horizon` steps on."""
    optimizer = _sgd()
    schedule = build(optimizer)
    for step in range(1, 21):
        _train(optimizer, schedule, 1)
        if step >= 8 and step % 4 == 0:
            payload = {"model": {"w": torch.full((3,), float(step))}, "scheduler": schedule.state_dict(), "step": step}
            payload |= {"optimizer": optimizer.state_dict()} if with_optimizer else {}
            torch.save(payload, tmp_path / f"step_{step}.pt")
    return advance(discover(tmp_path).snapshots, horizon)


@pytest.mark.parametrize("horizon", [1, 10, 29])
@pytest.mark.parametrize("name", STEPPED)
def test_a_schedule_read_from_a_checkpoint_continues_with_the_rates_of_an_uninterrupted_run(
    name: str, horizon: int, tmp_path: Path
) -> None:
    """Exact equality; 1e-12 would do for those that compute a rate from the one before."""
    build = STEPPED[name]
    expected = _uninterrupted(_sgd, build)
    tree = _advanced(tmp_path, build, horizon=horizon).trees[""].tree
    loaded, later = _resumed(_sgd, build, tree["optimizer"]["param_groups"], tree["scheduler"], LENGTH - 21 - horizon)
    assert loaded == expected[19 + horizon]
    assert later == expected[20 + horizon :]
    assert tree["scheduler"] == _states_after(_sgd, build, 20 + horizon)[1]


@pytest.mark.parametrize("name", [*STEPPED, "LambdaLR"])
def test_a_checkpoint_without_optimizer_keeps_a_rate_for_every_group(name: str, tmp_path: Path) -> None:
    build = (STEPPED | LAMBDAS)[name]
    advanced = _advanced(tmp_path, build, horizon=10, with_optimizer=False)
    schedule = advanced.trees[""].tree["scheduler"]
    assert len(schedule["_last_lr"]) == 2
    expected = _states_after(_sgd, build, 30)[1]
    if name.startswith(("OneCycleLR", "SWALR")):  # the rates that they lead to are in the optimizer's groups
        assert "in the optimizer, which the file lacks" in advanced.notes[0]
        assert schedule == {**expected, "_last_lr": schedule["_last_lr"]}
    elif name in STEPPED:
        assert schedule == expected


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "LinearLR", "ExponentialLR", "MultiStepLR"])
@pytest.mark.parametrize(("horizon", "epochs"), [(50, 2), (60, 2), (74, 2), (75, 3), (10, 0)])
def test_a_schedule_that_is_stepped_once_an_epoch_moves_on_by_whole_epochs(
    name: str, horizon: int, epochs: int, tmp_path: Path
) -> None:
    """Epochs of 25 steps, saved at their ends."""
    optimizer = _sgd()
    schedule = STEPPED[name](optimizer)
    for epoch in range(1, 9):
        _train(optimizer, schedule, 1)
        payload = {"model": {"w": torch.full((3,), float(epoch))}, "scheduler": schedule.state_dict(), "step": 25 * epoch}
        torch.save({**payload, "optimizer": optimizer.state_dict()}, tmp_path / f"step_{25 * epoch}.pt")
    tree = advance(discover(tmp_path).snapshots, horizon).trees[""].tree
    expected = _uninterrupted(_sgd, STEPPED[name])
    loaded, later = _resumed(_sgd, STEPPED[name], tree["optimizer"]["param_groups"], tree["scheduler"], 20)
    assert loaded == expected[7 + epochs]
    assert later == expected[8 + epochs : 28 + epochs]


def test_a_schedule_that_moves_twice_a_step_is_moved_twice_as_far(tmp_path: Path) -> None:
    """As accelerate's does on two processes."""
    optimizer = _sgd()
    schedule = STEPPED["CosineAnnealingLR"](optimizer)
    for step in range(1, 9):
        _train(optimizer, schedule, 2)
        payload = {"model": {"w": torch.full((3,), float(step))}, "scheduler": schedule.state_dict(), "step": step}
        torch.save({**payload, "optimizer": optimizer.state_dict()}, tmp_path / f"step_{step}.pt")
    tree = advance(discover(tmp_path).snapshots, 10).trees[""].tree
    assert tree["scheduler"]["last_epoch"] == 36
    rates = [{"lr": group["lr"], "momentum": 0.9} for group in tree["optimizer"]["param_groups"]]
    assert rates == _uninterrupted(_sgd, STEPPED["CosineAnnealingLR"])[35]


def test_a_plateau_schedule_in_a_checkpoint_is_noted_and_left_at_its_rate(tmp_path: Path) -> None:
    result = _advanced(tmp_path, lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2), horizon=10)
    tree = result.trees[""].tree
    assert tree["scheduler"]["last_epoch"] == 30
    assert tree["scheduler"]["best"] == 1.0
    assert tree["optimizer"]["param_groups"][0]["lr"] == 0.1 * 0.5**6  # at steps 4, 7, 10, 13, 16 and 19
    assert any("metric" in note for note in result.notes)


def test_two_schedules_move_the_rates_of_their_own_optimizers(tmp_path: Path) -> None:
    builds = STEPPED["StepLR"], STEPPED["CosineAnnealingLR"]
    optimizers = [_sgd(), _adam()]
    schedules = [build(optimizer) for build, optimizer in zip(builds, optimizers, strict=True)]
    for step in range(1, 21):
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            _train(optimizer, schedule, 1)
        if step >= 8 and step % 4 == 0:
            payload = {
                "model": {"w": torch.full((3,), float(step))},
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "schedulers": [schedule.state_dict() for schedule in schedules],
                "step": step,
            }
            torch.save(payload, tmp_path / f"step_{step}.pt")
    tree = advance(discover(tmp_path).snapshots, 10).trees[""].tree
    for make, build, state in zip((_sgd, _adam), builds, tree["optimizers"], strict=True):
        expected = _uninterrupted(make, build)[29]
        assert [group["lr"] for group in state["param_groups"]] == [group["lr"] for group in expected]


def test_a_schedule_that_cannot_be_paired_with_an_optimizer_is_noted(tmp_path: Path) -> None:
    """Two optimisers and one schedule: whichever it belongs to keeps its old rate, and that must not pass in silence."""
    optimizers = [_sgd(), _adam()]
    schedule = STEPPED["StepLR"](optimizers[0])
    for step in range(1, 21):
        _train(optimizers[0], schedule, 1)
        if step >= 8 and step % 4 == 0:
            payload = {
                "model": {"w": torch.full((3,), float(step))},
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scheduler": schedule.state_dict(),
                "step": step,
            }
            torch.save(payload, tmp_path / f"step_{step}.pt")
    result = advance(discover(tmp_path).snapshots, 10)
    rates = [group["lr"] for group in result.trees[""].tree["optimizers"][0]["param_groups"]]
    exact = rates == [group["lr"] for group in _uninterrupted(_sgd, STEPPED["StepLR"])[29]]
    assert exact or any("scheduler" in note for note in result.notes)


# --- transformers' schedules -----------------------------------------------------------------------------------------

TOTAL, WARMUP = 200, 20


def _transformers(kind: str) -> Build:
    from transformers import get_scheduler

    return lambda optimizer: get_scheduler(kind, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL)


def _transformers_rates(kind: str) -> list[list[dict[str, Any]]]:
    optimizer = _sgd()
    return _train(optimizer, _transformers(kind)(optimizer), TOTAL)


def _leap(kind: str, *, before: int, horizon: int, every: int) -> tuple[str, list[Any]]:
    """The note, and the rates as loaded and at all later steps."""
    rates = _transformers_rates(kind)
    seen = [
        Observation(step, tuple(group["lr"] for group in rates[step - 1]))
        for step in range(before - 3 * every, before + 1, every)
        if step > 0
    ]
    optimizer_state, state = _states_after(_sgd, _transformers(kind), before)
    note = advance_scheduler(state, optimizer_state["param_groups"], before + horizon, total_steps=TOTAL, observations=seen)
    loaded, later = _resumed(_sgd, _transformers(kind), optimizer_state["param_groups"], state, TOTAL - before - horizon)
    return note, [loaded, *later]


@pytest.mark.parametrize(("before", "horizon", "every"), [(40, 10, 10), (100, 50, 5), (60, 139, 20), (150, 1, 30)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_schedule_of_transformers_is_exact_from_the_first_resumed_step_on(
    kind: str, before: int, horizon: int, every: int
) -> None:
    """Exact equality: the formula that is found is the one that transformers evaluates."""
    note, found = _leap(kind, before=before, horizon=horizon, every=every)
    assert note == ""
    assert found == _transformers_rates(kind)[before + horizon - 1 :]


@pytest.mark.parametrize(("before", "horizon", "every"), [(8, 2, 2), (12, 8, 4), (6, 14, 2)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_leap_that_ends_within_the_warm_up_is_exact_too(kind: str, before: int, horizon: int, every: int) -> None:
    note, found = _leap(kind, before=before, horizon=horizon, every=every)
    assert note == ""
    assert found == _transformers_rates(kind)[before + horizon - 1 :]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_leap_out_of_the_warm_up_sets_no_wrong_rate_without_a_word(kind: str) -> None:
    """On the way up all formulas agree: what comes behind the peak is exact, or it is said that it is not."""
    note, found = _leap(kind, before=16, horizon=60, every=4)
    expected = _transformers_rates(kind)[75:]
    assert found[0] == expected[0] or "first resumed step" in note
    assert found[1:] == expected[1:]


@pytest.mark.parametrize(("before", "horizon", "every"), [(50, 10, 10), (100, 50, 5), (120, 79, 40), (150, 1, 30)])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_three_rates_on_the_way_down_tell_where_it_ends(kind: str, before: int, horizon: int, every: int) -> None:
    """As under accelerate or Lightning, where no file says how long the run is."""
    rates = [groups[1]["lr"] for groups in _transformers_rates(kind)]
    seen = [(step, rates[step - 1]) for step in range(before - 2 * every, before + 1, every)]
    assert infer_rate(seen, 0.03, before + horizon, None) == rates[before + horizon - 1]


def test_two_rates_on_the_way_down_tell_nothing() -> None:
    assert infer_rate([(100, 0.05), (120, 0.04)], 0.1, 150, None) is None


def test_a_single_observation_tells_no_formula() -> None:
    assert infer_rate([(100, 0.05)], 0.1, 150, 200) is None


def test_observations_that_no_formula_explains_give_no_rate() -> None:
    seen = [(10, 0.1), (20, 0.04), (30, 0.09)]
    assert infer_rate(seen, 0.1, 50, 200) is None


# --- the formula that a Trainer's arguments name ---------------------------------------------------------------------

NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt")},
    "cosine with cycles": ("cosine", {"num_cycles": 1.5}),
    "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 3}),
    "polynomial of a power": ("polynomial", {"power": 2.0, "lr_end": 1e-4}),
    "inverse_sqrt of a timescale": ("inverse_sqrt", {"timescale": 50}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr": 1e-4}),
    "cosine_with_min_lr by a share": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "cosine_warmup_with_min_lr": ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    "cosine_warmup_with_min_lr from a share": ("cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 0.2}),
    "warmup_stable_decay": ("warmup_stable_decay", {"num_decay_steps": 60}),
    **{
        f"warmup_stable_decay, {kind}": (
            "warmup_stable_decay",
            {"num_decay_steps": 60, "num_stable_steps": 90, "warmup_type": kind, "decay_type": kind, "min_lr_ratio": 0.1},
        )
        for kind in ("linear", "1-sqrt", "cosine")
    },
}
"""Every schedule of transformers that follows the step alone, by its type and its settings."""
PEAK = 0.01


def _made_by_transformers(name: str, warmup: int, total: int) -> tuple[Optimizer, Any]:
    from transformers import get_scheduler

    kind, settings = NAMED[name]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=PEAK)
    return optimizer, get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=settings
    )


def _trainers_run(folder: Path, name: str, steps: Iterable[int], warmup: float = WARMUP, total: int = TOTAL) -> list[float]:
    """Snapshots with the files that a Trainer writes, by the libraries that write them; the rates after every step."""
    from transformers import TrainingArguments

    kind, settings = NAMED[name]
    arguments = TrainingArguments(
        lr_scheduler_type=kind, lr_scheduler_kwargs=settings, warmup_steps=warmup, learning_rate=PEAK, use_cpu=True
    )
    optimizer, schedule = _made_by_transformers(name, arguments.get_warmup_steps(total), total)
    rates = []
    for step in range(1, total):
        (rate,) = _train(optimizer, schedule, 1)[0]
        rates.append(rate["lr"])
        if step in steps:
            checkpoint = folder / f"checkpoint-{step}"
            save_safetensors(checkpoint / "model.safetensors", {"w": torch.full((2,), float(step))})
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": total}))
            torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
            torch.save(schedule.state_dict(), checkpoint / "scheduler.pt")
            torch.save(arguments, checkpoint / "training_args.bin")
    return rates


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps:UserWarning")
@pytest.mark.parametrize(("origin", "horizon"), [(12, 30), (100, 15), (80, 119)])
@pytest.mark.parametrize("name", NAMED)
def test_a_trainers_arguments_tell_the_rate_of_every_schedule_to_the_last_bit(
    name: str, origin: int, horizon: int, tmp_path: Path
) -> None:
    """From within the warm-up, too, and from a stable phase into the decay: nothing seen so far tells those."""
    rates = _trainers_run(tmp_path, name, range(4, origin + 1, 4))
    result = advance(discover(tmp_path).snapshots, horizon)
    (group,) = result.trees["optimizer.pt"].tree["param_groups"] if "optimizer.pt" in result.trees else [{"lr": PEAK}]
    assert group["lr"] == rates[origin + horizon - 1]
    assert result.trees["scheduler.pt"].tree["_last_lr"] == [rates[origin + horizon - 1]]
    assert result.notes == []


def test_a_warm_up_given_as_a_share_of_the_run_is_understood(tmp_path: Path) -> None:
    rates = _trainers_run(tmp_path, "linear", range(2, 13, 2), warmup=0.123)
    result = advance(discover(tmp_path).snapshots, 100)
    assert result.trees["scheduler.pt"].tree["_last_lr"] == [rates[111]]


def test_arguments_that_do_not_explain_the_rates_seen_are_not_believed(tmp_path: Path) -> None:
    """As of a Trainer that was handed a schedule of the user's own."""
    rates = _trainers_run(tmp_path, "linear", range(60, 101, 8))
    others = tmp_path / "others"
    _trainers_run(others, "inverse_sqrt", range(60, 101, 8))
    for checkpoint in others.iterdir():
        checkpoint.joinpath("training_args.bin").replace(tmp_path / checkpoint.name / "training_args.bin")
    result = advance(discover(tmp_path, pattern="checkpoint-*").snapshots, 20)
    assert result.trees["scheduler.pt"].tree["_last_lr"] == [rates[119]]
    (note,) = result.notes
    assert "check the first resumed step" in note


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "inverse_sqrt of a timescale"])
def test_a_run_that_was_resumed_with_another_length_has_the_rates_of_the_new_one(name: str, tmp_path: Path) -> None:
    _trainers_run(tmp_path, name, range(20, 61, 10), total=100)
    rates = _trainers_run(tmp_path, name, range(70, 101, 10), total=TOTAL)
    result = advance(discover(tmp_path).snapshots, 20)
    assert result.trees["scheduler.pt"].tree["_last_lr"] == [rates[119]]
    state = result.trees["trainer_state.json"].tree
    assert (state["global_step"], state["max_steps"]) == (120, TOTAL)
    assert result.notes == []


# --- where a schedule ends -------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[Build, int, str]] = {
    "a cosine to 0": (lambda o: lr_scheduler.CosineAnnealingLR(o, 20), 20, "CosineAnnealingLR.T_max"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20), 19, "OneCycleLR.total_steps"),
    "a line to 0": (lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 20), 20, "LinearLR.total_iters"),
    "a power": (lambda o: lr_scheduler.PolynomialLR(o, 20, 2.0), 20, "PolynomialLR.total_iters"),
    "a warm-up before a cosine": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 15)], [5]
        ),
        20,
        "CosineAnnealingLR.T_max",
    ),
    "a chain": (
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o, 1.0, 0.0, 20), lr_scheduler.ExponentialLR(o, 0.9)]),
        20,
        "LinearLR.total_iters",
    ),
}
ENDLESS: dict[str, Build] = {
    "a cosine to a floor": lambda o: lr_scheduler.CosineAnnealingLR(o, 20, 0.01),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20),
    "cycles": lambda o: lr_scheduler.CyclicLR(o, 0.0, 0.1, step_size_up=10, cycle_momentum=False),
    "a warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 20),
    "a formula of one's own": lambda o: lr_scheduler.LambdaLR(o, lambda count: max(0.0, 1 - count / 20)),
    "a cosine before a constant": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.CosineAnnealingLR(o, 20), lr_scheduler.ConstantLR(o, 1.0)], [25]
    ),
}


def _states(build: Build, count: int) -> list[dict[str, Any]]:
    """The states of a schedule at each count, from 1 on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, states = build(optimizer), []
    for _ in range(count):
        optimizer.step()
        schedule.step()
        states.append(copy.deepcopy(schedule.state_dict()))
    return states


@pytest.mark.parametrize("name", ENDS)
def test_a_schedule_ends_where_its_rate_does_and_not_before(name: str) -> None:
    build, end, said = ENDS[name]
    *before, last = map(ended_at, _states(build, end))
    assert set(before) == {None}
    assert last is not None
    assert last[0] == said


@pytest.mark.parametrize("name", ENDLESS)
def test_a_schedule_that_goes_on_has_no_end(name: str) -> None:
    assert set(map(ended_at, _states(ENDLESS[name], 24))) == {None}


def test_a_run_that_has_passed_the_floor_of_its_cosine_cycles_on_purpose() -> None:
    assert ended_at(_states(lambda o: lr_scheduler.CosineAnnealingLR(o, 20), 21)[-1]) is None
