"""Logging the numbers of an answer: read back from what each place holds, and never at the cost of the result."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

import farcast_cli
from farcast_cli.answer import Answer
from farcast_cli.log_to import log_answer, parse_targets
from farcast_cli.system import lock
from tests.conftest import clean_environment, run_cli, tree_digest

if TYPE_CHECKING:
    from tests.conftest import CallCli, Done

ORIGIN = 800
SAMPLE = Path(__file__).resolve().parent.parent / "sample_checkpoints" / "huggingface"
NOT_ANSWERED = {"time", "command", "run"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: by name, the steps and the values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def logged_to(*places: str, command: str, call_cli: CallCli, work: Path, more: tuple[object, ...] = ()) -> tuple[Done, Any]:
    """A call with places to log to, and its answer."""
    arguments = {"fit": ("run", "-o", "again.safetensors"), "predict": ("--horizon", 100), "leap": ("run",)}[command]
    options = [word for place in places for word in ("--log-to", place)]
    done = call_cli(command, *arguments, *more, *options, "--json", cwd=work)
    return done, json.loads(done.stdout)


# --- JSON lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "predict", "leap"])
def test_a_call_appends_its_whole_answer_with_the_time_as_one_line(command: str, work: Path, call_cli: CallCli) -> None:
    for _ in range(2):
        done, answer = logged_to("jsonl:logs/farcast.jsonl", command=command, call_cli=call_cli, work=work)
        assert done.returncode in {0, 10}
    lines = lines_of(work / "logs" / "farcast.jsonl")
    assert len(lines) == 2
    assert {key: value for key, value in lines[-1].items() if key not in NOT_ANSWERED} == answer
    assert (lines[-1]["command"], lines[-1]["time"][-6:]) == (command, "+00:00")


def test_a_call_that_abstains_is_logged_and_a_dry_run_is_not(turning: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 300, "--log-to", "jsonl:log", cwd=turning).returncode == 10
    assert (
        call_cli("predict", "--horizon", 300, "--even-if-worse", "--dry-run", "--log-to", "jsonl:log", cwd=turning).returncode
        == 0
    )
    assert [line["verdict"] for line in lines_of(turning / "log")] == ["abstain"]


def test_the_variable_names_places_too(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 100, cwd=work, env={"FARCAST_LOG_TO": "jsonl:a jsonl:b"}).returncode == 0
    assert len(lines_of(work / "a")) == len(lines_of(work / "b")) == 1


class Told(Answer):
    """An answer of any length."""

    origin_step: int
    text: str


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom farcast_cli.answer import Answer\n"
        "from farcast_cli.log_to import log_answer, parse_targets\n"
        "class Told(Answer):\n    'Anything.'\n    origin_step: int\n    text: str\n"
        "for step in range(50):\n"
        "    told = Told(schema_version=1, origin_step=step, text=sys.argv[1] * 20_000)\n"
        "    assert log_answer(parse_targets(['jsonl:log']), 'fit', told, Path('run')) == ()\n"
    )
    environment = clean_environment() | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    started = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path, env=environment) for name in "abc"]
    assert [process.wait() for process in started] == [0, 0, 0]
    lines = lines_of(tmp_path / "log")
    assert sorted((line["text"][0], line["origin_step"]) for line in lines) == [(n, s) for n in "abc" for s in range(50)]
    assert {(len(line["text"]), len(set(line["text"]))) for line in lines} == {(20_000, 1)}


def test_a_line_waits_for_the_line_that_another_process_is_writing(tmp_path: Path) -> None:
    place, told = tmp_path / "log", Told(schema_version=1, origin_step=1, text="")
    with place.open("ab", buffering=0) as file:
        lock(file.fileno())
        file.write(b'{"time": "2026-01')
        later = Thread(target=log_answer, args=(parse_targets([f"jsonl:{place}"]), "fit", told, tmp_path / "run"))
        later.start()
        later.join(0.5)
        file.write(b'"}\n')
    later.join()
    assert [line.get("origin_step") for line in lines_of(place)] == [None, 1]


def test_a_line_after_the_half_line_of_a_killed_process_is_whole(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"time": "2026-01')
    told = Told(schema_version=1, origin_step=1, text="")
    assert log_answer(parse_targets([f"jsonl:{tmp_path}/log"]), "fit", told, tmp_path / "run") == ()
    assert json.loads((tmp_path / "log").read_text().splitlines()[1])["origin_step"] == 1


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_answer_at_the_origins_step(work: Path, call_cli: CallCli) -> None:
    _, answer = logged_to("tensorboard:board", command="predict", call_cli=call_cli, work=work)
    found = scalars_of(work / "board")
    names = ("coherence", "recent_coherence", "significance", "ratio", "expected_ratio", "horizon")
    expected = {f"farcast/{name}": answer[name] for name in names if answer[name] is not None} | {"farcast/verdict": 1}
    assert found.keys() == expected.keys()
    for name, ((step, value),) in found.items():
        assert step == ORIGIN
        assert math.isclose(value, expected[name], rel_tol=1e-6)  # stored as float32


def test_tensorboard_has_gain_and_share_of_leaps(work: Path, call_cli: CallCli) -> None:
    _, answer = logged_to("tensorboard:board", command="leap", call_cli=call_cli, work=work, more=("--gain", 1))
    found = scalars_of(work / "board")
    ((step, gain),) = found["farcast/gain"]
    assert step == answer["origin_step"]
    assert math.isclose(gain, answer["gain"], rel_tol=1e-6)  # stored as float32


def test_of_several_horizons_each_has_its_numbers(work: Path, call_cli: CallCli) -> None:
    call_cli("predict", "--horizon", "100,200", "--log-to", "tensorboard:board", cwd=work)
    found = scalars_of(work / "board")
    assert {"farcast/ratio/100", "farcast/ratio/200", "farcast/verdict/100"} <= found.keys()
    assert "farcast/ratio" not in found


def test_tensorboard_is_written_without_torch(work: Path) -> None:
    """In an interpreter of its own, in which torch cannot be imported."""
    (work / "without").mkdir()
    (work / "without" / "torch.py").write_text("raise ImportError('no torch here')")
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([str(work / "without"), root])
    done = run_cli("predict", "--horizon", 100, "--log-to", "tensorboard:board", cwd=work, env={"PYTHONPATH": path})
    assert (done.returncode, "caution" in done.stderr) == (0, False), done
    assert "farcast/ratio" in scalars_of(work / "board")


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("tensorbord:board", "expected one of jsonl, tensorboard, wandb, mlflow"),
        ("jsonl", "expected a file after the colon"),
        ("tensorboard:", "expected a folder after the colon"),
        ("tensorboard:forecaster.safetensors", "expected a folder, found a file"),
        ("jsonl:forecaster.safetensors", "expected a new file, or a log that farcast wrote"),
        ("jsonl:run", "expected a new file, or a log that farcast wrote"),
        ("jsonl:logs/", "expected a new file, or a log that farcast wrote"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "predict", "leap"])
def test_a_wrong_place_is_a_usage_error_before_any_work(
    command: str, place: str, found: str, work: Path, call_cli: CallCli
) -> None:
    before = sorted(work.rglob("*"))
    done, _ = logged_to(place, command=command, call_cli=call_cli, work=work)
    assert (done.returncode, len(done.errors), len(done.hints)) == (2, 1, 1)
    assert found in done.errors[0]
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(
    package: str, work: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = call_cli("predict", "--horizon", 100, "--log-to", f"{package}:x", cwd=work)
    assert done.returncode == 2
    assert f"expected the package {package}, found none" in done.errors[0]
    assert "pip install 'farcast[" in done.hints[0]
    assert not (work / "forecasts").exists()


@pytest.mark.parametrize("place", ["jsonl:run/log", "tensorboard:run/board"])
@pytest.mark.parametrize("command", ["fit", "predict", "leap"])
def test_nothing_is_logged_into_the_runs_folder(command: str, place: str, work: Path, call_cli: CallCli) -> None:
    before = sorted((work / "run").rglob("*"))
    done, _ = logged_to(place, command=command, call_cli=call_cli, work=work)
    assert done.returncode == 5
    assert "lies inside the run's folder" in done.errors[0]
    assert sorted((work / "run").rglob("*")) == before


@pytest.mark.parametrize("kind", ["jsonl", "tensorboard"])
@pytest.mark.parametrize("command", ["predict", "leap"])
def test_nothing_is_logged_into_the_checkpoint_that_the_call_writes(
    command: str, kind: str, tmp_path: Path, call_cli: CallCli
) -> None:
    """In a folder that is not there yet; nor, later, in one that is there, whatever the verdict."""
    shutil.copytree(SAMPLE, tmp_path / "run")
    arguments = ("run", "--gain", 1) if command == "leap" else ("run", "--horizon", 100)
    out = (*arguments, "-o", "out")
    done = call_cli(command, *out, "--log-to", f"{kind}:out/below/log", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "out").exists()) == (5, False), done
    assert "lies in the output out" in done.errors[0]
    assert call_cli(command, *out, cwd=tmp_path).returncode == 0
    before = tree_digest(tmp_path / "out")
    again = call_cli(command, *arguments, "--log-to", f"{kind}:out/below/log", cwd=tmp_path)
    assert (again.returncode, tree_digest(tmp_path / "out")) == (5, before), again
    assert "which farcast wrote" in again.errors[0]


@pytest.mark.parametrize("place", ["out.safetensors", "out.safetensors.farcast.json"])
def test_nothing_is_logged_into_the_file_that_the_call_writes(place: str, work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, "-o", "out.safetensors", "--log-to", f"jsonl:{place}", cwd=work)
    assert done.returncode == 5, done
    assert not (work / "out.safetensors").exists()


def test_a_forecaster_file_is_not_appended_to(work: Path, call_cli: CallCli) -> None:
    done = call_cli("fit", "run", "-o", "new.safetensors", "--log-to", "jsonl:new.safetensors", cwd=work)
    assert "caution: not logged to jsonl:new.safetensors" in done.stderr
    assert call_cli("predict", "--forecaster", "new.safetensors", "--horizon", 100, cwd=work).returncode == 0


@pytest.mark.parametrize("command", ["fit", "predict", "leap"])
@pytest.mark.parametrize("kind", ["jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_costs_a_line_and_not_the_result(
    command: str, kind: str, work: Path, call_cli: CallCli
) -> None:
    (work / "file").write_text("in the way")
    place = f"{kind}:file/below/log"
    done, answer = logged_to(place, "jsonl:log", command=command, call_cli=call_cli, work=work, more=("--quiet",))
    plain, expected = logged_to(command=command, call_cli=call_cli, work=work, more=("--quiet",))
    assert done.returncode == plain.returncode
    assert answer.keys() - {"existed"} == expected.keys() - {"existed"}
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"caution: not logged to {place}: ")
    assert len(lines_of(work / "log")) == 1


# --- the Python functions --------------------------------------------------------------------------------------------


def test_the_functions_log_too_and_say_what_failed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    (work / "file").write_text("in the way")
    fitted = farcast_cli.fit("run", log_to=["jsonl:log"])
    done = farcast_cli.predict(fitted, horizon=100, log_to=["jsonl:log", "jsonl:file/log"])
    leapt = farcast_cli.leap("run", log_to=["jsonl:log"])
    assert [(line["command"], line["run"]) for line in lines_of(work / "log")] == [
        (n, "run") for n in ("fit", "predict", "leap")
    ]
    assert (fitted.unlogged, leapt.unlogged, len(done.unlogged)) == ((), (), 1)
    assert done.path is not None
    assert done.path.exists()


# --- services, without a network -------------------------------------------------------------------------------------


def test_wandb_logs_offline(work: Path) -> None:
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_cli("predict", "--horizon", 100, "--log-to", "wandb:tried", cwd=work, env=environment)
    assert (done.returncode, done.stdout) == (0, "forecasts/run/step_000900.safetensors\n")
    assert "caution" not in done.stderr
    (written,) = (work / "wandb").glob("offline-run-*/run-farcast-*.wandb")
    raw = written.read_bytes()
    assert all(f"farcast/{name}".encode() in raw for name in ("ratio", "coherence", "verdict", "step"))


@pytest.mark.filterwarnings("ignore")  # its database library warns of itself
def test_mlflow_logs_into_a_database(work: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    for command in (("fit", "run"), ("predict", "--horizon", 100)):
        done = run_cli(*command, "--log-to", "mlflow:sqlite:///log.db", cwd=work, env=environment)
        assert (done.returncode, "caution" in done.stderr) == (0, False), done
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{work}/log.db")
    (run,) = client.search_runs([client.get_experiment_by_name("farcast").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "farcast/coherence")] == [ORIGIN, ORIGIN]
    assert run.data.metrics["farcast/verdict"] == 1
