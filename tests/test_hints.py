"""Hints lead on: every command that a hint proposes works."""

from __future__ import annotations

import json
import shlex
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from farcast_cli.settings import LOCAL_ONLY
from tests.conftest import STEPS, fit_run, loose_name, make_loose_run, tree_digest
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
def turning(turning: Path) -> Path:
    """The run that turns back, with its forecaster under a name of its own."""
    (turning / "forecaster.safetensors").rename(turning / "other.safetensors")
    return turning


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


def test_what_could_not_be_written_is_not_proposed(turning: Path, call_cli: CallCli) -> None:
    call = ("predict", "--forecaster", "other.safetensors", "-o", "out/")
    taken = call_cli(*call, "--for", "evaluation", cwd=turning).stdout.strip()
    (turning / taken).write_text("mine")
    done = call_cli(*call, "--horizon", 100, cwd=turning)
    assert (done.returncode, done.hints) == (10, ["hint: keep training and fit again; --even-if-worse writes it anyway"])


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


@pytest.mark.parametrize("steps", ["200:1000", "200,300,400,500,600,700,800"])
def test_the_hints_of_predict_keep_the_chosen_steps(steps: str, turning: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "run", "--steps", steps, cwd=turning)
    assert proposed(done) == [["predict", "run", "--steps", steps, "--for", "evaluation"]]
    assert call_cli(*proposed(done)[0], cwd=turning).returncode == 0
    assert f"next: farcast fit run --steps {steps}" in call_cli("inspect", "run", "--steps", steps, cwd=turning).stdout


