"""torch's schedules stepped without torch: every value that torch's own step changes has torch's bits."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler, swa_utils

from farcast_cli.errors import UsageError
from farcast_cli.trainers.schedules import advance_scheduler
from farcast_cli.trainers.torch_schedules import step_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    Build = Callable[[Any], Any]

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # no optimizer steps here

MOST_STEPS = 60  # before and after the moment of the state, together less than a OneCycleLR holds


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


def made(kind: Any, *drawn: st.SearchStrategy[Any], **named: st.SearchStrategy[Any]) -> st.SearchStrategy[Build]:
    """A schedule of one class with drawn arguments."""

    def build(positional: tuple[Any, ...], keywords: dict[str, Any], optimizer: Any) -> Any:
        return kind(optimizer, *positional, **keywords)

    return st.tuples(st.tuples(*drawn), st.fixed_dictionaries(named)).map(lambda both: partial(build, *both))


COUNTS = st.integers(1, 30)
LOWEST = st.sampled_from([0, 0.0]) | reals(1e-6, 0.01)
STRATEGIES = st.sampled_from(["cos", "linear"])

CLASSES: dict[str, st.SearchStrategy[Build]] = {
    "StepLR": made(lr_scheduler.StepLR, COUNTS, reals(0.1, 1.1)),
    "MultiStepLR": made(lr_scheduler.MultiStepLR, st.lists(st.just(0) | COUNTS, max_size=5), reals(0.1, 1.1)),
    "ConstantLR": made(lr_scheduler.ConstantLR, reals(0.01, 1), st.integers(0, 30)),
    "LinearLR": made(lr_scheduler.LinearLR, reals(0.01, 1), st.just(1) | reals(0, 1), COUNTS),
    "ExponentialLR": made(lr_scheduler.ExponentialLR, reals(0.5, 1.05)),
    "PolynomialLR": made(lr_scheduler.PolynomialLR, COUNTS, st.sampled_from([1, 2]) | reals(0.3, 3)),
    "CosineAnnealingLR": made(lr_scheduler.CosineAnnealingLR, COUNTS, LOWEST),
    "CosineAnnealingWarmRestarts": made(lr_scheduler.CosineAnnealingWarmRestarts, COUNTS, st.integers(1, 3), LOWEST),
    "OneCycleLR": made(
        lr_scheduler.OneCycleLR,
        max_lr=reals(0.01, 1),
        total_steps=st.just(100) | st.integers(MOST_STEPS, 200),
        pct_start=st.sampled_from([0.1, 0.25]) | reals(0.1, 0.45),  # a phase may end on a step
        anneal_strategy=STRATEGIES,
        cycle_momentum=st.booleans(),
        three_phase=st.booleans(),
    ),
    "CyclicLR": made(
        lr_scheduler.CyclicLR,
        reals(1e-4, 0.01),
        reals(0.01, 1),
        COUNTS,
        st.none() | COUNTS,
        mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
        gamma=reals(0.9, 1),
        cycle_momentum=st.booleans(),
    ),
    "SWALR": made(swa_utils.SWALR, reals(0.001, 0.1), st.just(0) | COUNTS, STRATEGIES),
}


def in_sequence(members: st.SearchStrategy[Build], at_milestones: st.SearchStrategy[Build]) -> st.SearchStrategy[Build]:
    """A SequentialLR: torch begins no nest of schedules at a milestone, so that only the first may be one."""

    def build(milestones: list[int], first: Build, others: list[Build], optimizer: Any) -> Any:
        builds = [first, *others[: len(milestones)]]
        return lr_scheduler.SequentialLR(optimizer, [one(optimizer) for one in builds], sorted(milestones))

    milestones = st.lists(st.integers(1, 40), min_size=1, max_size=3)
    drawn = st.tuples(milestones, members, st.lists(at_milestones, min_size=3, max_size=3))
    return drawn.map(lambda parts: partial(build, *parts))


def in_a_chain(members: st.SearchStrategy[Build]) -> st.SearchStrategy[Build]:
    def build(builds: list[Build], optimizer: Any) -> Any:
        return lr_scheduler.ChainedScheduler([one(optimizer) for one in builds])

    return st.lists(members, min_size=1, max_size=3).map(lambda builds: partial(build, builds))


ANY = st.one_of(*CLASSES.values())
NESTS: dict[str, st.SearchStrategy[Build]] = {
    "SequentialLR": in_sequence(ANY, ANY),
    **{f"SequentialLR, then {name}": in_sequence(ANY, one) for name, one in CLASSES.items()},
    "ChainedScheduler": in_a_chain(ANY),
    "both": in_sequence(in_a_chain(ANY), ANY) | in_a_chain(in_sequence(ANY, ANY) | ANY),
}

RATES = st.lists(st.just(1) | reals(1e-6, 1), min_size=1, max_size=3)


def optimizer_of(rates: list[float], *, is_adam: bool) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups) if is_adam else torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def stepped(schedule: Any, count: int) -> None:
    for _ in range(count):
        schedule.step()


def saved(optimizer: Optimizer, schedule: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return copy.deepcopy(schedule.state_dict()), copy.deepcopy(optimizer.state_dict()["param_groups"])


def exactly(value: Any) -> Any:
    """A value that compares by bits and by type: 0.0 is neither -0.0 nor 0, a tuple is no list."""
    if isinstance(value, dict):
        return {key: exactly(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [exactly(each) for each in value]
    return type(value), value.hex() if isinstance(value, float) else value


@settings(max_examples=60)
@given(data=st.data(), rates=RATES, is_adam=st.booleans(), before=st.integers(0, 30), count=st.integers(1, 29))
@pytest.mark.parametrize("name", [*CLASSES, *NESTS])
def test_state_and_groups_are_what_torch_makes_of_them(
    name: str, data: st.DataObject, rates: list[float], *, is_adam: bool, before: int, count: int
) -> None:
    optimizer = optimizer_of(rates, is_adam=is_adam)
    schedule = data.draw((CLASSES | NESTS)[name])(optimizer)
    stepped(schedule, before)
    state, groups = saved(optimizer, schedule)
    for _ in range(count):
        schedule.step()
        rates_now = step_once(state, groups)
        assert exactly(rates_now) == exactly(schedule.get_last_lr())
    assert exactly((state, groups)) == exactly(saved(optimizer, schedule))


@settings(max_examples=20)
@given(data=st.data(), count=st.integers(1, 29))
@pytest.mark.parametrize("set_back", [{"last_epoch": -1}, {"_step_count": 0}])
@pytest.mark.parametrize("name", CLASSES)
def test_a_schedule_that_was_set_back_is_stepped_as_torch_steps_it(
    name: str, set_back: dict[str, int], data: st.DataObject, count: int
) -> None:
    """As a SequentialLR sets its members back."""
    optimizer = optimizer_of([0.1, 0.03], is_adam=False)
    schedule = data.draw(CLASSES[name])(optimizer)
    stepped(schedule, 5)
    schedule.load_state_dict({**schedule.state_dict(), **set_back})
    state, groups = saved(optimizer, schedule)
    stepped(schedule, count)
    for _ in range(count):
        step_once(state, groups)
    assert exactly((state, groups)) == exactly(saved(optimizer, schedule))


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("max_lr", [0.3, 0.07, 0.06, 0.013, 0.9, 0.7])
def test_the_last_step_of_a_phase_is_of_that_phase(max_lr: float, *, three_phase: bool) -> None:
    """The next phase begins at the same rate but for rounding."""
    optimizer = optimizer_of([0.1], is_adam=False)
    schedule = lr_scheduler.OneCycleLR(
        optimizer, max_lr, 100, pct_start=0.25, anneal_strategy="linear", three_phase=three_phase
    )
    state, groups = saved(optimizer, schedule)
    for _ in range(100):
        schedule.step()
        assert exactly(step_once(state, groups)) == exactly(schedule.get_last_lr())


NEWER_KEYS = ("_is_initial", "_get_lr_called_within_step", "_last_lr", "verbose")


@settings(max_examples=20)
@given(data=st.data(), count=st.integers(1, 29))
@pytest.mark.parametrize("name", CLASSES)
def test_a_state_of_an_older_torch_has_the_same_rates_and_gets_no_new_key(name: str, data: st.DataObject, count: int) -> None:
    optimizer = optimizer_of([0.1, 0.03], is_adam=False)
    schedule = data.draw(CLASSES[name])(optimizer)
    state, groups = saved(optimizer, schedule)
    older = {key: value for key, value in state.items() if key not in NEWER_KEYS}
    keys = set(older)
    stepped(schedule, count)
    for _ in range(count):
        step_once(older, groups)
    expected_state, expected_groups = saved(optimizer, schedule)
    assert set(older) == keys
    assert exactly(older) == exactly({key: expected_state[key] for key in older})
    assert exactly(groups) == exactly(expected_groups)


def test_a_schedule_of_a_function_that_begins_at_a_milestone_is_counted_and_noted() -> None:
    """Its rate stays what it was; the first resumed step sets it."""
    optimizer = optimizer_of([0.1, 0.03], is_adam=False)
    members = [lr_scheduler.LinearLR(optimizer, 0.1, 1, 10), lr_scheduler.LambdaLR(optimizer, lambda n: 1 / math.sqrt(1 + n))]
    schedule = lr_scheduler.SequentialLR(optimizer, members, [10])
    stepped(schedule, 5)
    state, groups = saved(optimizer, schedule)
    note = advance_scheduler(state, groups, 20)
    stepped(schedule, 15)
    expected, _ = saved(optimizer, schedule)
    assert [one["last_epoch"] for one in state["_schedulers"]] == [one["last_epoch"] for one in expected["_schedulers"]]
    assert "first resumed step" in note


def test_a_chain_at_a_milestone_which_torch_cannot_begin_is_refused() -> None:
    optimizer = optimizer_of([0.1], is_adam=False)
    chain = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9)])
    schedule = lr_scheduler.SequentialLR(optimizer, [lr_scheduler.ConstantLR(optimizer), chain], [10])
    stepped(schedule, 5)
    state, groups = saved(optimizer, schedule)
    before = copy.deepcopy((state, groups))
    with pytest.raises(NotImplementedError):
        stepped(schedule, 10)
    with pytest.raises(UsageError, match="torch can begin no ChainedScheduler at a milestone"):
        advance_scheduler(state, groups, 15)
    assert (state, groups) == before


@pytest.mark.parametrize("is_chain", [False, True])
def test_the_hint_at_the_end_of_a_schedule_is_the_longest_horizon_that_works(*, is_chain: bool) -> None:
    optimizer = optimizer_of([0.1], is_adam=False)
    schedule: Any = lr_scheduler.OneCycleLR(optimizer, 0.2, 70)
    schedule = lr_scheduler.ChainedScheduler([schedule]) if is_chain else schedule
    stepped(schedule, 60)
    state, groups = saved(optimizer, schedule)
    with pytest.raises(UsageError, match="has no step 71") as refused:
        advance_scheduler(state, groups, 80)
    assert str(refused.value.hint).startswith("a horizon that ends 10 steps earlier")
    assert advance_scheduler(state, groups, 70) == ""
