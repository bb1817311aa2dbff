"""The script of `farcast ci periodic.sh`: a run is trained, leaps, is resumed from the leap, and so on, without anybody looking."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file, save_file

from farcast_cli.errors import UsageError
from tests.conftest import clean_environment
from tests.rounds import SAVE_EVERY, step_of
from tests.tiny import SAMPLES, fit_run, predict_run, torch_settings_kept

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "farcast_cli" / "scripts" / "periodic.sh"


class Loop(NamedTuple):
    """What a call of the script left in its folder."""

    home: Path
    done: subprocess.CompletedProcess[str]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """How the training command was called, round by round."""
        return [json.loads(line) for line in (self.home / "rounds.jsonl").read_text().splitlines()]

    @property
    def leaps(self) -> list[dict[str, Any]]:
        ledger = self.home / "forecasts" / "ledger.jsonl"
        return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []

    @property
    def forecasts(self) -> set[str]:
        return {
            f"ckpts/{path.name}" for path in (self.home / "forecasts/ckpts").glob("*[0-9]*") if ".farcast." not in path.name
        }


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def training(kind: str, **options: object) -> list[str]:
    """A training command that leaves its checkpoints in `ckpts`."""
    return python(
        "-m", "tests.rounds", kind, "ckpts", *(word for key, value in options.items() for word in (f"--{key}", value))
    )


def loop(home: Path, *arguments: object, **variables: str) -> Loop:
    """Run the script in a folder, with this Python's farcast on PATH."""
    tools = home / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "farcast").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m farcast_cli "$@"\n')
    (tools / "farcast").chmod(0o755)
    environment = clean_environment() | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["sh", str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=environment | variables, capture_output=True, text=True, check=False)
    return Loop(home, done)


# --- a real Trainer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """A Hugging Face Trainer in three rounds, so with two chances to leap; it keeps its three newest checkpoints only."""
    found = loop(tmp_path_factory.mktemp("trained"), "ckpts", 3, "--", *training("trainer", saves=3, keep=3))
    assert found.done.returncode == 0, found.done.stderr
    return found


def test_a_trainer_leaps_between_the_rounds_and_goes_on_at_the_same_step(trained: Loop) -> None:
    first, *later = trained.rounds
    assert (first["begin"], first["resume"], first["variable"]) == (0, None, "")
    for number, (leap, one) in enumerate(zip(trained.leaps, later, strict=True), 1):
        assert one["resume"] == one["variable"] == f"forecasts/{leap['forecast']}"
        assert one["begin"] == leap["origin_step"] == 3 * number * SAVE_EVERY
    saved = sorted(map(step_of, (trained.home / "ckpts").iterdir()))
    assert saved == [7 * SAVE_EVERY, 8 * SAVE_EVERY, 9 * SAVE_EVERY]
    state = json.loads((trained.home / f"ckpts/checkpoint-{saved[-1]}/trainer_state.json").read_text())
    assert state["global_step"] == saved[-1]


def test_the_ledger_holds_every_leap_with_its_origin_and_what_became_of_the_counters(trained: Loop) -> None:
    assert [(leap["run"], leap["counters"]) for leap in trained.leaps] == [("../ckpts", "keep")] * 2
    assert trained.forecasts == {leap["forecast"] for leap in trained.leaps}
    assert (trained.home / "forecasts/ckpts/ckpts.memory.safetensors").is_file()


def test_each_round_says_what_was_decided_and_why(trained: Loop) -> None:
    said = trained.done.stderr
    for leap in trained.leaps:
        assert f"step {leap['origin_step']}: a leap of {leap['valid_step'] - leap['origin_step']} steps: gain" in said


def test_no_byte_of_a_checkpoint_that_the_run_had_saved_is_changed(trained: Loop) -> None:
    rounds = trained.rounds
    assert all(len(r["after"]) >= 8 for r in rounds)
    assert [r["after"] for r in rounds[:-1]] == [r["before"] for r in rounds[1:]]


# --- rounds without a leap -------------------------------------------------------------------------------------------


def test_where_a_leap_is_refused_the_run_is_trained_on_from_its_own_last_checkpoint(tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 2, "--", *training("walk"), FARCAST_MAX_GAIN="0.05")
    assert found.done.returncode == 0, found.done.stderr
    assert f"step {8 * SAVE_EVERY}: no leap: share -0" in found.done.stderr
    assert [(r["begin"], r["resume"], r["variable"]) for r in found.rounds] == [(0, None, ""), (8 * SAVE_EVERY, None, "")]
    assert (found.leaps, found.forecasts) == ([], set())


def test_one_snapshot_is_trained_on(tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 2, "--", *training("decay", saves=1))
    assert found.done.returncode == 0, found.done.stderr
    assert "no leap: one snapshot so far" in found.done.stderr
    assert [(r["begin"], r["resume"]) for r in found.rounds] == [(0, None), (SAVE_EVERY, None)]


