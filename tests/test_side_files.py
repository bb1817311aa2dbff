"""Whatever file of a snapshot's folder counts the run's steps is found and moved on, whatever the layout is."""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from farcast_cli.errors import UnsafeFileError
from tests.conftest import STEPS
from tests.corpus import Calls
from tests.tiny import forecast_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farcast_cli.request import Outcome


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
    return forecast_run(tmp_path / "run", f"{tmp_path / 'out'}/", 100)


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

    def own(folder: Path, step: int) -> None:
        torch.save(_optimizer(step) | {"lr_scheduler": {"last_batch_iteration": step}}, folder / "optim.pt")

    def packed(folder: Path, step: int) -> None:
        bare(folder, step)
        (folder / "scheduler.pkl").write_bytes(gzip.compress(pickle.dumps({"last_epoch": step})))

    def told(kind: Callable[[Path, int], None]) -> str:
        _, outcome = _forecast(tmp_path / kind.__name__, "torch", kind)
        (note,) = [note for note in outcome.notes if "learning rate stays" in note]
        return note

    assert "no schedule is saved" in told(bare)
    assert "the schedule in optim.pt: lr_scheduler is of a kind that farcast does not know" in told(own)
    assert "a schedule may be in scheduler.pkl, which is copied" in told(packed)


# --- pickles and subfolders ------------------------------------------------------------------------------------------


def _unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301 - our own


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_counters_in_a_plain_pickle_move_on(kind: str, protocol: int, tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        state = {"step": step, "seen": [1, "ü", b"\xff"], "tokens": 512 * step, "args": argparse.Namespace(lr=0.1)}
        (folder / "progress.pkl").write_bytes(pickle.dumps(state, protocol))

    forecast, _ = _forecast(tmp_path, kind, beside)
    told = _unpickled(forecast / "progress.pkl")
    assert told == {"step": 900, "seen": [1, "ü", b"\xff"], "tokens": 512 * 900, "args": argparse.Namespace(lr=0.1)}


def test_the_schedule_in_a_plain_pickle_moves_on_with_the_rate(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 850, gamma=0.5)
        (folder / "scheduler.pkl").write_bytes(pickle.dumps(schedule.state_dict() | {"last_epoch": step}))
        torch.save(optimizer.state_dict(), folder / "optim.pt")

    forecast, _ = _forecast(tmp_path, "torch", beside)
    assert _unpickled(forecast / "scheduler.pkl")["last_epoch"] == 900
    assert torch.load(forecast / "optim.pt")["param_groups"][0]["lr"] == 0.05


def test_counters_in_subfolders_and_under_other_endings_move_on(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        (folder / "state").mkdir()
        torch.save({"samples": 32 * step}, folder / "state" / "rank_0.pt")
        (folder / "state" / "progress.json").write_text(json.dumps({"tokens": 64 * step}))
        torch.save({"batches": 4 * step}, folder / "trainer.ckpt")
        (folder / "notes.bin").write_bytes(b"no torch file")

    forecast, outcome = _forecast(tmp_path, "safetensors", beside)
    assert torch.load(forecast / "state" / "rank_0.pt") == {"samples": 32 * 900}
    assert json.loads((forecast / "state" / "progress.json").read_text()) == {"tokens": 64 * 900}
    assert torch.load(forecast / "trainer.ckpt") == {"batches": 4 * 900}
    assert (forecast / "notes.bin").read_bytes() == b"no torch file"
    assert not any("notes.bin" in note for note in outcome.notes)


def test_further_files_of_a_trainers_folder_move_on(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 5000, "log_history": []}))
        (folder / "curriculum.json").write_text(json.dumps({"samples": 32 * step}))
        (folder / "callback.pkl").write_bytes(pickle.dumps({"tokens": 64 * step}))

    forecast, _ = _forecast(tmp_path, "safetensors", beside)
    assert json.loads((forecast / "curriculum.json").read_text()) == {"samples": 32 * 900}
    assert _unpickled(forecast / "callback.pkl") == {"tokens": 64 * 900}


def test_a_pickle_that_would_run_something_stops_the_forecast(tmp_path: Path) -> None:
    def beside(folder: Path, _: int) -> None:
        (folder / "progress.pkl").write_bytes(pickle.dumps(Calls(subprocess.getoutput, "true")))

    with pytest.raises(UnsafeFileError, match=r"progress\.pkl"):
        _forecast(tmp_path, "torch", beside)


def test_two_pickles_in_one_file_are_copied_and_it_is_told(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        (folder / "progress.pkl").write_bytes(pickle.dumps({"tokens": step}) + pickle.dumps({"more": step}))

    forecast, outcome = _forecast(tmp_path, "torch", beside)
    assert (forecast / "progress.pkl").read_bytes() == (tmp_path / "run" / "step-800" / "progress.pkl").read_bytes()
    assert any("progress.pkl is copied with the origin's counters: " in note for note in outcome.notes)


def test_numbers_that_rise_in_an_object_of_the_loops_own_are_told(tmp_path: Path) -> None:
    def beside(folder: Path, step: int) -> None:
        torch.save({"state": argparse.Namespace(consumed=64 * step), "args": argparse.Namespace(lr=3)}, folder / "loop.pt")

    _, outcome = _forecast(tmp_path, "torch", beside)
    (note,) = [note for note in outcome.notes if "loop.pt" in note]
    assert note == (
        "loop.pt: state is copied as the origin has it: an object of the loop's own class argparse.Namespace, whose numbers"
        " change along the run"
    )
