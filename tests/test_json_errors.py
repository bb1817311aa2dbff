"""With --json, whatever goes wrong is one object on stdout, and stderr has the lines for people as without it."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from farcast_cli.errors import UsageError
from farcast_cli.results import ErrorAnswer
from tests.conftest import fit_run, make_loose_run, popen_cli, run_cli, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli, Done


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make_loose_run(tmp_path / "run")
    fit_run(tmp_path / "run", tmp_path / "forecaster.safetensors")
    return tmp_path


def error_of(done: Done) -> dict[str, Any]:
    """The one object of a call that failed, which says what stderr says."""
    assert done.stdout.count("\n") == 1, done
    content = json.loads(done.stdout)
    assert set(content) == {"schema_version", "error"}
    ErrorAnswer.model_validate(content)
    error: dict[str, Any] = content["error"]
    assert error["code"] == done.returncode
    assert done.errors == [f"error: {error['message']}"]
    assert done.hints == ([f"hint: {error['hint']}"] if error["hint"] else [])
    return error


@pytest.mark.parametrize(
    ("arguments", "code", "path"),
    [
        (("fit", "nowhere"), 3, "nowhere"),
        (("predict", "--horizon", "x"), 2, None),
        (("predict", "--no-such-option"), 2, None),
        (("predict", "--jobs", "many"), 2, None),
        (("verify", "a"), 2, None),
        (("fit", "run", "run"), 2, None),
        (("frobnicate",), 2, None),
        (("predict", "--forecaster", "none.safetensors"), 4, "none.safetensors"),
        (("predict", "--horizon", "100", "-o", "run/x.safetensors"), 5, "run/x.safetensors"),
        (("tune", "nothing.pt", "--layer", "a", "--data", "b.npz", "--loss", "mse", "-o", "c.pt"), 3, "nothing.pt"),
    ],
)
def test_an_error_is_one_object(arguments: tuple[str, ...], code: int, path: str | None, work: Path, call_cli: CallCli) -> None:
    plain = call_cli(*arguments, cwd=work)
    assert (plain.returncode, plain.stdout) == (code, "")
    done = call_cli(*arguments, "--json", cwd=work)
    assert (error_of(done)["path"], done.returncode, done.stderr) == (path, code, plain.stderr)


@pytest.mark.parametrize("by", ["environment", "file", "neither"])
def test_json_may_be_asked_for_in_another_place(by: str, work: Path, call_cli: CallCli) -> None:
    if by == "file":
        (work / "farcast.toml").write_text("json = true\n")
    env = {"environment": {"FARCAST_JSON": "1"}, "neither": {"FARCAST_JSON": "0"}}.get(by, {})
    done = call_cli("predict", "--jobs", "many", cwd=work, env=env)
    assert done.returncode == 2
    assert bool(done.stdout) == (by != "neither")
    assert by == "neither" or error_of(done)["code"] == 2
    done = call_cli("fit", "--", "--json", cwd=work, env=env)
    assert bool(done.stdout) == (by != "neither")


def test_exit_code_10_has_the_commands_own_answer_and_no_second_object(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 5000, "--json", cwd=work)
    assert (done.returncode, done.stdout.count("\n")) == (10, 1)
    assert json.loads(done.stdout)["verdict"] == "untestable"


def test_a_run_that_inspect_cannot_use_has_its_own_answer(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run", (100,))
    (tmp_path / "run" / "step_000100.safetensors").rename(tmp_path / "run" / "weights.safetensors")
    make_loose_run(tmp_path / "run", (200, 300))
    done = call_cli("inspect", "run", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (3, 1)
    assert json.loads(done.stdout)["problems"]


def test_an_interrupt_is_one_object(work: Path) -> None:
    slow = ("predict", "--horizon", 100, "--eval-cmd", "touch started; sleep 1000; : {ckpt}", "--json")
    with popen_cli(*slow, cwd=work) as process:
        wait_until(lambda: (work / "started").exists() or process.poll() is not None, "the command was not started")
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert json.loads(stdout)["error"]["code"] == 130
    assert stdout.count("\n") == 1
    assert stderr == json.loads(stdout)["error"]["message"] + "\n"


def test_the_result_that_is_printed_stays_alone(work: Path) -> None:
    done = run_cli("predict", "--horizon", 100, "--json", cwd=work)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)


def test_the_path_of_an_error_is_a_path_and_no_option(tmp_path: Path) -> None:
    assert UsageError("--horizon a/b: expected a number").path is None
    assert UsageError("tensor 'a/b': expected another").path is None
    assert UsageError("no colon").path is None
    assert UsageError(f"{tmp_path}: exists").path == tmp_path
    assert UsageError("told: x", path=tmp_path).path == tmp_path
