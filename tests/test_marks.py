"""The mark of a leap in a Hugging Face Trainer's log: real Trainers carry it on, and every reader finds it from anywhere."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli.forecast.state_ledger import known_leaps
from farcast_cli.run.trajectory import discover
from tests.rounds import SAVE_EVERY, step_of, train_by_trainer
from tests.test_lightning import Net
from tests.test_lightning import Run as LightningRun
from tests.test_lightning import pytestmark as of_lightning

if TYPE_CHECKING:
    from collections.abc import Callable
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


def test_twenty_thousand_marks_are_twenty_thousand_leaps(work: Path) -> None:
    """How long it takes: bench/limits.py."""
    state = work / "run" / "checkpoint-160" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"] = [{"step": one, "farcast_leap_from": one, "farcast_leap_to": one + 1} for one in range(20_000)]
    state.write_text(json.dumps(content))
    found = known_leaps(None, discover(work / "run")).leaps
    assert [leap.origin_step for leap in found] == list(range(20_000))
    assert all(leap.is_certain for leap in found)


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


# --- in an optimiser's first group: Lightning, and a loop of one's own ------------------------------------------------


def _train_by_lightning(run: Path, resume: Path | None, last: int) -> None:
    LightningRun({"every_n_train_steps": 20}, num_batches=40, same_batches=True).go(run, resume=resume, max_steps=last)


def _train_by_hand(run: Path, resume: Path | None, last: int) -> None:
    """As nanoGPT does: the loop loads the optimiser, and saves a dict of its own."""
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if resume:
        checkpoint = torch.load(resume, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["iter_num"]
    for step in range(first + 1, last + 1):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": step}
            torch.save(content, run / f"ckpt_{step}.pt")


LOOPS: dict[str, Callable[[Path, Path | None, int], None]] = {"lightning": _train_by_lightning, "by hand": _train_by_hand}
EACH_LOOP = pytest.mark.parametrize("loop", [pytest.param("lightning", marks=of_lightning[1:]), "by hand"])


@pytest.mark.parametrize("counters", ["advance", "keep"])
@pytest.mark.parametrize("horizon", [5, 60])
@EACH_LOOP
def test_a_run_that_loaded_its_optimiser_tells_of_its_leaps_without_any_ledger(
    loop: str, horizon: int, counters: str, tmp_path: Path, call_cli: CallCli
) -> None:
    """Of both, after the second; and of those that are shorter than the distance between snapshots."""
    run, train = tmp_path / "run", LOOPS[loop]
    train(run, None, 160)
    at, expected = 160, []
    for _ in range(2):
        assert call_cli("fit", "run", cwd=tmp_path, env=NOWHERE).returncode == 0
        origin = discover(run).steps[-1]
        forecast = _leapt(tmp_path, call_cli, "--horizon", horizon, "--counters", counters)
        at = origin + horizon if counters == "advance" else origin
        train(run, forecast, origin + 220)
        shutil.rmtree(tmp_path / "forecasts")
        expected.append({"origin_step": origin, "valid_step": origin + horizon, "counters": counters, "forecast": None})
    shutil.copytree(run, tmp_path / "else" / "copied")
    told = _json(call_cli("inspect", "copied", "--json", cwd=tmp_path / "else", env=NOWHERE))
    assert (told["leap"], told["leaps"]) == (at, expected)
    assert _json(call_cli("fit", "copied", "--json", cwd=tmp_path / "else", env=NOWHERE))["leap"] == at


@EACH_LOOP
def test_a_loop_that_went_on_without_the_forecast_has_no_mark(loop: str, tmp_path: Path, call_cli: CallCli) -> None:
    run, train = tmp_path / "run", LOOPS[loop]
    train(run, None, 160)
    assert call_cli("fit", "run", cwd=tmp_path, env=NOWHERE).returncode == 0
    _leapt(tmp_path, call_cli, "--horizon", 60)
    train(run, discover(run).origin.path, 240)
    assert _json(call_cli("fit", "run", "--json", cwd=tmp_path, env=NOWHERE))["leap"] is None


@pytest.mark.parametrize("options", [("--for", "evaluation"), ("--optimizer", "drop")])
def test_without_an_optimiser_to_resume_from_there_is_no_mark(
    options: tuple[str, ...], tmp_path: Path, call_cli: CallCli
) -> None:
    _train_by_hand(tmp_path / "run", None, 160)
    assert call_cli("fit", "run", cwd=tmp_path, env=NOWHERE).returncode == 0
    forecast = _leapt(tmp_path, call_cli, "--horizon", 60, *options)
    assert "farcast" not in str(torch.load(forecast, weights_only=True).get("optimizer", {}).get("param_groups"))


@pytest.mark.parametrize("wrong", ["x", [5], [[160, 160]], [[160, 160, 150]], [[True, 0, 1]], [[7, 160, 180]], [["a", 1, 2]]])
def test_what_is_no_mark_in_a_group_is_not_believed(wrong: object, tmp_path: Path, call_cli: CallCli) -> None:
    run = tmp_path / "run"
    _train_by_hand(run, None, 160)
    content = torch.load(run / "ckpt_160.pt", weights_only=True)
    content["optimizer"]["param_groups"][0]["farcast_leaps"] = wrong
    torch.save(content, run / "ckpt_160.pt")
    assert "leaps" not in _json(call_cli("inspect", "run", "--json", cwd=tmp_path, env=NOWHERE))


# --- without the mark: only the ledgers tell --------------------------------------------------------------------------


def _train_by_transformers(run: Path, resume: Path | None, last: int) -> None:
    saves = (last - (step_of(resume) if resume else 0)) // SAVE_EVERY
    train_by_trainer(run, None if resume is None else str(resume), saves)


class _SlowNet(Net):
    """At a rate at which the run goes on in its direction, so that the weights show a leap."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _train_slowly_by_lightning(run: Path, resume: Path | None, last: int) -> None:
    training = LightningRun({"every_n_train_steps": 20}, num_batches=40, same_batches=True, model=_SlowNet)
    training.go(run, resume=resume, max_steps=last)