def test_a_run_that_went_back_leaps_once_more_from_a_step_that_it_leapt_from_before(tmp_path: Path) -> None:
    """After a fault, say: an older checkpoint is trained on, to other weights."""
    first = loop(tmp_path, "ckpts", 2, "--", *training("walk"), FARCAST_GAIN="0.5")
    assert first.done.returncode == 0, first.done.stderr
    (leap,) = first.leaps
    for path in (tmp_path / "ckpts").iterdir():
        if step_of(path) > 7 * SAVE_EVERY:
            path.unlink()
    oldest = tmp_path / f"ckpts/step_{7 * SAVE_EVERY}.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(oldest).items()}, oldest)
    again = loop(tmp_path, "ckpts", 2, "--", *training("walk", saves=1), FARCAST_GAIN="0.5")
    assert again.done.returncode == 0, again.done.stderr
    assert "a new memory starts" in again.done.stderr
    assert again.rounds[-1]["resume"] == f"forecasts/{leap['forecast']}"
    assert again.rounds[-1]["begin"] == leap["origin_step"] == 8 * SAVE_EVERY


# --- the end of a run ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1200, 1201])
def ended(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The sample run as if it were planned to end at its last snapshot, or one step later."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLES / "huggingface", run)
    for path in run.glob("*/trainer_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_steps": request.param}))
    return run


def test_a_run_at_its_end_is_no_error_but_gets_no_leap(ended: Path, tmp_path: Path) -> None:
    with torch_settings_kept():
        (outcome,) = predict_run(fit_run(ended), tmp_path / "out", horizons=[], even_if_worse=False)
    assert (outcome.path, outcome.decision.verdict) == (None, "abstain")
    assert outcome.decision.reason in {
        "the run ended at step 1200: there is no training to skip",
        "the run ends at step 1201: a leap must end before that",
    }


def test_a_leap_over_the_end_that_was_asked_for_is_refused_without_a_horizon_that_does_not_exist(
    ended: Path, tmp_path: Path
) -> None:
    with torch_settings_kept(), pytest.raises(UsageError, match="expected a step before the end of the run") as refused:
        predict_run(fit_run(ended), tmp_path / "out", horizons=[1])
    assert "--horizon" not in refused.value.hint


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_with_tidy_two_forecasts_are_kept_and_the_ledger_remembers_all(tmp_path: Path) -> None:
    found = loop(tmp_path, "--tidy", "ckpts", 4, "--", *training("decay", saves=3), RESUME_OPTION="--from")
    assert found.done.returncode == 0, found.done.stderr
    names = [Path(leap["forecast"]) for leap in found.leaps]
    assert [r["resume"] for r in found.rounds] == [None, *(f"forecasts/{name}" for name in names)]
    assert found.forecasts == {str(name) for name in names[1:]}
    assert {path.name for path in tmp_path.glob("forecasts/ckpts/*.json")} == {
        f"{name.name}.farcast.json" for name in names[1:]
    }
    assert "starts again" not in found.done.stderr, "the memory needs the last one alone"
    assert len(names) == 3


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_trainer_that_fails_stops_the_loop_with_its_own_code(tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 3, "--", "sh", "-c", "exit 7")
    assert found.done.returncode == 7
    assert "round 1: the training command failed with exit code 7" in found.done.stderr
    assert not (tmp_path / "forecasts").exists()


@pytest.mark.parametrize("variables", [{"FARCAST_STEPS": "soon"}, {"FARCAST_LEAP_COUNTERS": "both"}, {"FARCAST_EVERY": "0"}])
def test_a_farcast_that_fails_stops_the_loop_with_its_code(variables: dict[str, str], tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 3, "--", *training("decay"), **variables)
    assert found.done.returncode == UsageError.exit_code
    assert "round 1: farcast leap failed with exit code 2" in found.done.stderr
    assert len(found.rounds) == 1


def test_options_of_farcast_come_by_their_variables(tmp_path: Path) -> None:
    variables = {"FARCAST_LEAP_COUNTERS": "advance", "FARCAST_GAIN": "0.5", "FARCAST_EVERY": "60", "FARCAST_OUTPUT": "ahead/"}
    found = loop(tmp_path, "ckpts", 2, "--", *training("decay", saves=3), **variables)
    assert found.done.returncode == 0, found.done.stderr
    first, second = found.rounds
    assert second["resume"] == f"ahead/step_{3 * SAVE_EVERY + 30}.safetensors"
    assert second["begin"] == first["begin"] + 3 * SAVE_EVERY + 30


@pytest.mark.parametrize(
    "arguments", [[], ["ckpts", 3], ["ckpts", 3, "train"], ["ckpts", "few", "--", "train"], ["ckpts", 0, "--", "train"]]
)
def test_arguments_that_make_no_sense_are_refused_before_anything_runs(arguments: list[object], tmp_path: Path) -> None:
    found = loop(tmp_path, *arguments)
    assert (found.done.returncode, found.done.stdout) == (2, "")
    assert "expected [--tidy] RUN ROUNDS -- COMMAND..." in found.done.stderr


def test_the_script_is_plain_posix_shell() -> None:
    done = subprocess.run(["sh", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
