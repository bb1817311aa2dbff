"""The losses that a run logged: found wherever its trainer keeps them, and what they say of a leap."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from farcast_cli.errors import FileFormatError
from farcast_cli.forecast.worth import LeapSpan, Worth, worth_of
from farcast_cli.run.losses import LossLog, losses_of
from farcast_cli.run.trajectory import Trajectory, discover
from tests.conftest import PATIENCE_S, clean_environment, make_loose_run
from tests.rounds import train_by_trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import CallCli

TRAINING = tuple((step, 2.0 - step / 100) for step in range(10, 60, 10))
EVALUATION = ((20, 2.5), (40, 2.25))


@pytest.fixture
def run(tmp_path: Path) -> Trajectory:
    make_loose_run(tmp_path / "checkpoints")
    return discover(tmp_path / "checkpoints")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def _rows(training: str, evaluation: str) -> list[dict[str, Any]]:
    return [{"step": step, training: loss, "lr": 0.1, "accuracy": 0.5} for step, loss in TRAINING] + [
        {"step": step, evaluation: loss} for step, loss in EVALUATION
    ]


# --- where losses are found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "evaluation"), [("loss", "val_loss"), ("train/loss", "eval/loss"), ("train_loss", "test.loss")]
)
@pytest.mark.parametrize("name", ["metrics.csv", "log.jsonl"])
def test_a_table_beside_the_checkpoints_has_the_losses_in_any_usual_name(
    name: str, training: str, evaluation: str, run: Trajectory
) -> None:
    path, rows = run.directory.parent / name, _rows(training, evaluation)
    if name.endswith("csv"):
        _write_csv(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "lo')
    assert losses_of(run) == LossLog(path, TRAINING, EVALUATION)
    assert losses_of(run, path) == LossLog(path, TRAINING, EVALUATION)


def test_a_run_that_logged_nothing_has_no_losses(run: Trajectory) -> None:
    assert losses_of(run) is None


def test_a_log_outside_the_folder_of_the_run_is_not_its_own(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "first")
    _write_csv(tmp_path / "metrics.csv", _rows("loss", "val_loss"))
    assert losses_of(discover(tmp_path / "first")) is None


def test_of_a_step_that_was_logged_twice_the_last_loss_counts_and_what_is_no_number_does_not(run: Trajectory) -> None:
    path = run.directory / "log.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan")}, {"step": 1, "loss": 2.0}, {"step": 1.5, "loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\nnot json\n")
    assert losses_of(run) == LossLog(path, ((1, 2.0),))


def test_tensorboards_event_files_have_the_losses(run: Trajectory) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.directory.parent)) as writer:
        for tag, points in (("train/loss", TRAINING), ("eval/loss", EVALUATION), ("lr", TRAINING)):
            for step, value in points:
                writer.add_scalar(tag, value, step)
    log = losses_of(run)
    assert log is not None
    assert [step for step, _ in log.training] == [step for step, _ in TRAINING]
    np.testing.assert_allclose([loss for _, loss in log.training], [loss for _, loss in TRAINING], rtol=1e-6)  # float32
    assert log.evaluation == EVALUATION
    (event_file,) = run.directory.parent.glob("events*")
    assert losses_of(run, event_file) == LossLog(event_file, log.training, log.evaluation)


def test_lightnings_own_log_has_the_losses(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path))
    for step, loss in TRAINING:
        logger.log_metrics({"train_loss": loss}, step)
    logger.save()
    make_loose_run(tmp_path / "lightning_logs" / "version_0" / "checkpoints")
    log = losses_of(discover(tmp_path / "lightning_logs" / "version_0" / "checkpoints"))
    assert log is not None
    assert log.training == TRAINING


def test_a_named_log_without_losses_is_refused_with_what_it_needs(run: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    _write_csv(path, [{"step": 1, "accuracy": 0.5}])
    with pytest.raises(FileFormatError, match="expected losses by step, found none") as caught:
        losses_of(run, path)
    assert "column 'step'" in caught.value.hint


def test_a_log_that_nobody_named_and_that_cannot_be_read_stops_nothing_and_is_said(
    run: Trajectory, call_cli: CallCli, tmp_path: Path
) -> None:
    (run.directory / "metrics.csv").write_bytes(b"step,loss\n\xff\xfe\n")
    done = call_cli("fit", run.directory, cwd=tmp_path)
    assert done.returncode == 0, done
    assert "note: the run's losses are not known" in done.stderr
    assert "metrics.csv: expected a CSV file" in done.stderr


# --- logs that are broken or hostile ---------------------------------------------------------------------------------


def _record(raw: bytes) -> bytes:
    """A record of an event file with its checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(raw)
    return file.getvalue()


