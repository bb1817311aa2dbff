"""Forecasts are judged by the tensors that are trained; a buffer that decides the verdict is named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

import farcast_cli
from farcast_cli.forecast.fitting import FitRequest, fit_planned, plan_fit
from farcast_cli.progress import silent
from farcast_cli.run.selection import Selection
from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.state.trained import trained_in
from tests.tiny import fit_run, straight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from farcast_cli.forecast.fitting import FitOutcome

STEPS = list(range(100, 1001, 100))
SIZES = {"encoder.weight": 64, "encoder.bias": 8}
SHAPES = {"encoder.weight": (8, 8), "encoder.bias": (8,)}


def _adam(*shapes: tuple[int, ...], groups: int = 1) -> dict[str, Any]:
    """An Adam's state for parameters of these shapes."""
    state = {
        i: {"step": torch.tensor(9.0), "exp_avg": torch.zeros(s), "exp_avg_sq": torch.ones(s)} for i, s in enumerate(shapes)
    }
    cut = len(shapes) if groups == 1 else 1
    params = [list(range(len(shapes)))[:cut], list(range(len(shapes)))[cut:]][:groups]
    return {"state": state, "param_groups": [{"lr": 1e-3, "params": one} for one in params]}


def _save(path: Path, shapes: Mapping[str, tuple[int, ...]], optimizer: dict[str, Any] | None) -> Path:
    weights = {name: torch.arange(1.0, 1 + math.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    torch.save({"step": 100, "model": weights} | ({"optimizer": optimizer} if optimizer else {}), path)
    return path


def _trained(path: Path) -> dict[str, bool]:
    return dict(trained_in(open_snapshot(path)))


def _queue_run(folder: Path, optimizer: dict[str, Any] | None, queue: str = "queue") -> Path:
    """A straight path, and a queue of other features in each snapshot that makes nearly all of the movement."""
    folder.mkdir()
    weights, _ = straight(STEPS, SIZES)
    random = np.random.default_rng(3)
    for index, step in enumerate(STEPS):
        model = {name: torch.from_numpy(weights[name][index]).float().reshape(SHAPES[name]) for name in SIZES}
        model[queue] = torch.from_numpy(random.normal(size=(8, 32))).float()
        torch.save({"step": step, "model": model} | ({"optimizer": optimizer} if optimizer else {}), folder / f"step_{step}.pt")
    return folder


def _learned(run: Path, **chosen: Any) -> FitOutcome:
    return fit_planned(plan_fit(FitRequest(Selection(run, **chosen))), silent)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_a_shape_that_the_optimizer_has_no_state_for_is_not_trained(tmp_path: Path) -> None:
    path = _save(tmp_path / "step_100.pt", SHAPES | {"queue": (8, 32)}, _adam((8,), (8, 8), groups=2))
    assert _trained(path) == {"encoder.weight": True, "encoder.bias": True, "queue": False}


def test_parameters_in_the_model_s_order_tell_a_buffer_of_the_same_shape(tmp_path: Path) -> None:
    shapes = {"scale": (8,), "encoder.weight": (8, 8), "encoder.bias": (8,)}
    path = _save(tmp_path / "step_100.pt", shapes, _adam((8, 8), (8,)))
    assert _trained(path) == {"scale": False, "encoder.weight": True, "encoder.bias": True}


def test_groups_have_an_order_of_their_own_so_nothing_is_guessed_of_a_shape_that_is_there_twice(tmp_path: Path) -> None:
    shapes = {"scale": (8,), "encoder.weight": (8, 8), "encoder.bias": (8,)}
    path = _save(tmp_path / "step_100.pt", shapes, _adam((8, 8), (8,), groups=2))
    assert _trained(path) == {"encoder.weight": True}


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        _adam((8, 8), (8,), (5, 5)),  # of two networks
        {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},  # SGD has no state
        {"state": _adam((8, 8))["state"], "param_groups": [{"lr": 0.1, "params": [0, 1]}]},  # a parameter without gradients
        {"state": {0: {"row": torch.ones(8), "col": torch.ones(8, 1)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    ],
    ids=["no optimizer", "another shape", "no state", "a parameter without a state", "factored moments"],
)
def test_nothing_is_known_where_the_optimizer_does_not_tell(optimizer: dict[str, Any] | None, tmp_path: Path) -> None:
    assert _trained(_save(tmp_path / "step_100.pt", SHAPES | {"queue": (8, 32)}, optimizer)) == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_parameters_with_names_are_known_by_them(tmp_path: Path) -> None:
    model = {"queue": torch.ones(8, 8), "encoder.weight": torch.ones(8, 8)}
    state = {"encoder.weight": {"step": torch.tensor(9.0), "exp_avg": torch.zeros(8, 8)}}
    optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "params": ["encoder.weight"]}]}
    save_dcp({"model": model, "optimizer": optimizer, "step": 100}, checkpoint_id=tmp_path / "step-100", no_dist=True)
    assert _trained(tmp_path / "step-100") == {"queue": False, "encoder.weight": True}


# --- what it is for --------------------------------------------------------------------------------------------------


def test_a_queue_beside_the_weights_says_nothing_of_their_direction(tmp_path: Path) -> None:
    run = _queue_run(tmp_path / "run", _adam((8, 8), (8,)))
    done = _learned(run)
    assert [record.name for record in done.fitted.judged_tensors] == ["encoder.weight", "encoder.bias"]
    assert done.steady.coherence == pytest.approx(_learned(run, exclude=("queue",)).steady.coherence)
    assert done.carrier == ""


def test_a_tensor_that_decides_the_verdict_is_named_with_the_option_that_leaves_it_out(tmp_path: Path) -> None:
    run = _queue_run(tmp_path / "run", None, queue="queue[0]")
    done = _learned(run)
    assert done.steady.coherence < 0.15
    assert done.carrier.startswith("queue[0] makes 100% of the movement and decides the verdict: S = ")
    assert "1.00 without it" in done.carrier
    pattern = done.carrier.partition("--exclude ")[2].strip("'")
    assert _learned(run, exclude=(pattern,)).steady.coherence > 0.99


def test_predict_names_it_too(tmp_path: Path) -> None:
    run = _queue_run(tmp_path / "run", None)
    found = farcast_cli.predict(run, horizon=100, output=tmp_path / "out.pt")
    assert any("decides the verdict" in note for note in found.notes())


def test_leap_is_not_held_back_by_a_queue(tmp_path: Path) -> None:
    run = _queue_run(tmp_path / "run", _adam((8, 8), (8,)))
    assert farcast_cli.leap(run, output=f"{tmp_path / 'leaps'}/").outcome.path is not None


def test_no_tensor_is_named_where_all_of_them_agree(tmp_path: Path) -> None:
    run = _queue_run(tmp_path / "run", None)
    assert _learned(run, exclude=("queue",)).carrier == ""


def test_a_module_s_extra_state_is_copied(tmp_path: Path) -> None:
    for step in STEPS:
        model = {"weight": torch.full((4, 4), step / 100), "_extra_state": {"amax": torch.rand(4)}}
        torch.save({"step": step, "model": model}, tmp_path / f"step_{step}.pt")
    fitted = fit_run(tmp_path)
    assert [record.name for record in fitted.provenance.tensors] == ["weight"]
    assert [(one.name, one.reason) for one in fitted.copied] == [
        ("_extra_state.amax", "the extra state of a module, no weight")
    ]
