"""The ledger of leaps: what is written is read again, and a run is fitted on what came after the leap it resumed from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from farcast_cli.errors import FileFormatError, OutputError, TooFewSnapshotsError
from farcast_cli.forecast.forecaster_file import load_fitted
from farcast_cli.forecast.history import History, since_last_leap
from farcast_cli.forecast.ledger import Leap, read_leaps, recorded
from farcast_cli.run.trajectory import MIN_SNAPSHOTS, discover
from tests.conftest import PATIENCE_S, clean_environment, tree_digest
from tests.tiny import write_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tests.conftest import CallCli, Done
    from tests.tiny import Arrays

SIZES = {"a": 400, "b": 50}
STEPS = tuple(range(100, 1300, 100))  # the run before any leap; its history is 1,100 steps long
NOISE = 0.02  # of what a weight moves between two snapshots: each moves by about 1


def _moves(seed: int, *, size: float = 1.0) -> Arrays:
    """A direction of a given size per weight, (N,) per tensor."""
    random = np.random.default_rng(seed)
    return {key: size * random.normal(size=count) for key, count in SIZES.items()}


def _path(steps: Sequence[int], *, start: Mapping[str, NDArray[Any]] | None = None, first: int = 0) -> Arrays:
    """The run's own motion from given weights at a step on: straight, with a little noise of each snapshot's own."""
    velocity, found = _moves(1, size=0.01), {}
    for key, count in SIZES.items():
        noise = np.stack([np.random.default_rng((2, step, count)).normal(size=count) for step in steps])
        origin = start[key] if start else np.zeros(count)
        found[key] = origin + (np.array(steps)[:, None] - first) * velocity[key] + NOISE * noise
    return found


def _plain(folder: Path, steps: Sequence[int] = STEPS) -> Path:
    """Snapshots of a run that never leapt."""
    return write_run(folder, _path(steps), steps)


def _forecast(path: Path, *, step: int, miss: float = 3.0, seed: int = 3) -> dict[str, NDArray[Any]]:
    """A forecast for a step that misses the run's own path by so many snapshots' moves; written, and its weights."""
    missed = _moves(seed, size=miss)
    weights = {key: (values[0] + missed[key]).astype(np.float32) for key, values in _path([step]).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return weights


def _continued(run: Path, weights: Mapping[str, NDArray[Any]], steps: Sequence[int], *, after: int) -> Path:
    """Snapshots of a run that resumed from given weights, with its counters at `after`."""
    return write_run(run, _path(steps, start=weights, first=after), steps)


def record_leap(ledger: Path, leap: Leap) -> None:
    """As when a forecast is published without trouble."""
    with recorded(ledger, [leap]):
        pass


def _leap(run: Path, forecast: Path, *, origin: int = 1200, horizon: int = 500, counters: Any = "advance") -> Leap:
    return Leap(run=str(run), origin_step=origin, valid_step=origin + horizon, counters=counters, forecast=str(forecast))


def _history(run: Path, *leaps: Leap, minimum: int = MIN_SNAPSHOTS) -> History:
    """By way of a ledger on disk."""
    ledger = run.parent / "ledger.jsonl"
    for leap in leaps:
        record_leap(ledger, leap)
    return since_last_leap(discover(run), read_leaps(ledger, run), minimum=minimum)


def _whole(history: History) -> bool:
    return history.leap is None and history.num_before == 0


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_leap_that_was_recorded_is_read_again(tmp_path: Path) -> None:
    ledger, run = tmp_path / "deep" / "ledger.jsonl", tmp_path / "run"
    leaps = [
        _leap(run, tmp_path / "deep" / "step_1700.safetensors"),
        _leap(run, tmp_path / "else" / "é ü.safetensors", origin=1800, horizon=7, counters="keep"),
    ]
    for leap in leaps:
        record_leap(ledger, leap)
    assert read_leaps(ledger, run) == leaps
    assert [leap.resumes_after for leap in leaps] == [1700, 1800]
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == [
        {
            "run": "../run",
            "origin_step": 1200,
            "valid_step": 1700,
            "counters": "advance",
            "forecast": "step_1700.safetensors",
        },
        {
            "run": "../run",
            "origin_step": 1800,
            "valid_step": 1807,
            "counters": "keep",
            "forecast": "../else/é ü.safetensors",
        },
    ]


def test_a_ledger_that_is_not_there_or_empty_tells_of_no_leaps(tmp_path: Path) -> None:
    assert read_leaps(tmp_path / "none.jsonl", tmp_path) == []
    (tmp_path / "ledger.jsonl").touch()
    assert read_leaps(tmp_path / "ledger.jsonl", tmp_path) == []


def test_leaps_are_read_in_the_order_of_the_steps_that_training_resumes_at(tmp_path: Path) -> None:
    ledger, run = tmp_path / "ledger.jsonl", tmp_path / "run"
    for origin, horizon, counters in ((900, 900, "keep"), (100, 900, "advance"), (500, 200, "advance"), (300, 1, "keep")):
        record_leap(ledger, _leap(run, tmp_path / "x", origin=origin, horizon=horizon, counters=counters))
    assert [leap.resumes_after for leap in read_leaps(ledger, run)] == [300, 700, 900, 1000]


def test_the_ledger_the_run_and_its_forecasts_may_move_together(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "deep"
    record_leap(here / "forecasts" / "ledger.jsonl", _leap(here / "run", here / "forecasts" / "step_1700"))
    there.parent.mkdir()
    here.rename(there)
    (found,) = read_leaps(there / "forecasts" / "ledger.jsonl", there / "run")
    assert (found.run, found.forecast) == (str(there / "run"), str(there / "forecasts" / "step_1700"))
    assert read_leaps(there / "forecasts" / "ledger.jsonl", here / "run") == []


def test_a_run_is_known_by_any_path_that_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    record_leap(tmp_path / "ledger.jsonl", _leap(tmp_path / "run", tmp_path / "x"))
    monkeypatch.chdir(tmp_path)
    for run in ("run", "link", "run/../run/"):
        assert len(read_leaps(Path("ledger.jsonl"), Path(run))) == 1


def test_leaps_of_other_runs_are_none_of_a_runs_own(tmp_path: Path) -> None:
    ledger, names = tmp_path / "ledger.jsonl", ("run", "run2", "RUN", "run/deep")
    for number, name in enumerate(names):
        record_leap(ledger, _leap(tmp_path / name, tmp_path / "x", origin=number))
    for number, name in enumerate(names):
        assert [leap.origin_step for leap in read_leaps(ledger, tmp_path / name)] == [number]


@pytest.mark.parametrize("line", ["mine", "{}", "[1, 2]", '{"run": "run", "origin_step": "soon"}', "null"])
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    """Even where the run's own leaps stand in other lines: what it says cannot be known."""
    ledger, run = tmp_path / "ledger.jsonl", tmp_path / "run"
    record_leap(ledger, _leap(run, tmp_path / "x"))
    with ledger.open("a") as file:
        file.write(line + "\n")
    record_leap(ledger, _leap(run, tmp_path / "y"))
    with pytest.raises(FileFormatError, match=r"ledger\.jsonl: line 2: expected a leap: ") as caught:
        read_leaps(ledger, run)
    assert caught.value.hint == "correct or remove that line"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "bytes"])
