"""Hints lead on: every command that a hint proposes works."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

from tests.conftest import STEPS, fit_run, loose_name, make_loose_run, tree_digest, weights_at
from tests.tiny import SAMPLES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli, Done


def proposed(done: Done) -> list[list[str]]:
    """The commands in the hint of a call."""
    (hint,) = done.hints
    ways = [way.strip() for way in hint.removeprefix("hint: ").split(";")]
    commands = [way[: way.index(" writes")] if " writes" in way else way.partition(" is supported")[0] for way in ways]
    return [shlex.split(command)[1:] for command in commands if command.startswith("farcast ")]


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run of the Trainer at the last step of its plan, and its forecaster."""
    run = tmp_path / "run"
    shutil.copytree(SAMPLES / "huggingface", run)
    for path in run.glob("*/trainer_state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_steps": 1200}))
    fit_run(run, tmp_path / "forecaster.safetensors")
    return tmp_path


@pytest.fixture
def turning(tmp_path: Path) -> Path:
    """A run that turns back halfway, so that a forecast would not help."""
    (tmp_path / "run").mkdir()
    base, away = (weights_at(0, seed=seed) for seed in (0, 1))
    for step in STEPS:
        share = 0.1 * math.sin(math.pi * (step - 100) / 700)
        save_file({name: base[name] + share * away[name] for name in base}, tmp_path / "run" / loose_name(step))
    fit_run(tmp_path / "run", tmp_path / "other.safetensors")
    return tmp_path


@pytest.mark.parametrize("options", [(), ("--horizon", "9000"), ("--horizon", "10"), ("--even-if-worse",)])
def test_a_finished_run_is_led_to_evaluation_and_to_nothing_that_fails(
    options: tuple[str, ...], ended: Path, call_cli: CallCli
) -> None:
    done = call_cli("predict", *options, cwd=ended)
    assert done.returncode in {2, 10}
    assert proposed(done) == [["predict", "--for", "evaluation"]]
    assert "--even-if-worse" not in done.hints[0]
    assert "keep training" not in done.hints[0]
    assert call_cli(*proposed(done)[0], cwd=ended).returncode == 0


@pytest.mark.parametrize(
    "options",
    [("--horizon", "100"), ("--horizon", "5000"), ("--method", "average"), ("--for", "evaluation", "--horizon", "5000")],
)
def test_what_the_hint_of_exit_code_10_proposes_works(options: tuple[str, ...], turning: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--forecaster", "other.safetensors", "-o", "out/", *options, cwd=turning)
    assert done.returncode == 10
    ways = proposed(done)
    assert ways == [["predict", "--forecaster", "other.safetensors", "--for", "evaluation", "-o", "out/"]]
    for way in ways:
        assert call_cli(*way, cwd=turning).returncode == 0
    assert ("--even-if-worse" in done.hints[0]) == ("average" not in options)


def test_a_horizon_that_the_history_supports_is_proposed(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    done = call_cli("predict", "--horizon", 5000, cwd=tmp_path)
    assert done.returncode == 10
    assert [way[:2] for way in proposed(done)] == [["predict", "--horizon"], ["predict", "--for"]]
    for way in proposed(done):
        assert call_cli(*way, "-o", f"{way[1]}/", cwd=tmp_path).returncode == 0


def test_without_the_runs_files_no_command_is_proposed(turning: Path, call_cli: CallCli) -> None:
    shutil.rmtree(turning / "run")
    done = call_cli("predict", "--horizon", 100, "--forecaster", "other.safetensors", cwd=turning)
    assert (done.returncode, done.hints) == (10, ["hint: keep training and fit again"])


# --- more paths than a command takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "fit", "backtest", "predict", "leap"])
def test_paths_that_a_shell_made_of_a_pattern_lead_to_their_folder(command: str, tmp_path: Path, call_cli: CallCli) -> None:
    paths = sorted(make_loose_run(tmp_path / "my run").iterdir())
    done = call_cli(command, *(f"my run/{path.name}" for path in paths), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.errors == ["error: expected one folder, found 8 paths in my run"]
    assert done.hints == [f"hint: farcast {command} 'my run'"]
    assert call_cli(*shlex.split(done.hints[0])[2:], cwd=tmp_path).returncode == 0


def test_arguments_that_are_too_many_are_one_short_line(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("verify", "a", "b", "c", "d", "--against", "x", cwd=tmp_path)
    assert (done.returncode, done.errors) == (2, ["error: expected one FORECAST, found 4: a, b, c and 1 more"])


# --- fit and predict in one go ---------------------------------------------------------------------------------------


def test_predict_of_a_folder_equals_fit_and_predict(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    assert call_cli("fit", "run", "--exclude", "norm*", cwd=tmp_path).returncode == 0
    assert call_cli("predict", "--horizon", 100, "-o", "two/", cwd=tmp_path).returncode == 0
    (tmp_path / "forecaster.safetensors").unlink()
    done = call_cli("predict", "run", "--exclude", "norm*", "--horizon", 100, "-o", "one/", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "one/step_000900.safetensors\n")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert not (tmp_path / "forecaster.safetensors").exists()


def test_the_hints_of_predict_with_a_folder_name_the_folder(turning: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "run", "--exclude", "norm*", cwd=turning)
    assert proposed(done) == [["predict", "run", "--exclude", "norm*", "--for", "evaluation"]]
    assert call_cli(*proposed(done)[0], cwd=turning).returncode == 0


@pytest.mark.parametrize("command", ["predict", "backtest"])
def test_a_folder_and_a_forecaster_are_too_much(command: str, turning: Path, call_cli: CallCli) -> None:
    done = call_cli(command, "run", "--forecaster", "other.safetensors", cwd=turning)
    assert (done.returncode, done.errors) == (2, ["error: expected a folder or --forecaster FILE, found both"])


def test_a_choice_of_snapshots_without_a_folder_is_not_ignored(turning: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--steps", "100:", "--forecaster", "other.safetensors", cwd=turning)
    assert (done.returncode, done.errors) == (2, ["error: --steps: chooses from a folder, and none is named"])
