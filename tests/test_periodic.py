"""docs/ci/periodic.sh: a run is trained, forecast, resumed from the forecast, and so on, without anybody looking."""

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

from farcast_cli.errors import UsageError
from tests.conftest import clean_environment
from tests.rounds import SAVE_EVERY
from tests.tiny import SAMPLES, fit_run, predict_run, torch_settings_kept

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "ci" / "periodic.sh"


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
        return {path.name for path in (self.home / "forecasts").glob("*[0-9]*") if ".farcast." not in path.name}


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
    """A Hugging Face Trainer in three rounds, so with two chances to leap."""
    found = loop(tmp_path_factory.mktemp("trained"), "ckpts", 3, "--", *training("trainer"))
    assert found.done.returncode == 0, found.done.stderr
    return found


def test_a_trainer_leaps_between_the_rounds_and_goes_on_from_the_valid_step(trained: Loop) -> None:
    first, second, third = trained.rounds
    assert (first["begin"], first["resume"], first["variable"]) == (0, None, "")
    for leap, later in zip(trained.leaps, (second, third), strict=True):
        assert later["resume"] == later["variable"] == f"forecasts/checkpoint-{leap['valid_step']}"
        assert later["begin"] == leap["valid_step"]
        following = (leap["valid_step"] // SAVE_EVERY + 1) * SAVE_EVERY
        state = json.loads((trained.home / f"ckpts/checkpoint-{following}/trainer_state.json").read_text())
        assert state["global_step"] == following


def test_the_ledger_holds_every_leap_with_its_origin_and_the_horizon_that_was_proposed(trained: Loop) -> None:
    first, second = trained.leaps
    assert first["run"] == second["run"] == "../ckpts"
    assert first["origin_step"] == 8 * SAVE_EVERY
    assert first["valid_step"] - first["origin_step"] == 70, "half of the history, from step 20 to 160"
    begin = (first["valid_step"] // SAVE_EVERY + 1) * SAVE_EVERY
    assert second["origin_step"] == begin + 7 * SAVE_EVERY
    assert second["valid_step"] - second["origin_step"] == 196, "1.4 times the stretch since the leap"
    assert trained.forecasts == {Path(leap["forecast"]).name for leap in (first, second)}


def test_the_fit_after_a_leap_uses_the_later_snapshots_alone_and_says_so(trained: Loop) -> None:
    leap = trained.leaps[0]["valid_step"]
    said = trained.done.stderr
    assert f"the run resumed from checkpoint-{leap}, a leap to step {leap}: fitted on the 8 snapshots since" in said
    assert "fitted 8 snapshots, steps 20 to 160" in said
    assert f"fitted 8 snapshots, steps {(leap // SAVE_EVERY + 1) * SAVE_EVERY} to {trained.leaps[1]['origin_step']}" in said


def test_no_byte_of_a_checkpoint_that_the_run_had_saved_is_changed(trained: Loop) -> None:
    first, second, third = trained.rounds
    assert len(first["after"]) >= 8
    assert first["after"] == second["before"]
    assert second["after"] == third["before"]
    assert {name: third["after"][name] for name in second["after"]} == second["after"]
    assert {name: second["after"][name] for name in first["after"]} == first["after"]


# --- rounds without a leap -------------------------------------------------------------------------------------------


def test_a_run_that_only_diffuses_is_trained_on_from_its_own_last_checkpoint(tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 2, "--", *training("walk"))
    assert found.done.returncode == 0, found.done.stderr
    assert "abstain: nothing written" in found.done.stderr
    assert [(r["begin"], r["resume"], r["variable"]) for r in found.rounds] == [(0, None, ""), (8 * SAVE_EVERY, None, "")]
    assert (found.leaps, found.forecasts) == ([], set())


def test_too_few_snapshots_are_trained_on(tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 2, "--", *training("decay", saves=4))
    assert found.done.returncode == 0, found.done.stderr
    assert "expected at least 6 snapshots, found 4" in found.done.stderr
    assert [(r["begin"], r["resume"]) for r in found.rounds] == [(0, None), (4 * SAVE_EVERY, None)]


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
    assert "a leap needs training after it" in outcome.decision.reason


def test_a_leap_over_the_end_that_was_asked_for_is_refused_without_a_horizon_that_does_not_exist(
    ended: Path, tmp_path: Path
) -> None:
    with torch_settings_kept(), pytest.raises(UsageError, match="not before the end") as refused:
        predict_run(fit_run(ended), tmp_path / "out", horizons=[1])
    assert "--horizon" not in refused.value.hint


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_with_tidy_two_forecasts_are_kept_and_the_ledger_remembers_all(tmp_path: Path) -> None:
    found = loop(tmp_path, "--tidy", "ckpts", 4, "--", *training("decay"), RESUME_OPTION="--from")
    assert found.done.returncode == 0, found.done.stderr
    names = [Path(leap["forecast"]) for leap in found.leaps]
    assert [r["resume"] for r in found.rounds] == [None, *(f"forecasts/{name}" for name in names)]
    assert found.forecasts == {name.name for name in names[1:]}
    assert {path.name for path in tmp_path.glob("forecasts/*.json")} == {f"{name.name}.farcast.json" for name in names[1:]}
    assert len(names) == 3


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_trainer_that_fails_stops_the_loop_with_its_own_code(tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 3, "--", "sh", "-c", "exit 7")
    assert found.done.returncode == 7
    assert "round 1: the training command failed with exit code 7" in found.done.stderr
    assert not (tmp_path / "forecasts").exists()


@pytest.mark.parametrize(
    ("command", "variables"),
    [("fit", {"FARCAST_STEPS": "soon"}), ("predict", {"FARCAST_HORIZON": "5", "FARCAST_TO_STEP": "500"})],
)
def test_a_farcast_that_fails_stops_the_loop_with_its_code(command: str, variables: dict[str, str], tmp_path: Path) -> None:
    found = loop(tmp_path, "ckpts", 3, "--", *training("decay"), **variables)
    assert found.done.returncode == UsageError.exit_code
    assert f"round 1: farcast {command} failed with exit code 2" in found.done.stderr
    assert len(found.rounds) == 1


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