def test_what_cannot_be_read_as_a_ledger_is_an_error_with_its_path(tmp_path: Path, kind: str) -> None:
    ledger = tmp_path / "ledger.jsonl"
    if kind == "folder":
        ledger.mkdir()
    else:
        ledger.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match=r"ledger\.jsonl: .*cannot be read"):
        read_leaps(ledger, tmp_path)


def test_a_place_where_no_ledger_can_be_written_is_an_output_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"ledger\.jsonl: the ledger of leaps cannot be written") as caught:
        record_leap(tmp_path / "file" / "ledger.jsonl", _leap(tmp_path, tmp_path / "x"))
    assert "--ledger" in caught.value.hint


def test_processes_that_record_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each waits for all to be ready, and then writes as fast as it can."""
    num, each, ledger = 6, 50, tmp_path / "ledger.jsonl"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom farcast_cli.forecast.ledger import Leap, recorded\n"
        f"place, number = Path({str(tmp_path)!r}), int(sys.argv[1])\n"
        "(place / f'ready-{number}').touch()\n"
        f"while len(list(place.glob('ready-*'))) < {num}: time.sleep(0.005)\n"
        f"for i in range({each}):\n"
        "    leap = Leap(run=str(place / 'run'), origin_step=number, valid_step=1000 * (number + 1) + i, counters='advance',\n"
        "                forecast=str(place / ('deep/' * 100) / 'x'))\n"
        "    with recorded(place / 'ledger.jsonl', [leap]): pass\n"
    )
    environment = clean_environment() | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(number)], env=environment) for number in range(num)]
    assert [process.wait(timeout=PATIENCE_S) for process in processes] == [0] * num
    found = [(leap.origin_step, leap.valid_step) for leap in read_leaps(ledger, tmp_path / "run")]
    assert found == [(number, 1000 * (number + 1) + i) for number in range(num) for i in range(each)]


# --- where a run's own history begins --------------------------------------------------------------------------------


def test_a_run_without_a_leap_is_its_whole_history(tmp_path: Path) -> None:
    history = _history(_plain(tmp_path / "run"))
    assert _whole(history)
    assert history.trajectory.steps == STEPS


def test_a_forecast_that_the_run_has_not_passed_yet_changes_nothing(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _forecast(tmp_path / "f.safetensors", step=1700)
    assert _whole(_history(run, _leap(run, tmp_path / "f.safetensors")))


AFTER = tuple(range(1800, 2500, 100))


def test_a_run_whose_steps_jump_over_a_leap_has_resumed_and_begins_after_it(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    weights = _forecast(tmp_path / "f.safetensors", step=1700)
    _continued(run, weights, AFTER, after=1700)
    leap = _leap(run, tmp_path / "f.safetensors")
    history = _history(run, leap)
    assert history.trajectory.steps == AFTER
    assert (history.leap, history.num_before) == (leap, 12)


def test_a_leap_as_long_as_the_distance_between_snapshots_can_be_told_from_training(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1300), AFTER, after=1300)
    assert _history(run, _leap(run, tmp_path / "f.safetensors", horizon=100)).trajectory.steps == AFTER


def test_a_run_whose_steps_jump_has_resumed_even_where_the_forecast_is_deleted(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1700), AFTER, after=1700)
    (tmp_path / "f.safetensors").unlink()
    assert _history(run, _leap(run, tmp_path / "f.safetensors")).trajectory.steps == AFTER


def test_a_run_whose_early_snapshots_are_rotated_away_has_resumed_too(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1700), AFTER, after=1700)
    for step in STEPS:
        (run / f"step_{step}.safetensors").unlink()
    history = _history(run, _leap(run, tmp_path / "f.safetensors"))
    assert (history.trajectory.steps, history.num_before) == (AFTER, 0)


@pytest.mark.parametrize("miss", [0.01, 0.1, 1.0, 3.0, 30.0])
def test_a_run_that_went_on_plainly_has_not_resumed(tmp_path: Path, miss: float) -> None:
    """Its steps do not jump, and its weights go on where they were: whether the forecast was good or bad."""
    run = _plain(tmp_path / "run", range(100, 2300, 100))
    _forecast(tmp_path / "f.safetensors", step=1700, miss=miss)
    assert _whole(_history(run, _leap(run, tmp_path / "f.safetensors")))


@pytest.mark.parametrize("ahead", [0.1, 0.5, 0.9, 2.0, 5.0])
@pytest.mark.parametrize("horizon", [100, 450, 500])
def test_a_run_that_went_on_plainly_towards_a_forecast_that_was_too_far_ahead_has_not_resumed(
    tmp_path: Path, horizon: int, ahead: float
) -> None:
    """Its next snapshot may lie nearer to such a forecast than to the one before."""
    run = _plain(tmp_path / "run", range(100, 2300, 100))
    valid = 1200 + horizon
    save_file(
        {key: value[0].astype(np.float32) for key, value in _path([round(valid + 100 * ahead)]).items()},
        tmp_path / "f.safetensors",
    )
    assert _whole(_history(run, _leap(run, tmp_path / "f.safetensors", horizon=horizon)))


def test_a_run_that_went_on_plainly_has_not_resumed_where_the_forecast_is_deleted_or_another_model(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run", range(100, 2300, 100))
    leap = _leap(run, tmp_path / "f.safetensors")
    assert _whole(_history(run, leap))
    save_file({"other": np.ones(3, np.float32)}, tmp_path / "f.safetensors")
    assert _whole(_history(run, leap))
    (tmp_path / "f.safetensors").write_bytes(b"broken")
    assert _whole(_history(run, leap))


@pytest.mark.parametrize("last_plain", [1300, 1600, 1700])
def test_a_run_that_went_on_plainly_for_a_while_and_then_resumed_begins_after_the_leap(tmp_path: Path, last_plain: int) -> None:
    run = _plain(tmp_path / "run", range(100, last_plain + 1, 100))
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1700), AFTER, after=1700)
    assert _history(run, _leap(run, tmp_path / "f.safetensors")).trajectory.steps == AFTER


def test_a_forecast_that_was_put_into_the_runs_folder_to_resume_from_it_there_is_a_leap(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    weights = _forecast(tmp_path / "f.safetensors", step=1700)
    save_file(weights, run / "step_1700.safetensors")
    _continued(run, weights, AFTER, after=1700)
    history = _history(run, _leap(run, tmp_path / "f.safetensors"))
    assert (history.trajectory.steps, history.num_before) == (AFTER, 13)


def test_a_leap_shorter_than_the_distance_between_snapshots_is_not_told_from_training(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1250), AFTER, after=1250)
    assert _whole(_history(run, _leap(run, tmp_path / "f.safetensors", horizon=50)))


KEPT = tuple(range(1300, 2000, 100))  # with its counters kept, a run goes on at the origin's step


def test_with_counters_kept_the_weights_tell_that_a_run_has_resumed(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1700), KEPT, after=1200)
    leap = _leap(run, tmp_path / "f.safetensors", counters="keep")
    history = _history(run, leap)
    assert (history.trajectory.steps, history.leap, history.num_before) == (KEPT, leap, 12)


@pytest.mark.parametrize("miss", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("horizon", [60, 100, 200, 500])
def test_with_counters_kept_the_weights_tell_that_a_run_went_on_plainly(tmp_path: Path, horizon: int, miss: float) -> None:
    """Even towards a forecast that was for its very next snapshot."""
    run = _plain(tmp_path / "run", range(100, 2000, 100))
    _forecast(tmp_path / "f.safetensors", step=1200 + horizon, miss=miss)
    assert _whole(_history(run, _leap(run, tmp_path / "f.safetensors", horizon=horizon, counters="keep")))


def test_with_counters_kept_and_the_forecast_deleted_a_run_is_taken_to_have_resumed(tmp_path: Path) -> None:
    """A shorter history does no harm; a leap that is taken for movement does."""
    run = _plain(tmp_path / "run", range(100, 2000, 100))
    assert _history(run, _leap(run, tmp_path / "gone.safetensors", counters="keep")).trajectory.steps == KEPT


def test_of_several_leaps_the_last_that_the_run_resumed_from_counts(tmp_path: Path) -> None:
    """It resumed from the first and the second, went on plainly past the third, and has not reached the fourth."""
    run, forecasts = _plain(tmp_path / "run"), tmp_path / "forecasts"
    first = _forecast(forecasts / "1.safetensors", step=1700)
    _continued(run, first, AFTER, after=1700)
    missed = _moves(4, size=3.0)
    second = {key: (value[0] + missed[key]).astype(np.float32) for key, value in _path([2900], start=first, first=1700).items()}
    save_file(second, forecasts / "2.safetensors")
    last = tuple(range(3000, 3900, 100))
    _continued(run, second, last, after=2900)
    for name, step in (("3", 3400), ("4", 9000)):
        _forecast(forecasts / f"{name}.safetensors", step=step, seed=5)
    leaps = [
        _leap(run, forecasts / "2.safetensors", origin=2400, horizon=500),
        _leap(run, forecasts / "4.safetensors", origin=3800, horizon=5200),
        _leap(run, forecasts / "1.safetensors"),
        _leap(run, forecasts / "3.safetensors", origin=3100, horizon=300),
    ]
    history = _history(run, *leaps)
    assert (history.leap, history.trajectory.steps, history.num_before) == (leaps[0], last, 12 + len(AFTER))


@pytest.mark.parametrize("later", [1, 5])
def test_too_few_snapshots_since_a_leap_are_an_error_that_says_how_many_it_takes(tmp_path: Path, later: int) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1700), AFTER[:later], after=1700)
    with pytest.raises(TooFewSnapshotsError, match=rf"run: {later} snapshots since the leap to step 1700 \(f.safe") as caught:
        _history(run, _leap(run, tmp_path / "f.safetensors"))
    assert str(caught.value).endswith("and fit needs 6")
    assert caught.value.hint == "continue training and fit again, or select the history with --steps FROM:TO"


def test_six_snapshots_since_a_leap_are_enough(tmp_path: Path) -> None:
    run = _plain(tmp_path / "run")
    _continued(run, _forecast(tmp_path / "f.safetensors", step=1700), AFTER[:6], after=1700)
    assert _history(run, _leap(run, tmp_path / "f.safetensors")).trajectory.steps == AFTER[:6]


# --- through the command ---------------------------------------------------------------------------------------------


def _json(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done
    content: dict[str, Any] = json.loads(done.stdout)
    return content


@pytest.fixture
def fitted(tmp_path: Path, call_cli: CallCli) -> Path:
    """A working directory with a run and the forecaster that was fitted on it."""
    _plain(tmp_path / "run")
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    return tmp_path


def _resumed(folder: Path, call_cli: CallCli, *, num_snapshots: int, ledger: tuple[object, ...] = ()) -> tuple[int, ...]:
    """Predict, and continue the run from the forecast, a little off its path; returns the new steps."""
    told = _json(call_cli("predict", "--json", *ledger, cwd=folder))
    weights = load_file(folder / told["path"])
    missed = _moves(7, size=1.0)  # what an evaluation of the true path would have found wrong with the forecast
    moved = {key: values + missed[key] for key, values in weights.items()}
    steps = tuple(told["valid_step"] + 100 * (i + 1) for i in range(num_snapshots))
    _continued(folder / "run", moved, steps, after=told["valid_step"])
    return steps


def test_a_run_that_resumed_is_fitted_on_what_came_after_the_leap_and_leaps_1_4_times_as_far(
    fitted: Path, call_cli: CallCli
) -> None:
    steps = _resumed(fitted, call_cli, num_snapshots=8)
    assert steps[0] == 1200 + 550 + 100  # half of 1,100 steps, and the next snapshot
    done = call_cli("fit", "run", "--json", cwd=fitted)
    content = _json(done)
    assert (content["num_snapshots"], content["leap"], content["origin_step"]) == (8, 1750, steps[-1])
    assert (
        "the run resumed from step_1750.safetensors, a leap to step 1750: fit uses the 8 snapshots after it, not the 12 before it"
        " (--steps FROM:TO overrides this)"
    ) in done.stderr.splitlines()
    assert load_fitted(fitted / "forecaster.safetensors").steps == steps
    told = _json(call_cli("predict", "--json", cwd=fitted))
    assert (told["horizon"], told["origin_step"]) == (round(1.4 * 700), steps[-1])
    assert told["chosen"] == ["horizon 980: 140% of the history of 700 steps since the leap to step 1750"]
    assert [leap.valid_step for leap in read_leaps(fitted / "forecasts" / "ledger.jsonl", fitted / "run")] == [
        1750,
        steps[-1] + 980,
    ]


def test_a_run_that_has_only_just_resumed_is_not_fitted_and_keeps_its_forecaster(fitted: Path, call_cli: CallCli) -> None:
    _resumed(fitted, call_cli, num_snapshots=5)
    before = tree_digest(fitted)
    done = call_cli("fit", "run", cwd=fitted)
    assert (done.returncode, done.stdout) == (3, "")
    assert "5 snapshots since the leap to step 1750 (step_1750.safetensors), and fit needs 6" in done.errors[0]
    assert "--steps FROM:TO" in done.hints[0]
    assert tree_digest(fitted) == before


@pytest.mark.parametrize(("steps", "num_snapshots", "noted"), [("0:", 20, True), ("1750:", 8, False), ("0:1200", 12, False)])
def test_steps_chosen_by_hand_override_the_ledger_and_a_leap_among_them_is_mentioned(
    steps: str,
    num_snapshots: int,
    noted: bool,  # noqa: FBT001
    fitted: Path,
    call_cli: CallCli,
) -> None:
    _resumed(fitted, call_cli, num_snapshots=8)
    done = call_cli("fit", "run", "--steps", steps, "--json", cwd=fitted)
    content = _json(done)
    assert (content["num_snapshots"], content["leap"]) == (num_snapshots, None)
    assert ("the leap at step 1750, which the forecaster would take for training" in done.stderr) == noted
    assert "resumed from it" in done.stderr or not noted


def test_a_backtest_of_a_folder_reads_what_came_after_the_leap_too(fitted: Path, call_cli: CallCli) -> None:
    _resumed(fitted, call_cli, num_snapshots=8)
    content = _json(call_cli("backtest", "run", "--json", cwd=fitted))
    assert [decision["horizon"] for decision in content["decisions"]] == [70, 175, 350, 700]


def test_a_ledger_in_a_place_of_its_own_is_written_and_read_there(fitted: Path, call_cli: CallCli) -> None:
    _resumed(fitted, call_cli, num_snapshots=8, ledger=("--ledger", "own/leaps.jsonl"))
    assert not (fitted / "forecasts" / "ledger.jsonl").exists()
    assert _json(call_cli("fit", "run", "--ledger", "own/leaps.jsonl", "--json", cwd=fitted))["num_snapshots"] == 8
    by_variable = call_cli("fit", "run", "--json", cwd=fitted, env={"FARCAST_LEDGER": "own/leaps.jsonl"})
    assert _json(by_variable)["num_snapshots"] == 8
    alone = call_cli("fit", "run", "--json", cwd=fitted, env={"FARCAST_STATE_DIR": ""})
    assert _json(alone)["leap"] is None  # but for the state folder, it is not looked for elsewhere


def test_everything_may_move_together_after_a_leap(fitted: Path, call_cli: CallCli) -> None:
    _resumed(fitted, call_cli, num_snapshots=8)
    moved = fitted.with_name("moved")
    fitted.rename(moved)
    assert _json(call_cli("fit", "run", "--json", cwd=moved))["leap"] == 1750


def test_a_damaged_ledger_is_refused_with_its_line(fitted: Path, call_cli: CallCli) -> None:
    (fitted / "forecasts").mkdir()
    (fitted / "forecasts" / "ledger.jsonl").write_text("mine\n")
    before = tree_digest(fitted)
    done = call_cli("fit", "run", cwd=fitted)
    assert (done.returncode, done.stdout) == (4, "")
    assert "forecasts/ledger.jsonl: line 1: expected a leap" in done.errors[0]
    assert tree_digest(fitted) == before


def test_a_ledger_that_cannot_be_written_publishes_nothing(fitted: Path, call_cli: CallCli) -> None:
    (fitted / "file").touch()
    before = tree_digest(fitted)
    done = call_cli("predict", "--horizon", "100,200", "--ledger", "file/ledger.jsonl", cwd=fitted)
    assert (done.returncode, done.stdout) == (5, "")
    assert "file/ledger.jsonl: the ledger of leaps cannot be written" in done.errors[0]
    assert tree_digest(fitted) == before


@pytest.mark.parametrize(
    ("arguments", "leaps"),
    [
        (("--horizon", "100,200"), [(1200, 1300, "advance"), (1200, 1400, "advance")]),
        (("--horizon", 100, "--counters", "keep"), [(1200, 1300, "keep")]),
        (("--horizon", 100, "--origin", 900), [(900, 1000, "advance")]),
        (("--to-step", 1234), [(1200, 1234, "advance")]),
        (("--horizon", 5000, "--even-if-worse"), [(1200, 6200, "advance")]),
        (("--horizon", "100,5000"), [(1200, 1300, "advance")]),  # the second is untestable
        (("--horizon", 100, "--eval-cmd", "echo $FARCAST_STRENGTH # {ckpt}", "--maximize"), [(1200, 1300, "advance")]),
    ],
)
def test_every_checkpoint_to_resume_from_is_recorded(
    arguments: tuple[object, ...], leaps: list[tuple[int, int, str]], fitted: Path, call_cli: CallCli
) -> None:
    done = call_cli("predict", *arguments, cwd=fitted)
    assert done.returncode == 0
    found = read_leaps(fitted / "forecasts" / "ledger.jsonl", fitted / "run")
    assert [(leap.origin_step, leap.valid_step, leap.counters) for leap in found] == leaps
    assert [os.path.relpath(leap.forecast, fitted) for leap in found] == done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--for", "evaluation"), 0),
        (("--for", "evaluation", "--horizon", 100), 0),
        (("--horizon", 100, "--dry-run"), 0),
        (("--horizon", 5000), 10),
        (("--method", "average"), 10),
        (("--horizon", 100, "--eval-cmd", "echo 1 # {ckpt}"), 10),
        (
            (
                "--horizon",
                "100,200",
                "--eval-cmd",
                "test $FARCAST_VALID_STEP != 1400 && echo $FARCAST_STRENGTH # {ckpt}",
                "--maximize",
            ),
            2,
        ),
    ],
    ids=["to evaluate", "later weights to evaluate", "dry run", "untestable", "by an average", "judged worse", "judging fails"],
)
def test_what_is_not_published_to_resume_from_is_not_recorded(
    arguments: tuple[object, ...], code: int, fitted: Path, call_cli: CallCli
) -> None:
    assert call_cli("predict", *arguments, cwd=fitted).returncode == code
    assert not (fitted / "forecasts" / "ledger.jsonl").exists()


def test_half_a_line_that_a_killed_process_left_does_not_spoil_the_next(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    leap = Leap(run=str(tmp_path / "run"), origin_step=800, valid_step=1200, counters="advance", forecast=str(tmp_path / "f"))
    ledger.write_text('{"run": "ru')
    record_leap(ledger, leap)
    assert ledger.read_text().split("\n")[1:] == [leap.relative_to(tmp_path).as_line(), ""]
    assert [found.valid_step for found in read_leaps(ledger, tmp_path / "run")] == [1200]


def test_a_ledger_is_never_appended_to_a_file_of_another_kind_or_inside_the_runs_folder(
    fitted: Path, call_cli: CallCli
) -> None:
    before = tree_digest(fitted)
    snapshot = next((fitted / "run").iterdir())
    for place in (snapshot, fitted / "run" / "ledger.jsonl", fitted / "forecaster.safetensors", fitted / "run"):
        result = call_cli("predict", "--ledger", place, "--horizon", 200, cwd=fitted)
        assert result.returncode in {4, 5}
        assert tree_digest(fitted) == before
