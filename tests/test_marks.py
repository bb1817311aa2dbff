"""The mark of a leap in a Hugging Face Trainer's log: real Trainers carry it on, and every reader finds it from anywhere."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli.run.trajectory import discover
from tests.rounds import SAVE_EVERY, train_by_trainer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli, Done

NOWHERE = {"FARCAST_STATE_DIR": ""}


def _json(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def _log(checkpoint: Path) -> list[dict[str, Any]]:
    content = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert isinstance(content, list)
    return content


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Trainer's run of 8 checkpoints, to step 160."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train_by_trainer(run, None, 8)
    return run


@pytest.fixture
def work(trained: Path, tmp_path: Path, call_cli: CallCli) -> Path:
    """A working directory with that run, fitted."""
    shutil.copytree(trained, tmp_path / "work" / "run")
    assert call_cli("fit", "run", cwd=tmp_path / "work", env=NOWHERE).returncode == 0
    return tmp_path / "work"


def _leapt(work: Path, call_cli: CallCli, *arguments: object) -> Path:
    done = call_cli("predict", *arguments, "--even-if-worse", cwd=work, env=NOWHERE)
    assert done.returncode == 0, done
    return work / done.stdout.strip()


@pytest.mark.parametrize(("counters", "horizon", "at"), [("advance", 5, 165), ("advance", 60, 220), ("keep", 5, 160)])
def test_a_run_that_a_trainer_resumed_tells_of_its_leap_without_any_ledger(
    counters: str,
    horizon: int,
    at: int,
    *,
    work: Path,
    tmp_path: Path,
    call_cli: CallCli,
) -> None:
    """Of a leap that is shorter than the distance between snapshots too."""
    forecast = _leapt(work, call_cli, "--horizon", horizon, "--counters", counters)
    mark = {"step": at, "farcast_leap_from": 160, "farcast_leap_to": 160 + horizon}
    assert _log(forecast) == [*_log(work / "run" / "checkpoint-160"), mark]
    assert train_by_trainer(work / "run", str(forecast), 6) == at
    steps = discover(work / "run").steps
    assert [step for step in steps if step > at][:6] == [step for step in range(0, 500, SAVE_EVERY) if step > at][:6]
    assert mark in _log(work / "run" / f"checkpoint-{steps[-1]}")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(work / "run", elsewhere / "copied")
    done = call_cli("fit", "copied", "--json", cwd=elsewhere, env=NOWHERE)
    assert (_json(done)["leap"], _json(done)["num_snapshots"]) == (at, 6)
    assert f"the run resumed from a forecast, a leap to step {at}: fit uses the 6 snapshots after it" in done.stderr
    assert "caution" not in done.stderr
    told = _json(call_cli("inspect", "copied", "--json", cwd=elsewhere, env=NOWHERE))
    expected = {"origin_step": 160, "valid_step": 160 + horizon, "counters": counters, "forecast": None}
    assert (told["leap"], told["leaps"]) == (at, [expected])
    (elsewhere / "one").mkdir()
    truth = shutil.copytree(work / "run" / f"checkpoint-{steps[-6]}", elsewhere / "one" / f"checkpoint-{steps[-6]}")
    assert _json(call_cli("verify", forecast, "--against", truth, "--json", cwd=elsewhere))["descends"]
    made = _json(call_cli("predict", "--even-if-worse", "--json", cwd=elsewhere, env=NOWHERE))
    assert f"since the leap to step {at}" in made["chosen"][0]
    assert _json(call_cli("leap", "copied", "--dry-run", "--json", cwd=elsewhere, env=NOWHERE))["stretches"] == 5


def test_a_mark_and_a_ledger_tell_of_one_leap(work: Path, call_cli: CallCli) -> None:
    forecast = _leapt(work, call_cli, "--horizon", 60)
    train_by_trainer(work / "run", str(forecast), 6)
    (leap,) = _json(call_cli("inspect", "run", "--json", cwd=work))["leaps"]
    assert leap["forecast"] == str(forecast.resolve())


def test_a_run_that_went_on_without_the_forecast_has_no_mark(work: Path, call_cli: CallCli) -> None:
    _leapt(work, call_cli, "--horizon", 60)
    train_by_trainer(work / "run", None, 4)
    assert _json(call_cli("fit", "run", "--json", cwd=work))["leap"] is None


def test_a_loop_of_leaps_marks_each_of_them(work: Path, call_cli: CallCli) -> None:
    leaps = []
    for _ in range(2):
        done = call_cli("leap", "run", "--gain", "0.3", cwd=work, env=NOWHERE)
        assert done.returncode == 0, done
        leaps.append(discover(work / "run").origin.step)
        train_by_trainer(work / "run", str(work / done.stdout.strip()), 1)
    newest = discover(work / "run").origin
    assert [entry["farcast_leap_from"] for entry in _log(newest.path) if "farcast_leap_from" in entry] == leaps
    refused = call_cli("fit", "run", cwd=work, env=NOWHERE)
    assert refused.returncode == 3
    assert f"1 snapshots since the leap to step {leaps[-1]}" in refused.errors[0]


def test_what_is_not_to_be_resumed_from_bears_no_mark(work: Path, call_cli: CallCli) -> None:
    forecast = _leapt(work, call_cli, "--for", "evaluation")
    assert _log(forecast) == _log(work / "run" / "checkpoint-160")


def test_marks_that_are_no_steps_are_none(work: Path, call_cli: CallCli) -> None:
    state = work / "run" / "checkpoint-160" / "trainer_state.json"
    content = json.loads(state.read_text())
    wrong = [("a", 1, 2), (1.5, 1, 2), (True, 1, 2), (1, -1, 2), (1, 1, None), (10**20, 1, 2), (3, 1, 2), (20, 20, 20)]
    content["log_history"] = [dict(zip(("step", "farcast_leap_from", "farcast_leap_to"), one, strict=True)) for one in wrong]
    state.write_text(json.dumps(content))
    assert _json(call_cli("fit", "run", "--json", cwd=work, env=NOWHERE))["leap"] is None


# --- what else a Trainer does with its log ---------------------------------------------------------------------------


class _Line(torch.nn.Module):
    """One layer and the loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.layer(inputs)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