def _endless_record() -> bytes:
    """The head of a record of 2^60 bytes."""
    from tensorboard.summary.writer.record_writer import masked_crc32c

    head = struct.pack("<Q", 1 << 60)
    return head + struct.pack("<I", masked_crc32c(head)) + b"x" * 64


@pytest.mark.parametrize("raw", [_record(b"\xff no event"), _endless_record()], ids=["no event", "2^60 bytes"])
@pytest.mark.parametrize("command", ["fit", "report"])
def test_a_broken_event_file_is_a_note_if_nobody_named_it_and_an_error_with_its_name_if_somebody_did(
    command: str, raw: bytes, work: Path, call_cli: CallCli
) -> None:
    (work / "run" / "events.out.tfevents.1").write_bytes(raw)
    named = call_cli(command, "run", "--losses", "run/events.out.tfevents.1", cwd=work)
    assert (named.returncode, len(named.errors)) == (4, 1), named
    assert "run/events.out.tfevents.1: expected TensorBoard's event files" in named.errors[0]
    found = call_cli(command, "run", cwd=work)
    assert found.returncode == 0, found
    told = found.stderr if command == "fit" else (work / "report.html").read_text()
    assert "expected TensorBoard" in told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
@pytest.mark.parametrize("name", ["events.out.tfevents.1", "log.jsonl"])
def test_a_fifo_is_never_waited_for(name: str, run: Trajectory) -> None:
    """In a process of its own, which would hang."""
    place = run.directory / name
    os.mkfifo(place)
    code = (
        "import sys\nfrom pathlib import Path\nfrom farcast_cli.errors import FileFormatError\n"
        "from farcast_cli.run.losses import losses_of\nfrom farcast_cli.run.trajectory import discover\n"
        "run = discover(Path(sys.argv[1]))\nprint(losses_of(run))\n"
        "try:\n    losses_of(run, Path(sys.argv[2]))\nexcept FileFormatError as error:\n    print(error)\n"
    )
    environment = clean_environment() | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, run.directory, place],
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    found, refused = done.stdout.splitlines()
    assert refused == f"{place}: cannot be read: no regular file"
    assert "no regular file" in found or found == "None"


