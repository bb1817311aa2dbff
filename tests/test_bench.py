"""The measurements' own figures: rates, the share of a leap, and where one run passes another."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of bench/, which is a folder of scripts, and forgets them all afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_torchs_schedule_in_a_snapshot_has_the_rates_that_the_run_is_trained_at(bench: Any, schedule: str, warmup: int) -> None:
    spec = bench("tasks").Spec("x", "mlp", "sgd", 0.5, 50, 8, warmup=warmup, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = bench("training").torch_schedule(spec, optimizer)
    rates = []
    for _ in range(spec.steps):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    assert rates == pytest.approx([spec.rate(step) for step in range(spec.steps)], abs=1e-9)
    assert max(rates) == pytest.approx(0.5)
    assert made.get_last_lr()[0] == pytest.approx(0.5 if schedule == "constant" else 0, abs=1e-9)


def test_what_a_result_depends_on_is_there(bench: Any) -> None:
    """A result is named by a hash of these modules; one that has moved would end every measurement."""
    store, trials = bench("store"), bench("trials")
    for ours, theirs in store.CODE.values():
        assert store.code_digest(ours, theirs)
    for theirs in trials.CODE.values():
        assert store.code_digest((), theirs)
    named = {name for _, theirs in store.CODE.values() for name in theirs} | {
        n for names in trials.CODE.values() for n in names
    }
    assert not [name for name in named if not list(store.FARCAST.glob(name.replace(".", "/") + ".py"))]


def test_r_is_one_where_the_leap_ends_as_low_as_the_whole_run_and_zero_where_it_ends_as_the_control_does(bench: Any) -> None:
    replaced = bench("figures").replaced
    assert replaced(1.0, 1.2, 1.0) == pytest.approx(1)
    assert replaced(1.2, 1.2, 1.0) == pytest.approx(0)
    assert replaced(1.3, 1.2, 1.0) == pytest.approx(-0.5)


def test_r_is_not_given_where_the_skipped_steps_made_no_difference(bench: Any) -> None:
    assert math.isnan(bench("figures").replaced(0.9, 1.005, 1.0))


def test_a_run_passes_the_plain_runs_end_at_its_first_point_that_is_as_low(bench: Any) -> None:
    passes = bench("report_pretrained").passes
    plain = {"curve": [(0, 3.0, 0.1), (200, 2.0, 0.5), (400, 1.0, 0.7)]}
    better = {"curve": [(0, 3.0, 0.1), (200, 1.0, 0.7), (400, 0.9, 0.7)]}
    never = {"curve": [(0, 3.0, 0.1), (200, 1.2, 0.7), (400, 1.1, 0.7)]}
    assert passes({"plain": plain, "leaps": better}, "leaps") == 0.5
    assert passes({"plain": plain, "leaps": never}, "leaps") == 1.05
    assert math.isnan(passes({"plain": plain}, "leaps"))


def test_only_modes_that_leap_carry_a_number_of_stretches(bench: Any) -> None:
    memory = bench("memory")
    leaping = [f"{mode}-{count}" for count in (50, 20) for mode in ("leaps", "judged", "random")]
    assert memory.methods(50, 20) == ("none", "rate-2", "rate-4", *leaping)
    spec = bench("tasks").Spec("x", "mlp", "sgd", 0.5, 100, 8)
    cell = bench("store").Cell("memory", spec, method="random-20")
    assert memory.control_of(cell).method == "leaps-20"
    assert memory.control_of(bench("store").Cell("memory", spec, method="rate-2")) is None