def _judged(run: Path, max_steps: int, resume: str | None = None) -> Any:
    """A Trainer that logs, evaluates and loads the best model at its end; trained to a step."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    torch.manual_seed(0)
    inputs = torch.randn(128, 8)
    rows: Any = [{"inputs": one, "labels": one[:1] * 2} for one in inputs]
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=10,
        eval_steps=10,
        logging_steps=5,
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=_Line(), args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_that_logs_and_loads_its_best_model_tolerates_the_mark(tmp_path: Path, call_cli: CallCli) -> None:
    from transformers.modelcard import parse_log_history

    run = tmp_path / "run"
    _judged(run, 80)
    assert call_cli("fit", "run", cwd=tmp_path, env=NOWHERE).returncode == 0
    forecast = _leapt(tmp_path, call_cli, "--horizon", 20, "--counters", "keep")
    trainer = _judged(run, 120, str(forecast))
    log = trainer.state.log_history
    (place,) = [index for index, entry in enumerate(log) if "farcast_leap_from" in entry]
    assert log[:place] == _log(run / "checkpoint-80")
    later = log[place + 1 :]
    assert [entry["step"] for entry in later if "loss" in entry] == list(range(85, 125, 5))
    assert [entry["step"] for entry in later if "eval_loss" in entry] == [90, 100, 110, 120]
    best = min((entry for entry in log if "eval_loss" in entry), key=lambda entry: entry["eval_loss"])
    assert trainer.state.best_model_checkpoint == str(run / f"checkpoint-{best['step']}")
    # a model card reads the whole log
    known, unmarked = map(parse_log_history, (log, [*log[:place], *later]))
    assert known == unmarked
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"])