def _remove_mark(forecast: Path) -> None:
    """So that the trainer never sees it, and no checkpoint of the run bears it."""
    if forecast.is_dir():
        state = forecast / "trainer_state.json"
        content = json.loads(state.read_text())
        (mark,) = (entry for entry in content["log_history"] if "farcast_leap_from" in entry)
        content["log_history"].remove(mark)
        state.write_text(json.dumps(content))
        return
    content = torch.load(forecast, weights_only=True)
    optimizer = content["optimizer_states"][0] if "optimizer_states" in content else content["optimizer"]
    assert optimizer["param_groups"][0].pop("farcast_leaps")
    torch.save(content, forecast)


@pytest.mark.parametrize("counters", ["advance", "keep"])
@pytest.mark.parametrize(
    "train",
    [
        pytest.param(_train_by_transformers, id="transformers"),
        pytest.param(_train_slowly_by_lightning, marks=of_lightning[1:], id="lightning"),
        pytest.param(_train_by_hand, id="by hand"),
    ],
)
def test_without_a_mark_the_ledgers_tell_of_a_leap_from_another_folder_and_after_cleaning(
    train: Callable[[Path, Path | None, int], None], counters: str, tmp_path: Path, call_cli: CallCli
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "else"
    run = work / "run"
    elsewhere.mkdir()
    train(run, None, 160)
    assert call_cli("fit", "run", cwd=work).returncode == 0
    done = call_cli("predict", "--horizon", 60, "--counters", counters, "--even-if-worse", cwd=work)
    assert done.returncode == 0, done
    forecast = work / done.stdout.strip()
    _remove_mark(forecast)
    at = 220 if counters == "advance" else 160
    train(run, forecast, at + 140)
    later = len([step for step in discover(run).steps if step > at])
    leap = {"origin_step": 160, "valid_step": 220, "counters": counters, "forecast": str(forecast.resolve())}

    def tells() -> list[tuple[Any, ...]]:
        """Of the leap, from the other folder and from the run's own."""
        found = []
        for place, name in ((elsewhere, run), (work, "run")):
            seen = _json(call_cli("inspect", name, "--json", cwd=place))
            fitted = _json(call_cli("fit", name, "-o", elsewhere / "f.safetensors", "--json", cwd=place))
            found.append((seen["leap"], seen["leaps"], fitted["leap"], fitted["num_snapshots"]))
        return found

    assert tells() == [(at, [leap], at, later)] * 2
    shutil.rmtree(work / "forecasts")
    assert tells() == [(at, [leap], at, later)] * 2
    assert _json(call_cli("fit", "run", "--json", cwd=work, env=NOWHERE))["leap"] is None


def test_a_state_folder_that_was_named_tells_of_a_leap_in_each_later_call(tmp_path: Path, call_cli: CallCli) -> None:
    """As in a job whose home folder does not stay."""
    run, state = tmp_path / "run", {"FARCAST_STATE_DIR": str(tmp_path / "state")}
    _train_by_hand(run, None, 160)
    assert call_cli("fit", "run", cwd=tmp_path, env=state).returncode == 0
    done = call_cli("leap", "run", "--gain", "0.3", cwd=tmp_path, env=state)
    assert done.returncode == 0, done
    forecast = tmp_path / done.stdout.strip()
    _remove_mark(forecast)
    _train_by_hand(run, forecast, 300)
    shutil.rmtree(tmp_path / "forecasts")
    assert _json(call_cli("fit", "run", "--json", cwd=tmp_path, env=state))["leap"] == 160
    assert _json(call_cli("fit", "run", "--json", cwd=tmp_path))["leap"] is None