def test_the_command_of_the_control_keeps_the_chosen_steps(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", SAMPLES / "huggingface", "--steps", "200:", "--horizon", "300", "--dry-run", cwd=tmp_path)
    assert "huggingface --steps 200: --horizon 300 --method persistence" in done.stderr


def test_the_next_step_of_fit_names_a_forecaster_file_of_another_name(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    other = call_cli("fit", "run", "-o", "fc.safetensors", cwd=tmp_path).stderr
    assert "next: farcast predict --forecaster fc.safetensors, or" in other
    assert "farcast predict --forecaster fc.safetensors --for evaluation; farcast backtest --forecaster fc.safetensors" in other
    assert "--forecaster" not in call_cli("fit", "run", cwd=tmp_path).stderr


@pytest.mark.parametrize("command", ["predict", "backtest"])
def test_a_forecaster_file_in_place_of_a_folder_leads_to_its_option(command: str, tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "fc.safetensors")
    done = call_cli(command, "fc.safetensors", cwd=tmp_path)
    assert (done.returncode, done.hints) == (2, [f"hint: farcast {command} --forecaster fc.safetensors"])


def test_snapshots_beyond_the_chosen_steps_are_no_news(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    call_cli("fit", "run", "--steps", f":{STEPS[-2]}", cwd=tmp_path)
    assert "newer snapshots" not in call_cli("predict", "--dry-run", cwd=tmp_path).stderr


@pytest.mark.parametrize("command", ["predict", "backtest"])
def test_a_folder_and_a_forecaster_are_too_much(command: str, turning: Path, call_cli: CallCli) -> None:
    done = call_cli(command, "run", "--forecaster", "other.safetensors", cwd=turning)
    assert (done.returncode, done.errors) == (2, ["error: expected a folder or --forecaster FILE, found both"])


def test_a_choice_of_snapshots_without_a_folder_is_not_ignored(turning: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--steps", "100:", "--forecaster", "other.safetensors", cwd=turning)
    assert (done.returncode, done.errors) == (2, ["error: --steps: chooses from a folder, and none is named"])


# --- folders of runs, and addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "fit", "backtest", "predict", "leap"])
def test_a_folder_of_runs_leads_to_its_first_run(command: str, tmp_path: Path, call_cli: CallCli) -> None:
    for number in range(10):
        make_loose_run(tmp_path / "runs" / f"lr {number}" / "checkpoints", STEPS if number == 0 else STEPS[:2])
    done = call_cli(command, "runs", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    names = ", ".join(f"lr {number}/checkpoints" for number in range(8))
    assert done.errors == [f"error: runs: expected the folder of one run, found 10 runs in it: {names} and 2 more"]
    assert done.hints == [f"hint: farcast {command} 'runs/lr 0/checkpoints'"]
    assert call_cli(*shlex.split(done.hints[0])[2:], cwd=tmp_path).returncode == 0


def test_runs_that_have_a_final_model_beside_their_checkpoints_are_runs(tmp_path: Path, call_cli: CallCli) -> None:
    for name in ("a", "b"):
        make_loose_run(tmp_path / "runs" / name)
        shutil.copy(tmp_path / "runs" / name / loose_name(800), tmp_path / "runs" / name / "model.safetensors")
    done = call_cli("fit", "runs", cwd=tmp_path)
    assert done.hints == ["hint: farcast fit runs/a"]


def test_a_folder_without_anything_says_what_is_read_and_names_no_page(tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    done = call_cli("fit", "empty", cwd=tmp_path)
    assert done.errors == ["error: empty: no snapshots found, but 1 folder"]
    assert "docs/" not in done.stderr
    assert "safetensors" in done.hints[0]


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("s3://bucket/my runs/a", "aws s3 sync 's3://bucket/my runs/a' a"),
        ("gs://bucket/a", "gsutil -m cp -r gs://bucket/a ."),
        ("hf://owner/name/ckpts", "huggingface-cli download owner/name --local-dir ckpts"),
    ],
)
def test_an_address_is_refused_with_the_command_that_copies_it(
    address: str, hint: str, tmp_path: Path, call_cli: CallCli
) -> None:
    for arguments in (("leap", address), ("keep", address), ("watch", address), ("tune", address, "--layer", "x")):
        done = call_cli(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.errors == [f"error: {address}: farcast {arguments[0]} {LOCAL_ONLY[arguments[0]]}"]
        assert done.hints == [f"hint: {hint}"]


def test_an_output_on_a_store_is_refused_with_the_command_that_uploads_it(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("leap", "ckpts", "-o", "s3://bucket/out", cwd=tmp_path)
    assert done.hints == ["hint: write to a local path, then copy it: aws s3 cp --recursive OUT s3://bucket/out"]


def test_a_run_is_not_read_from_a_web_server(tmp_path: Path, call_cli: CallCli) -> None:
    done = call_cli("fit", "https://host/a.tar", cwd=tmp_path)
    assert (done.returncode, done.errors) == (2, ["error: https://host/a.tar: farcast fit reads local files only"])
    assert done.hints == ["hint: curl -LO https://host/a.tar"]


# --- horizons as people write them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "steps"),
    [("20%", [140]), ("0.1k", [100]), ("100,50%", [100, 350]), ("0.0001M", [100])],
)
def test_a_horizon_may_be_a_share_of_the_history_or_in_thousands(
    written: str, steps: list[int], tmp_path: Path, call_cli: CallCli
) -> None:
    make_loose_run(tmp_path / "run")
    tested = json.loads(call_cli("backtest", "run", "--horizon", written, "--json", cwd=tmp_path).stdout)
    assert [decision["horizon"] for decision in tested["decisions"]] == steps
    done = json.loads(call_cli("predict", "run", "--horizon", written, "--json", cwd=tmp_path).stdout)
    assert [one["horizon"] for one in done.get("forecasts", [done])] == steps


def test_a_share_ends_at_the_origin_that_was_asked_for(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    done = call_cli("predict", "run", "--origin", 700, "--horizon", "10%", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["horizon"] == 60


@pytest.mark.parametrize("written", ["20%,140", "0%", "1.5", "0.0005k", "1m", "k", "%", "1e3"])
def test_a_horizon_that_is_none_is_a_usage_error(written: str, tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    assert call_cli("backtest", "run", "--horizon", written, cwd=tmp_path).returncode == 2


# --- misspelt names --------------------------------------------------------------------------------------------------


def test_a_variable_of_no_option_is_named_with_the_one_that_is_meant(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    env = {"FARCAST_HORIZN": "5", "FARCAST_STRENGTH": "1", "FARCAST_GAIN": "0.5"}
    done = call_cli("inspect", "run", cwd=tmp_path, env=env)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "caution: FARCAST_HORIZN is set, but no option has this variable; did you mean FARCAST_HORIZON?"
    ]
    assert call_cli("inspect", "run", "-q", cwd=tmp_path, env=env).stderr == ""


@pytest.mark.parametrize(
    ("text", "word"), [("horizn = 5", "horizon"), ("[predict]\nfro = 'resume'", "for"), ("[predikt]\nhorizon = 5", "predict")]
)
def test_a_misspelt_key_of_the_file_is_an_error_with_the_one_that_is_meant(
    text: str, word: str, tmp_path: Path, call_cli: CallCli
) -> None:
    (tmp_path / "farcast.toml").write_text(text + "\n")
    done = call_cli("predict", cwd=tmp_path)
    assert done.returncode == 2
    assert done.errors[0].endswith(f"; did you mean {word}?")


@pytest.mark.parametrize("again", [("fit", "moved"), ("predict", "moved", "--horizon", 100)])
def test_of_a_run_that_was_moved_the_error_says_so_and_the_hint_mends_it(
    again: tuple[Any, ...], work: Path, call_cli: CallCli
) -> None:
    (work / "run").rename(work / "moved")
    done = call_cli("predict", "--horizon", 100, cwd=work)
    assert (done.returncode, done.stdout) == (3, "")
    said = "the run's folder was moved, renamed or removed since the forecaster was fitted"
    assert done.errors == [f"error: run: {said}"]
    assert "farcast fit NEWPATH" in done.hints[0]
    assert "farcast predict NEWPATH" in done.hints[0]
    assert call_cli(*again, cwd=work).returncode == 0
    if again[0] == "fit":
        assert call_cli("predict", "--horizon", 100, cwd=work).returncode == 0
