"""Where a run's own history begins, told from any place: the second ledger, what no ledger can tell, and who may judge a forecast."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from farcast_cli.errors import OutputError
from farcast_cli.forecast.ledger import Leap, read_leaps
from farcast_cli.forecast.state_ledger import Ledgers, recorded_in_both
from farcast_cli.run.intervals import Gap, odd_gaps
from tests.conftest import tree_digest
from tests.tiny import SAMPLES, write_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tests.conftest import CallCli, Done

SIZES = {"a": 400, "b": 50}
STEPS = tuple(range(20, 260, 20))
NOISE = 0.02  # of what a weight moves between two snapshots


def _path(steps: Sequence[int], start: Mapping[str, NDArray[Any]] | None = None, first: int = 0) -> dict[str, NDArray[Any]]:
    """The run's motion from given weights at a step on: straight, with a little noise of each snapshot's own."""
    found = {}
    for key, count in SIZES.items():
        velocity = np.random.default_rng(count).normal(size=count) / 20
        noise = np.stack([np.random.default_rng((2, step, count)).normal(size=count) for step in steps])
        origin = start[key] if start else np.zeros(count)
        found[key] = origin + (np.array(steps)[:, None] - first) * velocity + NOISE * noise
    return found


def _ran(folder: Path, steps: Sequence[int] = STEPS) -> Path:
    return write_run(folder, _path(steps), steps)


def _went_on(run: Path, forecast: Path, *, after: int, num_snapshots: int) -> tuple[int, ...]:
    """A run that resumed from a forecast which missed its path a little; returns the new steps."""
    weights = load_file(forecast)
    random = np.random.default_rng(5)
    missed = {key: values + 0.5 * random.normal(size=values.shape) for key, values in weights.items()}
    steps = tuple(after + 20 * (i + 1) for i in range(num_snapshots))
    write_run(run, _path(steps, missed, after), steps)
    return steps


def _json(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def _cautions(done: Done) -> list[str]:
    return [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("caution: ")]


@pytest.fixture
def resumed(tmp_path: Path, call_cli: CallCli) -> Path:
    """A working directory with a run of 12 snapshots that resumed from a forecast for step 340, and saved 8 more."""
    work = tmp_path / "work"
    _ran(work / "run")
    assert call_cli("fit", "run", cwd=work).returncode == 0
    done = call_cli("predict", "--horizon", 100, cwd=work)
    assert done.returncode == 0
    _went_on(work / "run", work / done.stdout.strip(), after=340, num_snapshots=8)
    return work


# --- the second ledger -----------------------------------------------------------------------------------------------


def _second(state_home: Path, run: Path) -> Path:
    second = Ledgers(Path("none"), state_home / "farcast").second(run)
    assert second is not None
    return second


def test_fit_finds_a_leap_from_another_working_directory(resumed: Path, tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "else").mkdir()
    done = call_cli("fit", resumed / "run", "--json", cwd=tmp_path / "else")
    assert (_json(done)["leap"], _json(done)["num_snapshots"]) == (340, 8)
    assert "the run resumed from step_340.safetensors, a leap to step 340" in done.stderr
    (tmp_path / "link").symlink_to(resumed / "run")
    assert _json(call_cli("fit", tmp_path / "link", "--json", cwd=tmp_path))["leap"] == 340


def test_fit_finds_a_leap_after_the_working_directory_was_cleaned(resumed: Path, call_cli: CallCli) -> None:
    shutil.rmtree(resumed / "forecasts")
    assert _json(call_cli("fit", "run", "--json", cwd=resumed))["leap"] == 340
    assert _json(call_cli("fit", "run", "--json", cwd=resumed, env={"FARCAST_STATE_DIR": ""}))["leap"] is None


def test_leap_begins_after_a_leap_of_predict_from_another_working_directory(
    resumed: Path, tmp_path: Path, call_cli: CallCli
) -> None:
    (tmp_path / "else").mkdir()
    arguments = ("leap", resumed / "run", "--dry-run", "--json")
    told = _json(call_cli(*arguments, cwd=tmp_path / "else"))
    assert told["stretches"] == 7
    alone = _json(call_cli(*arguments, cwd=tmp_path / "else", env={"FARCAST_STATE_DIR": ""}))
    assert alone["stretches"] > 7


def test_both_ledgers_tell_of_a_leap_once(resumed: Path, state_home: Path, call_cli: CallCli) -> None:
    (first,), (second,) = (
        read_leaps(place, resumed / "run")
        for place in (resumed / "forecasts" / "ledger.jsonl", _second(state_home, resumed / "run"))
    )
    assert second.model_copy(update={"origin_digest": ""}) == first
    assert len(_json(call_cli("inspect", "run", "--json", cwd=resumed))["leaps"]) == 1


def test_the_second_ledger_is_the_users_own_and_names_whole_paths(resumed: Path, state_home: Path) -> None:
    second = _second(state_home, resumed / "run")
    assert stat.S_IMODE(second.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in list(second.parents)[:3]] == [0o700] * 3
    (line,) = map(json.loads, second.read_text().splitlines())
    assert line["run"] == str((resumed / "run").resolve())
    assert line["forecast"] == str((resumed / "forecasts" / "run" / "step_340.safetensors").resolve())
    assert "origin_digest" not in (resumed / "forecasts" / "ledger.jsonl").read_text()


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--for", "evaluation")])
def test_what_is_not_resumed_from_leaves_no_second_ledger(
    arguments: tuple[str, ...], tmp_path: Path, state_home: Path, call_cli: CallCli
) -> None:
    assert call_cli("fit", _ran(tmp_path / "run"), cwd=tmp_path).returncode == 0
    assert call_cli("predict", *arguments, cwd=tmp_path).returncode == 0
    assert not state_home.exists()


def test_a_variable_moves_the_second_ledger_and_an_empty_one_switches_it_off(
    tmp_path: Path, state_home: Path, call_cli: CallCli
) -> None:
    assert call_cli("fit", _ran(tmp_path / "run"), cwd=tmp_path).returncode == 0
    place = {"FARCAST_STATE_DIR": str(tmp_path / "cache")}
    assert call_cli("predict", "--horizon", 20, cwd=tmp_path, env=place).returncode == 0
    assert len(list((tmp_path / "cache" / "ledgers").iterdir())) == 1
    assert call_cli("predict", "--horizon", 40, cwd=tmp_path, env={"FARCAST_STATE_DIR": ""}).returncode == 0
    assert not state_home.exists()


def test_the_state_folder_lies_in_the_home_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_cli: CallCli
) -> None:
    for state in (None, "", "relative"):
        monkeypatch.delenv("XDG_STATE_HOME") if state is None else monkeypatch.setenv("XDG_STATE_HOME", state)
        work = tmp_path / f"work-{state}"
        assert call_cli("fit", _ran(work / "run"), cwd=work).returncode == 0
        assert call_cli("predict", "--horizon", 20, cwd=work, env={"HOME": str(work / "home")}).returncode == 0
        assert len(list((work / "home" / ".local" / "state" / "farcast" / "ledgers").iterdir())) == 1


@pytest.mark.parametrize("command", ["predict", "leap"])
def test_a_state_folder_that_cannot_be_written_is_a_note(
    command: str, tmp_path: Path, state_home: Path, call_cli: CallCli
) -> None:
    state_home.parent.mkdir(exist_ok=True)
    state_home.touch()
    run = _ran(tmp_path / "run")
    assert call_cli("fit", run, cwd=tmp_path).returncode == 0
    done = call_cli(*(("predict", "--horizon", 20) if command == "predict" else ("leap", run)), cwd=tmp_path)
    assert done.returncode == 0, done
    assert "the ledger of leaps cannot be written: File exists; so only forecasts/ledger.jsonl tells" in done.stderr
    assert len(read_leaps(tmp_path / "forecasts" / "ledger.jsonl", run)) == 1
    assert state_home.is_file()


def test_a_state_folder_inside_the_run_is_not_written(tmp_path: Path, call_cli: CallCli) -> None:
    run = _ran(tmp_path / "run")
    assert call_cli("fit", run, cwd=tmp_path).returncode == 0
    before = tree_digest(run)
    done = call_cli("predict", "--horizon", 20, cwd=tmp_path, env={"FARCAST_STATE_DIR": str(run / "state")})
    assert (done.returncode, tree_digest(run)) == (0, before)
    assert "it lies inside the run's folder" in done.stderr


def test_a_publication_that_fails_takes_both_lines_back(tmp_path: Path) -> None:
    ledgers, told, run = Ledgers(tmp_path / "ledger.jsonl", tmp_path / "state"), list[str](), tmp_path / "run"
    second = ledgers.second(run)
    assert second is not None

    def record(valid_step: int, *, fails: bool) -> None:
        leap = Leap(run=str(run), origin_step=1, valid_step=valid_step, counters="keep", forecast=str(tmp_path / "f"))
        with recorded_in_both(ledgers, run, [leap], told.append):
            assert str(valid_step) in second.read_text()
            if fails:
                raise OutputError("full")

    for is_there in (False, True):
        before = [place.read_bytes() if is_there else None for place in (ledgers.file, second)]
        with pytest.raises(OutputError, match="full"):
            record(777 + is_there, fails=True)
        assert [place.read_bytes() if place.exists() else None for place in (ledgers.file, second)] == before
        record(2, fails=False)
    assert (len(second.read_text().splitlines()), told) == (1, [])


def test_a_damaged_second_ledger_is_a_caution(resumed: Path, state_home: Path, call_cli: CallCli) -> None:
    _second(state_home, resumed / "run").write_text("mine\n")
    (resumed / "forecasts" / "ledger.jsonl").unlink()
    done = call_cli("fit", "run", "--json", cwd=resumed)
    assert _json(done)["leap"] is None
    assert any("line 1: expected a leap" in line and "are not considered" in line for line in _cautions(done))


def test_a_run_that_was_started_again_in_the_same_folder_has_none_of_the_earlier_leaps(
    resumed: Path, call_cli: CallCli
) -> None:
    shutil.rmtree(resumed / "forecasts")
    shutil.rmtree(resumed / "run")
    steps = tuple(range(20, 520, 20))
    write_run(resumed / "run", _path(steps, {key: np.ones(count) for key, count in SIZES.items()}), steps)
    done = call_cli("fit", "run", "--json", cwd=resumed)
    assert (_json(done)["leap"], _json(done)["num_snapshots"]) == (None, len(steps))
    assert "tells of leaps from snapshots that have changed since" in done.stderr


# --- what no ledger can tell -----------------------------------------------------------------------------------------


def test_unusual_distances_are_those_of_a_run_that_saves_at_equal_ones() -> None:
    assert odd_gaps((20, 40, 60, 80, 100, 180, 200)) == (Gap(100, 180, 20),)
    assert odd_gaps((20, 40, 60, 80, 87, 107, 127)) == (Gap(80, 87, 20),)
    assert odd_gaps((1, 20, 40, 60, 80, 100, 105)) == ()  # the first and the last step
    assert odd_gaps((1, 2, 4, 8, 16, 32, 64, 128)) == ()
    assert odd_gaps((312, 625, 937, 1250, 1562, 1875)) == ()
    assert odd_gaps((20, 40, 200)) == odd_gaps(()) == odd_gaps((7,)) == ()


def test_short_leaps_in_the_ledger_are_a_caution_of_fit_leap_and_inspect(tmp_path: Path, call_cli: CallCli) -> None:
    run = _ran(tmp_path / "run")
    assert call_cli("fit", run, cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", 5, cwd=tmp_path).returncode == 0
    assert _cautions(call_cli("fit", run, cwd=tmp_path)) == []  # no snapshot has come since
    _went_on(run, tmp_path / "forecasts" / "run" / "step_245.safetensors", after=240, num_snapshots=6)
    for command in (("fit", run), ("inspect", run), ("leap", run, "--dry-run"), ("backtest", run)):
        done = call_cli(*command, cwd=tmp_path)
        assert done.returncode == 0, done
        (caution,) = _cautions(done)
        assert "1 leap in the ledger is shorter than the distance between snapshots (20 steps)" in caution, command
        assert "use --steps 260:" in caution
    assert _json(call_cli("fit", run, "--steps", "260:", "--json", cwd=tmp_path))["num_snapshots"] == 6


def test_a_gap_that_no_ledger_explains_is_a_caution_of_fit_leap_and_inspect(resumed: Path, call_cli: CallCli) -> None:
    off = {"FARCAST_STATE_DIR": ""}
    assert _cautions(call_cli("fit", "run", cwd=resumed)) == []
    (resumed / "forecasts" / "ledger.jsonl").unlink()
    for command in (("fit", "run"), ("inspect", "run"), ("leap", "run", "--dry-run")):
        done = call_cli(*command, cwd=resumed, env=off)
        (caution,) = _cautions(done)
        assert "steps 240 -> 360, usual distance 20: did the run resume from a forecast there?" in caution, command
        assert "use --steps 360:" in caution
    assert any("240 -> 360" in text for text in _json(call_cli("fit", "run", "--json", cwd=resumed, env=off))["notes"])
    assert _cautions(call_cli("fit", "run", "--steps", "360:", cwd=resumed, env=off)) == []
    chosen = "20,40,60,80,100,240,360,380"
    assert _cautions(call_cli("fit", "run", "--steps", chosen, cwd=resumed, env=off)) == []


def test_weights_that_jump_at_the_usual_distance_are_a_caution_of_fit(tmp_path: Path, call_cli: CallCli) -> None:
    run = _ran(tmp_path / "run")
    ahead = {key: values[0] for key, values in _path([240 + 60]).items()}
    save_file({key: values.astype(np.float32) for key, values in ahead.items()}, tmp_path / "f.safetensors")
    _went_on(run, tmp_path / "f.safetensors", after=240, num_snapshots=6)
    (caution,) = _cautions(call_cli("fit", run, cwd=tmp_path))
    assert "steps 240 -> 260: the weights move" in caution
    assert "use --steps 260:" in caution


@pytest.mark.parametrize("sample", ["huggingface", "safetensors", "plain"])
def test_a_run_that_never_leapt_gives_no_caution(sample: str, tmp_path: Path, call_cli: CallCli) -> None:
    for command in ("fit", "inspect"):
        assert _cautions(call_cli(command, SAMPLES / sample, cwd=tmp_path)) == []


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_of_the_leaps_and_of_what_fit_uses(resumed: Path, call_cli: CallCli) -> None:
    done = call_cli("inspect", "run", cwd=resumed)
    assert "leaps in the ledger: 1; the run resumed from step_340.safetensors, a leap to step 340" in done.stdout
    assert "fit uses the 8 snapshots after it, not the 12 before it" in done.stdout
    assert done.stdout.splitlines()[-1] == "next: farcast fit run"
    told = _json(call_cli("inspect", "run", "--json", cwd=resumed))
    forecast = str((resumed / "forecasts" / "run" / "step_340.safetensors").resolve())
    assert told["leaps"] == [{"origin_step": 240, "valid_step": 340, "counters": "advance", "forecast": forecast}]
    assert told["leap"] == 340
    chosen = call_cli("inspect", "run", "--steps", "0:", cwd=resumed)
    assert "--steps overrides the ledger: fit uses all 20 snapshots" in chosen.stdout


def test_inspect_names_the_problem_for_which_fit_refuses_a_run_after_a_leap(resumed: Path, call_cli: CallCli) -> None:
    for step in range(440, 520, 20):
        (resumed / "run" / f"step_{step}.safetensors").unlink()
    refused = call_cli("fit", "run", cwd=resumed)
    done = call_cli("inspect", "run", cwd=resumed)
    assert (refused.returncode, done.returncode) == (3, 0)
    problem = refused.errors[0].removeprefix("error: ")
    assert f"problem: {problem}; " in done.stdout
    assert "next: " not in done.stdout
    assert any(text.startswith(problem) for text in _json(call_cli("inspect", "run", "--json", cwd=resumed))["problems"])


def test_inspect_of_a_run_that_never_leapt_says_nothing_of_leaps(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("inspect", _ran(tmp_path / "run"), cwd=tmp_path)
    assert "leap" not in done.stdout
    told = _json(call_cli("inspect", tmp_path / "run", "--json", cwd=tmp_path))
    assert not {"leap", "leaps"} & told.keys()


# --- verify ----------------------------------------------------------------------------------------------------------


def _verified(work: Path, call_cli: CallCli, truth: Path) -> tuple[Done, bool]:
    arguments = ("verify", "forecasts/run/step_340.safetensors", "--against", truth)
    told = _json(call_cli(*arguments, "--json", cwd=work))
    return call_cli(*arguments, cwd=work), told.get("descends", False)


def test_a_snapshot_that_descends_from_the_forecast_does_not_judge_it(resumed: Path, call_cli: CallCli) -> None:
    done, descends = _verified(resumed, call_cli, Path("run/step_360.safetensors"))
    assert descends
    assert any("compare with a run that continued without the forecast" in line for line in _cautions(done))
    assert "closer to this snapshot, which descends from it," in done.stdout


def test_a_run_that_went_on_in_another_folder_descends_too(resumed: Path, call_cli: CallCli) -> None:
    (resumed / "second").mkdir()
    for step in range(360, 520, 20):
        (resumed / "run" / f"step_{step}.safetensors").rename(resumed / "second" / f"step_{step}.safetensors")
    assert _verified(resumed, call_cli, Path("second/step_400.safetensors"))[1]


@pytest.mark.parametrize("step", [340, 360])
def test_a_run_that_went_on_without_the_forecast_judges_it(step: int, resumed: Path, call_cli: CallCli) -> None:
    """In its own folder, in another one, or as a single snapshot that was kept."""
    steps = tuple(range(260, 380, 20))
    write_run(resumed / "other", _path(steps), steps)
    shutil.copytree(resumed / "other", resumed / "run", dirs_exist_ok=True)
    (resumed / "kept").mkdir()
    shutil.copy(resumed / "other" / f"step_{step}.safetensors", resumed / "kept")
    for folder in ("other", "run", "kept"):
        done, descends = _verified(resumed, call_cli, Path(folder) / f"step_{step}.safetensors")
        assert (descends, _cautions(done)) == (False, []), folder


@pytest.mark.parametrize("leaps", [True, False])
def test_with_counters_kept_the_weights_tell_who_descends(leaps: bool, tmp_path: Path, call_cli: CallCli) -> None:  # noqa: FBT001
    run = _ran(tmp_path / "run")
    assert call_cli("fit", run, cwd=tmp_path).returncode == 0
    made = call_cli("predict", "--horizon", 100, "--counters", "keep", cwd=tmp_path)
    forecast = tmp_path / made.stdout.strip()
    if leaps:
        _went_on(run, forecast, after=240, num_snapshots=6)
    else:
        _ran(run, tuple(range(260, 380, 20)))
    told = _json(call_cli("verify", forecast, "--against", run / "step_340.safetensors", "--json", cwd=tmp_path))
    assert told.get("descends", False) == leaps
