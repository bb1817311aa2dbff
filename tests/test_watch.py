"""Watching a run: what counts as a new snapshot, what never ends the watch, leaps, and how the real process ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import farcast_cli
from farcast_cli import results
from farcast_cli.commands import view
from farcast_cli.errors import OutputError, TooFewSnapshotsError, UsageError
from farcast_cli.progress import silent
from farcast_cli.settings import fit_request
from farcast_cli.watching import CommandEnded, LeapWritten, NewVerdict, Trouble, Waiting, WatchEnded, WatchRequest
from farcast_cli.watching import watch as follow
from tests.conftest import (
    PATIENCE_S,
    clean_environment,
    loose_name,
    make_loose_run,
    popen_cli,
    run_cli,
    tree_digest,
    weights_at,
)
from tests.test_results import problems as problems_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from farcast_cli.watching import Event

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--interval", "0.1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def watching(run: Path | str = "run", **options: Any) -> Iterator[Event]:
    return farcast_cli.watch(run, interval=0.01, threads=1, **options)


def look(events: Iterator[Event], times: int = 2) -> list[Any]:
    """What happens in so many looks, without the waiting."""
    found: list[Event] = []
    for _ in range(times):
        for event in events:
            if isinstance(event, Waiting):
                break
            found.append(event)
    return found


def of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# --- what is new and whole -------------------------------------------------------------------------------------------


def test_each_new_snapshot_is_kept_and_judged_once_it_is_the_same_at_two_looks(here: Path) -> None:
    events = watching()
    assert look(events) == []  # there is no folder yet
    for count in range(1, 7):
        make_loose_run(here / "run", [100 * count])
        assert look(events, 1) == []
        (judged,) = look(events, 1)
        assert isinstance(judged, NewVerdict)
        assert (judged.step, judged.num_snapshots) == (100 * count, count)
        assert (here / "kept/run" / loose_name(100 * count)).with_suffix(".kept.safetensors").is_file()
        expected = "leap 250 steps" if count == 6 else f"keep training: {count} snapshot{'s' * (count > 1)}, 6 are needed"
        assert judged.words == expected
        assert look(events, 3) == []  # nothing changed
    assert judged.coherence > 0.9


def test_the_verdict_is_that_of_predict(here: Path) -> None:
    make_loose_run(here / "run")
    (judged,) = look(watching())
    outcome = farcast_cli.predict("run", dry_run=True).outcomes[0]
    decision = outcome.decision
    assert (judged.horizon, judged.verdict, judged.reason) == (outcome.horizon, "forecast", decision.reason)
    assert (judged.coherence, judged.significance, judged.ratio) == (
        decision.coherence,
        decision.significance.p,
        decision.ratio,
    )


def test_a_half_written_snapshot_is_told_once_and_judged_when_it_is_whole(here: Path) -> None:
    make_loose_run(here / "run")
    newest = here / "run" / loose_name(800)
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-100])
    events = watching()
    problem, judged = look(events, 4)
    assert "left out: half-written" in problem.text
    assert judged.step == 700
    newest.write_bytes(whole[:-50])
    assert look(events, 4) == []
    newest.write_bytes(whole)
    assert [event.step for event in look(events)] == [800]


def test_a_snapshot_that_changed_since_the_last_look_is_not_read_beside_one_that_did_not(here: Path) -> None:
    make_loose_run(here / "run", range(100, 800, 100))
    events = watching()
    assert look(events, 1) == []
    make_loose_run(here / "run", [800])  # whole, and seen once
    (first,) = look(events, 1)
    assert first.step == 700
    assert not (here / "kept/run" / loose_name(800)).with_suffix(".kept.safetensors").exists()
    (second,) = look(events, 1)
    assert second.step == 800


def test_a_snapshot_that_changed_while_it_was_copied_is_judged_once_it_is_kept(here: Path) -> None:
    make_loose_run(here / "run")
    newest = here / "run" / loose_name(800)

    def touch_the_newest(phase: str, total: int) -> Callable[[int], None]:
        if phase == "keep" and not touched:
            touched.append(phase)
            os.utime(newest)
        return silent(phase, total)

    touched: list[str] = []
    events = watching(until=800, progress=touch_the_newest)
    (told,) = look(events, 3)
    assert isinstance(told, Trouble)
    assert "left out: it changed or was deleted while it was copied" in told.text
    judged, ended = look(events, 2)
    assert (judged.step, judged.num_snapshots) == (800, 8)
    assert isinstance(ended, WatchEnded)
    assert (here / "kept/run" / loose_name(800)).with_suffix(".kept.safetensors").is_file()


def test_the_history_survives_the_trainers_rotation(here: Path) -> None:
    events = watching()
    for step in range(100, 900, 100):
        make_loose_run(here / "run", [step])
        (judged,) = look(events)
        (here / "run" / loose_name(step - 100)).unlink(missing_ok=True)
    assert len(list((here / "run").iterdir())) == 1
    assert (judged.num_snapshots, judged.verdict) == (8, "forecast")
    shutil.copytree(here / "run", here / "other" / "run")
    make_loose_run(here / "other" / "run")
    (whole,) = look(watching(here / "other" / "run"))
    assert judged.coherence == whole.coherence


def test_the_kept_snapshots_are_samples_unless_all_weights_are_asked_for(here: Path) -> None:
    make_loose_run(here / "run", shapes={"big.weight": (200, 200)})
    look(watching(into="small"))
    look(watching(into="whole", keep="weights"))
    sizes = {name: sum(path.stat().st_size for path in (here / name).iterdir()) for name in ("small", "whole")}
    assert sizes["small"] < sizes["whole"] / 2


def bytes_read_for_a_new_snapshot(folder: Path, side: int) -> int:
    """Of all files, as the system counts them."""
    counter = Path("/proc/self/io")
    shapes = {"big.weight": (side, side)}
    make_loose_run(folder, range(100, 800, 100), shapes=shapes)
    events = watching(folder)
    look(events)
    make_loose_run(folder, [800], shapes=shapes)
    before = counter.read_text()
    assert [event.step for event in look(events)] == [800]
    return int(counter.read_text().split()[1]) - int(before.split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count the bytes")
def test_the_bytes_read_for_a_new_snapshot_do_not_grow_with_the_model(here: Path) -> None:
    bytes_read_for_a_new_snapshot(here / "first", 300)  # imports what it needs
    small, large = (bytes_read_for_a_new_snapshot(here / f"run{side}", side) for side in (300, 2400))
    assert large < 1.05 * small < 2 * 4 * 16_384 * 9


# --- what never ends the watch ---------------------------------------------------------------------------------------


def test_a_problem_of_the_disk_is_told_once_and_the_watch_goes_on_after_it(here: Path) -> None:
    make_loose_run(here / "run")
    events = watching()
    assert [event.step for event in look(events)] == [800]
    (here / "run").rename(here / "away")
    (here / "run").symlink_to("run")  # a circle: the system refuses to read it
    (problem,) = look(events, 5)
    assert isinstance(problem, Trouble)
    assert "run: cannot be read" in problem.text
    (here / "run").unlink()
    (here / "away").rename(here / "run")
    make_loose_run(here / "run", [900])
    assert [event.step for event in look(events, 3)] == [900]


def test_a_folder_that_vanishes_and_comes_back_is_waited_for(here: Path) -> None:
    make_loose_run(here / "run", [100])
    events = watching()
    look(events)
    shutil.rmtree(here / "run")
    assert look(events, 3) == []
    waiting = next(events)
    assert isinstance(waiting, Waiting)
    assert (waiting.what, waiting.step) == ("the run's folder", 100)
    make_loose_run(here / "run", [200])
    assert [(event.step, event.num_snapshots) for event in look(events)] == [(200, 2)]


def test_a_snapshot_that_vanishes_while_it_is_read_is_no_problem(here: Path) -> None:
    make_loose_run(here / "run")

    def rotate(phase: str, _: int) -> Any:
        if phase == "fit":
            (here / "run" / loose_name(100)).unlink(missing_ok=True)
        return lambda _: None

    events = watching(progress=rotate)
    assert look(events, 2) == []
    assert [(event.step, event.num_snapshots) for event in look(events)] == [(800, 8)]


def test_another_run_in_the_same_folder_is_told_once_with_what_mends_it(here: Path) -> None:
    make_loose_run(here / "run", [100, 200])
    events = watching()
    look(events)
    shutil.rmtree(here / "run")
    make_loose_run(here / "run", [100], seed=1)
    (problem,) = look(events, 5)
    assert "its weights differ" in problem.text
    assert "move kept/run away" in problem.hint
    (here / "kept/run").rename(here / "old")
    make_loose_run(here / "run", [200], seed=1)
    assert [(event.step, event.num_snapshots) for event in look(events, 3)] == [(100, 1), (200, 2)]


def test_a_run_that_falls_behind_its_kept_snapshots_is_told_once(here: Path) -> None:
    make_loose_run(here / "run", [100, 200])
    events = watching()
    look(events)
    shutil.rmtree(here / "run")
    for step in (110, 120):
        make_loose_run(here / "run", [step])
        *told, judged = look(events)
        assert judged.step == step
        assert [problem.text for problem in told] == [
            "the run is at step 110, and snapshots up to step 200 are kept: did it start again?"
        ] * (step == 110)


def test_what_failed_is_tried_again_after_a_minute_though_nothing_changed(here: Path) -> None:
    make_loose_run(here / "run", [100])
    (here / "kept").write_text("a file in the place of the folder")
    request = fit_request(
        Path("run"), include=None, exclude=None, steps=None, pattern=None, sample=16_384, full=False,
        ledger=Path("ledger.jsonl"), device="cpu", io="auto", threads=1,
    )  # fmt: skip
    times = [0.0]
    from farcast_cli.request import Request

    asked = WatchRequest(request, Request(ledgers=request.ledgers))
    events = follow(asked, silent, now=lambda: times[0], sleep=lambda _: None)
    assert len(of(Trouble, look(events, 4))) == 1
    (here / "kept").unlink()
    assert look(events, 3) == []
    times[0] = 61.0
    assert [event.step for event in look(events, 1)] == [100]


# --- leaps -----------------------------------------------------------------------------------------------------------


def test_a_leap_is_written_once_for_an_origin_and_is_the_forecast_of_predict(here: Path) -> None:
    make_loose_run(here / "run")
    judged, leapt = look(watching(leap=True), 5)
    assert isinstance(leapt, LeapWritten)
    assert (leapt.step, leapt.valid_step) == (800, 800 + judged.horizon)
    digest = tree_digest(here / "forecasts" / "run")
    assert [event.existed for event in of(LeapWritten, look(watching(leap=True), 5))] == [True]
    assert tree_digest(here / "forecasts" / "run") == digest
    done = farcast_cli.predict("run", output="by_predict.safetensors")
    assert done.path is not None
    assert done.path.read_bytes() == leapt.path.read_bytes()


def test_after_a_leap_the_history_starts_anew(here: Path) -> None:
    make_loose_run(here / "run")
    events = watching(leap=True)
    _, leapt = look(events)
    landed = load_file(leapt.path)
    for count in (1, 2):
        step = leapt.valid_step + 100 * count
        moved = {name: value + 0.01 * count * torch.randn(value.shape) for name, value in landed.items()}
        save_file(moved, here / "run" / loose_name(step), metadata={"format": "pt"})
        (judged,) = look(events)
        assert (judged.step, judged.leap) == (step, leapt.valid_step)
        assert judged.words == f"keep training: {count} snapshot{'s' * (count > 1)} since the leap, 6 are needed"


@pytest.mark.parametrize("keep", ["sampled", "weights"])
def test_a_leap_that_needs_weights_that_are_gone_is_told_with_the_option_that_keeps_them(here: Path, keep: str) -> None:
    shapes = {"big.weight": (200, 200)}
    events = watching(leap=True, keep=keep)
    found: list[Any] = []
    for step in range(100, 900, 100):
        make_loose_run(here / "run", [step], shapes=shapes)
        found += look(events)
        (here / "run" / loose_name(step - 100)).unlink(missing_ok=True)
    told, leaps = of(Trouble, found), of(LeapWritten, found)
    if keep == "weights":
        assert (told, [leap.step for leap in leaps]) == ([], [600, 700, 800])
    else:
        assert leaps == []
        (problem,) = told
        assert problem.text.startswith("no leap from step 600: kept/run: this forecast needs all weights")
        assert "--keep weights" in problem.hint


def test_a_leap_whose_checkpoint_the_trainer_deletes_is_told_once_with_what_mends_it(here: Path) -> None:
    make_loose_run(here / "run", range(100, 600, 100))
    events = watching(leap=True)
    troubles = []
    for step in (600, 700):
        make_loose_run(here / "run", [step])
        assert until(events, NewVerdict).step == step
        (here / "run" / loose_name(step)).unlink()
        troubles += of(Trouble, look(events))
    (trouble,) = troubles
    assert trouble.text == "no leap from step 600: the trainer deleted a checkpoint while it was read"
    assert "two checkpoints" in trouble.hint


def until(events: Iterator[Event], kind: type) -> Any:
    """The next event of a kind, within a time."""
    deadline = time.monotonic() + PATIENCE_S
    for event in events:
        if isinstance(event, kind):
            return event
        assert time.monotonic() < deadline
    raise AssertionError("the watch ended")


def test_a_command_runs_after_a_leap_and_its_failure_is_told(here: Path) -> None:
    make_loose_run(here / "run")
    events = watching(leap=True, on_leap='echo {ckpt} "$FARCAST_CKPT"; echo oh no >&2; exit 3')
    leapt = until(events, LeapWritten)
    ran = until(events, CommandEnded)
    assert ran.failed == "failed with exit code 3: oh no"
    path = leapt.path.resolve()
    assert f"{path} {path}" in ran.log.read_text()
    make_loose_run(here / "run", [900])
    assert until(events, NewVerdict).step == 900


def test_no_second_command_starts_beside_the_first_and_it_ends_with_the_watch(here: Path) -> None:
    make_loose_run(here / "run")
    events = watching(leap=True, on_leap="echo $$ > pid; sleep 600; : {ckpt}")
    until(events, LeapWritten)
    while not (here / "pid").exists() or not (here / "pid").read_text():
        next(events)
    make_loose_run(here / "run", [900])
    assert until(events, Trouble).text == "no leap from step 900: the command of the last leap still runs"
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int((here / "pid").read_text()), 0)


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_the_watch_ends_at_the_step_that_is_asked_for(here: Path) -> None:
    make_loose_run(here / "run")
    judged, finished = look(watching(until=800), 5)
    assert (judged.step, finished) == (800, WatchEnded(800, "step 800 is reached"))


def test_the_watch_ends_with_the_run_whose_settings_tell_its_end(here: Path) -> None:
    (here / "run").mkdir()
    events = watching()
    for step in (10, 20):
        torch.save({"model": weights_at(step), "step": step, "args": {"max_steps": 20}}, here / "run" / f"ckpt_{step}.pt")
        found = look(events)
    assert found[1:] == [WatchEnded(20, "the run ended at step 20")]


def test_once_judges_what_is_there_and_raises_what_is_wrong(here: Path) -> None:
    make_loose_run(here / "run", [100, 200])
    assert [type(event) for event in watching(once=True)] == [Waiting, NewVerdict, WatchEnded]
    with pytest.raises(TooFewSnapshotsError, match="nowhere: expected a folder"):
        list(watching("nowhere", once=True))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no interval": ({"interval": 0.0}, UsageError, "--interval 0: expected a positive number"),
    "a command without leaps": ({"on_leap": "true {ckpt}"}, UsageError, "--on-leap: expected --leap too"),
    "a command without a path": ({"leap": True, "on_leap": "true"}, UsageError, "expected {ckpt} in place"),
    "another form": ({"keep": "some"}, UsageError, "--keep some: expected one of sampled, weights"),
    "a log in the run": ({"log_to": ["jsonl:run/log"]}, OutputError, "run/log: lies inside the run's folder"),
    "kept in the run": ({"into": "run/kept"}, OutputError, "lies inside the run's folder"),
}


@pytest.mark.parametrize("what", WRONG)
def test_options_that_make_no_sense_are_refused_at_once(what: str, here: Path) -> None:
    options, error, text = WRONG[what]
    make_loose_run(here / "run", [100])
    with pytest.raises(error, match=re.escape(text)):
        farcast_cli.watch("run", **options)


# --- the view --------------------------------------------------------------------------------------------------------


def test_long_work_and_long_waiting_are_told_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = Waiting("the next snapshot", 800, 200.0)
    with view.viewing(Path("run"), as_json=False, has_paths=False, quiet=False) as shown:
        for _ in range(3):
            shown.show(waiting)
            shown.progress("keep", 2000)(1000)
        said = capsys.readouterr()
        assert re.fullmatch(r"\d\d:\d\d:\d\d waiting for the next snapshot; newest step 800, 3 min ago\n", said.err)
        monkeypatch.setattr(view, "WORK_S", 0.0)
        monkeypatch.setattr(view, "WAITING_S", 0.0)
        shown.show(waiting)
        shown.progress("keep", 2000)(1000)
        said = capsys.readouterr()
        assert [line.split(" ", 1)[1] for line in said.err.splitlines()] == [
            "waiting for the next snapshot; newest step 800, 3 min ago",
            "keep: 50% of 2.0 kB",
        ]
    assert said.out == ""


# --- the command -----------------------------------------------------------------------------------------------------


def writer(folder: Path, saves: int) -> subprocess.Popen[bytes]:
    """A process that writes snapshots in halves, with pauses."""
    command = [sys.executable, "-m", "tests.rounds", "decay", "run", "--saves", str(saves), "--pause", "0.2"]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "RESUME_FROM": ""}
    return subprocess.Popen(command, cwd=folder, env=environment)


def test_a_run_is_followed_from_before_its_folder_exists_to_its_last_step(tmp_path: Path) -> None:
    with popen_cli("watch", "run", *QUICK, "--until", 160, cwd=tmp_path) as watch:
        assert watch.stderr is not None
        waiting = watch.stderr.readline()  # so it runs before the run does, however long it takes to start
        with writer(tmp_path, 8):
            stdout, stderr = watch.communicate(timeout=PATIENCE_S)
    assert "waiting for the run's folder" in waiting
    assert watch.returncode == 0, stderr
    lines = stdout.splitlines()
    steps = [int(line.split()[2].rstrip(":")) for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 160
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 160: leap \d+ steps \(8 snapshots, S 1\.00, p 0\.031, b 0\.\d\d\)", lines[-1])
    assert re.search(r"watch ended: step 160 is reached; newest step 160, \d verdicts?\n$", stderr)
    assert "waiting for" not in stderr  # it is told once in ten minutes
    assert len(list((tmp_path / "kept/run").iterdir())) == 8


def test_with_leaps_stdout_has_their_paths_alone_and_the_numbers_are_logged(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    done = run_cli("watch", "run", *QUICK, "--once", "--leap", "--on-leap", ": {ckpt}", "--log-to", "jsonl:log", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = done.stdout.splitlines()
    assert (tmp_path / path).is_file()
    assert "step 800: leap" in done.stderr
    assert "the command of --on-leap ended well" in done.stderr
    (logged,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (logged["command"], logged["origin_step"], logged["verdict"]) == ("watch", 800, "forecast")


def test_json_has_an_object_on_each_line_as_the_schema_says(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    (tmp_path / "run" / loose_name(900)).write_bytes(b"\0" * 20)
    options = ("--json", "--leap", "--on-leap", "exit 1; {ckpt}", "--until", 800)
    done = run_cli("watch", "run", *QUICK, *options, cwd=tmp_path)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    schema = results.schema("watch")
    assert [problems_of(answer, schema, schema) for answer in answers] == [[]] * len(answers)
    assert [answer["event"] for answer in answers][-4:] == ["judged", "leap", "command", "end"]
    assert {"waiting", "problem"} == {answer["event"] for answer in answers[:-4]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_watch_with_its_code_and_a_last_line(number: signal.Signals, tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    with popen_cli("watch", "run", *QUICK, cwd=tmp_path) as watch:
        assert watch.stdout is not None
        assert "step 800: leap" in watch.stdout.readline()
        watch.send_signal(number)
        _, stderr = watch.communicate(timeout=PATIENCE_S)
    assert watch.returncode == 130
    assert "watch ended: interrupted; newest step 800, 1 verdict\n" in stderr
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


def test_the_watch_ends_where_nobody_reads_its_lines(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    with popen_cli("watch", "run", *QUICK, cwd=tmp_path) as watch:
        assert watch.stdout is not None
        watch.stdout.close()
        assert watch.wait(timeout=PATIENCE_S) == 0


def test_on_a_terminal_the_verdicts_are_a_table_and_an_interrupt_restores_the_cursor(tmp_path: Path) -> None:
    make_loose_run(tmp_path / "run")
    ours, its = pty.openpty()
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100"}
    command = [sys.executable, "-m", "farcast_cli", "watch", "run", *QUICK]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=its, stdout=its, stderr=its) as watch:
        os.close(its)
        said = read_until(ours, b"waiting for the next snapshot")
        watch.send_signal(signal.SIGINT)
        said += read_until(ours, b"incomplete output was removed")
    assert watch.returncode == 130
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", said).decode()
    assert re.search(r"step +snapshots +S +p +b +verdict", plain)
    assert re.search(r"800 +8 +1\.00 +0\.031 +0\.\d\d +leap 350 steps", plain)
    assert said.count(b"\x1b[?25h") == said.count(b"\x1b[?25l") == 1
    assert "watch ended: interrupted; newest step 800, 1 verdict" in plain


def read_until(fd: int, text: bytes) -> bytes:
    found, deadline = b"", time.monotonic() + PATIENCE_S
    while text not in found:
        assert time.monotonic() < deadline, found
        if select.select([fd], [], [], 0.1)[0]:
            found += os.read(fd, 65_536)
    return found
