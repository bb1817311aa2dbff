"""Whatever file of a snapshot's folder counts the run's steps is found and moved on, whatever the layout is."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from tests.tiny import fit_run, predict_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farcast_cli.request import Outcome

STEPS = tuple(range(100, 801, 100))


def _safetensors(folder: Path, model: dict[str, torch.Tensor]) -> None:
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})


def _torch(folder: Path, model: dict[str, torch.Tensor]) -> None:
    torch.save(model, folder / "model.pt")


def _dcp(folder: Path, model: dict[str, torch.Tensor]) -> None:
    save_dcp({"model": model}, checkpoint_id=folder, no_dist=True)


WEIGHTS = {"safetensors": _safetensors, "torch": _torch, "dcp": _dcp}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def _forecast(tmp_path: Path, kind: str, beside: Callable[[Path, int], None]) -> tuple[Path, Outcome]:
    """The forecast of step 900 of a run whose every snapshot has more files."""
    for step in STEPS:
        folder = tmp_path / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        WEIGHTS[kind](folder, {"weight": torch.linspace(0, step / 100, 16).reshape(4, 4)})
        beside(folder, step)
    (outcome,) = predict_run(fit_run(tmp_path / "run"), f"{tmp_path / 'out'}/", horizons=[100])
    assert outcome.path is not None
    return outcome.path, outcome


@pytest.mark.parametrize("kind", WEIGHTS)
def test_counters_in_json_and_torch_files_move_on(kind: str, tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        (folder / "progress.json").write_text(json.dumps({"step": step, "tokens": 512 * step, "seed": 7, "note": "ü"}))
        torch.save({"samples": 32 * step}, folder / "meta.pt")

    forecast, _ = _forecast(tmp_path, kind, beside)
    assert json.loads((forecast / "progress.json").read_text()) == {"step": 900, "tokens": 512 * 900, "seed": 7, "note": "ü"}
    assert torch.load(forecast / "meta.pt", weights_only=True) == {"samples": 32 * 900}


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "tokenizer.json"])
def test_what_describes_the_model_is_copied_byte_by_byte(name: str, tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        (folder / name).write_text(json.dumps({"step": step, "size": 3}, indent=1))

    forecast, _ = _forecast(tmp_path, "torch", beside)
    assert (forecast / name).read_bytes() == (tmp_path / "run" / "step-800" / name).read_bytes()


def test_a_log_in_a_json_file_keeps_what_it_says_of_the_past(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        log = [{"step": done, "loss": 1 / done} for done in STEPS if done <= step]
        (folder / "progress.json").write_text(json.dumps({"step": step, "log": log}))

    forecast, _ = _forecast(tmp_path, "safetensors", beside)
    told = json.loads((forecast / "progress.json").read_text())
    assert told["step"] == 900
    assert [entry["step"] for entry in told["log"]] == list(STEPS)


def test_a_json_file_that_is_damaged_or_a_list_is_copied_and_the_damage_is_told(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        (folder / "half.json").write_text('{"step": ' + str(step))
        (folder / "list.json").write_text(f"[{step}]")

    forecast, outcome = _forecast(tmp_path, "torch", beside)
    assert (forecast / "half.json").read_text() == '{"step": 800'
    assert (forecast / "list.json").read_text() == "[800]"
    (note,) = [note for note in outcome.notes if "half.json" in note]
    assert note.startswith("half.json is copied with the origin's counters: ")


def _optimizer(step: int) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"lr": 0.1 / step, "params": [0]}]}


def test_no_schedule_is_saved_is_said_only_where_no_file_may_hold_one(tmp_path: Path) -> None:
    def bare(folder: Path, step: int) -> None:
        torch.save(_optimizer(step), folder / "optim.pt")

    def pickled(folder: Path, step: int) -> None:
        bare(folder, step)
        (folder / "scheduler.pkl").write_bytes(pickle.dumps({"last_epoch": step, "_last_lr": [0.1 / step]}))

    _, without = _forecast(tmp_path / "bare", "torch", bare)
    _, unread = _forecast(tmp_path / "pickled", "torch", pickled)
    assert any("no schedule is saved" in note for note in without.notes)
    assert not any("no schedule is saved" in note for note in unread.notes)
    assert any("a schedule may be in scheduler.pkl, which is copied" in note for note in unread.notes)