@pytest.mark.parametrize("name", ["metrics.csv", "log.jsonl"])
def test_a_number_that_is_too_large_for_a_loss_or_a_step_is_none(name: str, run: Trajectory) -> None:
    path = run.directory / name
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1e308}, {"step": 3, "loss": -1e31}, {"step": 1e300, "loss": 1.0}]
    if name.endswith("csv"):
        _write_csv(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert losses_of(run) == LossLog(path, ((1, 2.0),))


@pytest.mark.parametrize("length", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_line_of_json_that_is_too_long_is_left_out_as_a_whole(length: int, run: Trajectory) -> None:
    path, inner = run.directory / "log.jsonl", json.dumps({"step": 2, "loss": 9.0})
    long = "[" + " " * (length - len(inner) - 1) + inner
    path.write_text("\n".join([json.dumps({"step": 1, "loss": 2.0}), long, json.dumps({"step": 3, "loss": 1.0})]))
    cut = "x" * (1 << 20) + inner + "\n"
    path.write_text(path.read_text() + "\n" + cut)
    assert losses_of(run) == LossLog(path, ((1, 2.0), (3, 1.0)))


def test_a_csv_file_is_read_a_line_at_a_time_and_a_line_without_end_is_refused(run: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with path.open("w") as file:
        file.write("step,loss\n1,2.0\n")
        for _ in range(64):
            file.write(",1" * (1 << 19))
    tracemalloc.start()
    with pytest.raises(FileFormatError, match="a line of more than 1048576 bytes"):
        losses_of(run, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_log_with_a_new_column_in_each_line_is_refused(run: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step, f"loss/{step}": 1.0}) + "\n" for step in range(1001)))
    with pytest.raises(FileFormatError, match="at most 1000 columns of losses"):
        losses_of(run, path)


# --- what a leap was worth -------------------------------------------------------------------------------------------


def _curve(step: float) -> float:
    return 3.0 - 0.5 * math.log(step)


def _log(before: Sequence[tuple[int, float]], after: Sequence[tuple[int, float]]) -> LossLog:
    return LossLog(Path("log"), (*before, *after))


FALLING = [(step, _curve(step) + (-1) ** (step // 10) * 0.001) for step in range(10, 110, 10)]


def _worth(log: LossLog, span: LeapSpan) -> Worth:
    worth = worth_of(log, span)
    assert worth is not None
    return worth


def test_a_loss_below_the_curve_is_told_in_steps() -> None:
    """The loss of step 160 at step 140."""
    worth = _worth(_log(FALLING, [(140, _curve(160))]), LeapSpan(-1, 100, 100))
    assert worth.trained == 40
    assert worth.curve == pytest.approx(_curve(140), abs=0.005)
    assert worth.sooner == pytest.approx(20, abs=2)
    assert worth.told().startswith(
        f"Leap at step 100: training loss {FALLING[-1][1]:.4g} before it, {_curve(160):.4g} after 40"
    )
    assert re.search(r"The same loss about (19|20|21) steps sooner. Estimate for the run without the leap: ", worth.told())


def test_training_far_beyond_the_curve_does_not_change_the_answer() -> None:
    near = [(step, _curve(step + 20)) for step in range(105, 145, 5)]
    early = _worth(_log(FALLING, near), LeapSpan(-1, 100, 100))
    late = _worth(_log(FALLING, [*near, *((step, _curve(step)) for step in range(200, 2000, 5))]), LeapSpan(-1, 100, 100))
    assert early == late


def test_where_the_counters_advanced_only_trained_steps_count() -> None:
    kept = _worth(_log(FALLING, [(140, 0.3)]), LeapSpan(-1, 100, 100))
    advanced = _worth(_log(FALLING, [(640, 0.3)]), LeapSpan(-1, 100, 600))
    assert replace(advanced, resumes_after=100) == kept
    assert "Leap at step 600" in advanced.told()


def test_the_losses_of_an_earlier_stretch_do_not_enter_the_curve() -> None:
    jumped = [(step, 9.0) for step in range(10, 50, 10)] + [point for point in FALLING if point[0] >= 50]
    assert _worth(_log(jumped, [(140, 0.3)]), LeapSpan(45, 100, 100)).curve == pytest.approx(_curve(140), abs=0.01)


def test_a_loss_above_the_curve_has_not_paid() -> None:
    assert "The leap has not paid yet" in _worth(_log(FALLING, [(140, 1.9)]), LeapSpan(-1, 100, 100)).told()


def test_a_difference_within_the_noise_is_none() -> None:
    noisy = [(step, 3.0 + 0.3 * (-1) ** (step // 10)) for step in range(10, 110, 10)]
    worth = _worth(_log(noisy, [(110, 2.9)]), LeapSpan(-1, 100, 100))
    assert not worth.is_clear
    assert "No clear difference: it is under 2 standard errors." in worth.told()


def test_a_flat_curve_tells_no_steps() -> None:
    flat = [(step, 3.0 + 0.01 * (-1) ** (step // 10)) for step in range(10, 110, 10)]
    worth = _worth(_log(flat, [(110, 2.0)]), LeapSpan(-1, 100, 100))
    assert worth.sooner is None
    assert "The loss is lower than without the leap." in worth.told()


def test_a_curve_is_continued_only_so_far() -> None:
    worth = _worth(_log(FALLING, [(110, -1e300)]), LeapSpan(-1, 100, 100))
    assert worth.is_limit
    assert worth.sooner == pytest.approx(80)  # twice the 40 steps of the recent half
    assert "The same loss at least 80 steps sooner" in worth.told()


def test_few_losses_before_give_no_curve() -> None:
    worth = _worth(_log(FALLING[-2:], [(140, 1.3)]), LeapSpan(-1, 100, 100))
    assert worth.curve is None
    assert "what it was worth is not known" in worth.told()


def test_losses_on_one_side_alone_say_nothing() -> None:
    assert worth_of(_log(FALLING, []), LeapSpan(-1, 100, 100)) is None
    assert worth_of(_log([], FALLING), LeapSpan(-1, -1, -1)) is None
    assert worth_of(None, LeapSpan(-1, 100, 100)) is None


def test_evaluation_counts_before_training_where_both_have_a_curve() -> None:
    both = LossLog(Path("log"), (*FALLING, (140, 0.3)), (*[(s, loss + 1) for s, loss in FALLING], (140, 1.4)))
    assert _worth(both, LeapSpan(-1, 100, 100)).kind == "evaluation"
    few = LossLog(Path("log"), both.training, both.evaluation[-3:])
    assert _worth(few, LeapSpan(-1, 100, 100)).kind == "training"


# --- in the commands -------------------------------------------------------------------------------------------------


def test_a_trainers_own_log_tells_what_the_leaps_of_a_run_were_worth(tmp_path: Path, call_cli: CallCli) -> None:
    """Of a `predict` by `fit`, of a `leap` by the next one, in words and in JSON, from the real Trainer's trainer_state.json."""
    torch.manual_seed(0)
    run = tmp_path / "run"
    train_by_trainer(run, None, 8, log_every=5)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    predicted = call_cli("predict", "--horizon", 40, "--even-if-worse", cwd=tmp_path)
    train_by_trainer(run, str(tmp_path / predicted.stdout.strip()), 6, log_every=5)
    told = call_cli("fit", "run", cwd=tmp_path).stderr
    assert "Leap at step 200: training loss" in told
    answer = json.loads(call_cli("fit", "run", "--json", cwd=tmp_path).stdout)["worth"]
    assert (answer["origin_step"], answer["kind"], answer["trained"]) == (
        160,
        "training",
        75,
    )  # as long as the losses that the curve goes through
    assert answer["loss_after"] < answer["loss_before"]

    first = call_cli("leap", "run", "--gain", 0.5, cwd=tmp_path)
    assert "worth" not in json.loads(call_cli("leap", "run", "--json", cwd=tmp_path).stdout)
    train_by_trainer(run, str(tmp_path / first.stdout.strip()), 3, log_every=5)
    second = call_cli("leap", "run", "--gain", 0.5, "--json", cwd=tmp_path)
    assert json.loads(second.stdout)["worth"]["trained"] == 55
    assert "Leap at step 320: training loss" in second.stderr


def test_a_named_log_is_read_in_place_of_the_trainers(work: Path, call_cli: CallCli) -> None:
    done = call_cli("fit", "run", "--losses", "missing.csv", cwd=work)
    assert done.returncode == 4, done
    assert "missing.csv" in done.stderr


def test_inspect_tells_the_worth_of_a_leap_before_fit_has_enough_snapshots(tmp_path: Path, call_cli: CallCli) -> None:
    run = tmp_path / "run"
    train_by_trainer(run, None, 8, log_every=5)
    predicted = call_cli("predict", "run", "--horizon", 40, "--even-if-worse", cwd=tmp_path)
    train_by_trainer(run, str(tmp_path / predicted.stdout.strip()), 2, log_every=5)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 3
    assert "Leap at step 200: training loss" in call_cli("inspect", "run", cwd=tmp_path).stdout
    assert json.loads(call_cli("inspect", "run", "--json", cwd=tmp_path).stdout)["worth"]["resumes_after"] == 200
