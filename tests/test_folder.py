"""Each run has a folder of its own under `forecasts/`, and no run replaces what farcast wrote for another."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from farcast_cli.forecast.ledger import read_leaps
from tests.conftest import make_loose_run, tree_digest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli, Done

NAME = "step_000900.safetensors"
PREDICT = ("--horizon", 100, "-q")


def _two_runs(home: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        make_loose_run(home / name / "ckpts", seed=seed)


def _as_an_earlier_version(sidecar: Path) -> None:
    """A sidecar that names the origin and not the run."""
    content = json.loads(sidecar.read_text())
    del content["run"]
    sidecar.write_text(json.dumps(content))


def test_two_runs_of_one_name_forecast_into_folders_of_their_own(tmp_path: Path, call_cli: CallCli) -> None:
    _two_runs(tmp_path)
    for _ in range(2):  # the second time, each finds its own
        first = call_cli("predict", "a/ckpts", *PREDICT, cwd=tmp_path)
        second = call_cli("predict", "b/ckpts", *PREDICT, cwd=tmp_path)
        assert (first.returncode, first.stdout) == (0, f"forecasts/ckpts/{NAME}\n")
        assert (second.returncode, second.stdout) == (0, f"forecasts/b-ckpts/{NAME}\n")
    ledger = tmp_path / "forecasts" / "ledger.jsonl"
    for run, folder in (("a", "ckpts"), ("b", "b-ckpts")):
        (leap,) = read_leaps(ledger, tmp_path / run / "ckpts")
        assert leap.forecast == str((tmp_path / "forecasts" / folder / NAME).resolve())


def test_the_second_run_of_a_name_is_told_where_its_forecasts_are(tmp_path: Path, call_cli: CallCli) -> None:
    _two_runs(tmp_path)
    for command in (("predict", "{}", "--horizon", 100), ("leap", "{}", "--overwrite")):
        first, second = (call_cli(*(str(word).format(f"{run}/ckpts") for word in command), cwd=tmp_path) for run in ("a", "b"))
        said = "forecasts/ckpts has forecasts of another run: the forecasts of this run are in forecasts/b-ckpts"
        assert said not in first.stderr
        assert said in second.stderr


def test_a_run_keeps_its_folder_and_its_memory_when_the_other_runs_folder_is_gone(tmp_path: Path, call_cli: CallCli) -> None:
    _two_runs(tmp_path)
    for run in ("a", "b"):
        assert call_cli("leap", f"{run}/ckpts", cwd=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "forecasts" / "ckpts")
    again = json.loads(call_cli("leap", "b/ckpts", "--json", cwd=tmp_path).stdout)
    assert (again["again"], again["path"].startswith("forecasts/b-ckpts/")) == (True, True)
    assert call_cli("predict", "b/ckpts", *PREDICT, cwd=tmp_path).stdout == f"forecasts/b-ckpts/{NAME}\n"


def test_a_file_in_the_place_of_the_folder_is_named_as_one(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "x" / "run")
    (tmp_path / "forecasts").mkdir()
    (tmp_path / "forecasts" / "run").write_text("")
    done = call_cli("predict", run, "--horizon", 100, cwd=tmp_path)
    assert done.returncode == 0
    assert "forecasts/run is a file: the forecasts of this run are in forecasts/x-run" in done.stderr


def test_a_run_with_a_very_long_name_has_a_memory_and_kept_snapshots(tmp_path: Path, call_cli: CallCli) -> None:
    runs = [make_loose_run(tmp_path / home / ("x" * 250)) for home in ("a", "b")]
    for run in runs:
        for command in (("leap", run), ("keep", run)):
            done = call_cli(*command, cwd=tmp_path)
            assert done.returncode == 0, done
    assert len(list((tmp_path / "forecasts").glob("*/*.memory.safetensors"))) == 2
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_two_runs_of_one_name_have_a_memory_each(tmp_path: Path, call_cli: CallCli) -> None:
    _two_runs(tmp_path)
    assert call_cli("leap", "a/ckpts", cwd=tmp_path).returncode == 0
    before = tree_digest(tmp_path / "forecasts" / "ckpts")
    assert call_cli("leap", "b/ckpts", cwd=tmp_path).returncode == 0
    assert tree_digest(tmp_path / "forecasts" / "ckpts") == before
    assert (tmp_path / "forecasts" / "b-ckpts" / "ckpts.memory.safetensors").is_file()
    again = json.loads(call_cli("leap", "b/ckpts", "--json", cwd=tmp_path).stdout)
    assert (again["again"], again["path"].startswith("forecasts/b-ckpts/")) == (True, True)


def test_a_folder_that_is_itself_a_forecast_holds_no_others(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "x" / "run")
    (tmp_path / "forecasts" / "run").mkdir(parents=True)
    (tmp_path / "forecasts" / "run" / "farcast.json").write_text('{"farcast_version": "0"}')
    assert call_cli("predict", run, *PREDICT, cwd=tmp_path).stdout == f"forecasts/x-run/{NAME}\n"


def test_a_link_to_a_run_names_the_folder_of_the_run(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    (tmp_path / "latest").symlink_to("run")
    assert call_cli("predict", "latest", *PREDICT, cwd=tmp_path).stdout == f"forecasts/run/{NAME}\n"


# --- for evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-o", "out/"), ("--layout", "pt")])
def test_a_forecast_to_evaluate_and_one_to_resume_from_lie_side_by_side(
    options: tuple[str, ...], work: Path, call_cli: CallCli
) -> None:
    ending, folder = (".pt", "forecasts/run") if "pt" in options else (".safetensors", "out" if options else "forecasts/run")
    evaluate = call_cli("predict", *PREDICT, *options, "--for", "evaluation", cwd=work)
    resume = call_cli("predict", *PREDICT, *options, cwd=work)
    assert (evaluate.returncode, resume.returncode) == (0, 0)
    assert evaluate.stdout == f"{folder}/step_000900-eval{ending}\n"
    assert resume.stdout == f"{folder}/step_000900{ending}\n"
    checked = call_cli("verify", evaluate.stdout.strip(), "--against", resume.stdout.strip(), cwd=work)
    assert checked.returncode == 0, checked


# --- what is another run's stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("layout", ["same", "dcp"])
def test_a_forecast_of_another_run_stays_and_the_line_names_that_run(
    options: tuple[str, ...], layout: str, tmp_path: Path, call_cli: CallCli, *, is_old: bool
) -> None:
    _two_runs(tmp_path)
    out = ("-o", "out/", "--layout", layout)
    made = call_cli("predict", "a/ckpts", *PREDICT, *out, cwd=tmp_path).stdout.strip()
    if is_old:
        _as_an_earlier_version(tmp_path / (f"{made}.farcast.json" if layout == "same" else f"{made}/farcast.json"))
    before = tree_digest(tmp_path)
    done = call_cli("predict", "b/ckpts", *PREDICT, *out, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    other = (tmp_path / "a" / "ckpts").resolve()
    assert done.errors == [f"error: {made}: exists already, a forecast of another run, {other}"]
    assert "-o OUT" in done.hints[0]
    assert tree_digest(tmp_path) == before


def test_a_leap_replaces_no_forecast_of_another_run(tmp_path: Path, call_cli: CallCli) -> None:
    _two_runs(tmp_path)
    out = ("-o", "out/leap.safetensors", "--overwrite")
    assert call_cli("predict", "a/ckpts", *PREDICT, *out, cwd=tmp_path).returncode == 0
    done = call_cli("leap", "b/ckpts", *out, cwd=tmp_path)
    assert done.returncode == 5
    assert "out/leap.safetensors: exists already, a forecast of another run, " in done.errors[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"leap.safetensors", "leap.safetensors.farcast.json"}


def test_a_forecast_of_this_run_by_an_earlier_version_is_replaced(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", *PREDICT, cwd=work).returncode == 0
    _as_an_earlier_version(work / "forecasts" / "run" / f"{NAME}.farcast.json")
    done = call_cli("predict", *PREDICT, "--scale", 0.5, "--overwrite", cwd=work)
    assert (done.returncode, done.stdout) == (0, f"forecasts/run/{NAME}\n")


def test_the_run_and_its_forecasts_may_move_together(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "here" / "run")
    assert call_cli("predict", "run", *PREDICT, cwd=tmp_path / "here").returncode == 0
    (tmp_path / "here").rename(tmp_path / "there")
    done = call_cli("predict", "run", *PREDICT, cwd=tmp_path / "there")
    assert (done.returncode, done.stdout) == (0, f"forecasts/run/{NAME}\n")


# --- the places of earlier versions ----------------------------------------------------------------------------------


def _flat(home: Path, call_cli: CallCli) -> dict[str, Any]:
    """A leap whose memory lies in `forecasts/` itself, as an earlier version left it."""
    told: dict[str, Any] = json.loads(call_cli("leap", "run", "-o", "forecasts/", "--json", cwd=home).stdout)
    assert told["path"].startswith("forecasts/step_")
    return told


def test_a_loop_that_an_earlier_version_began_goes_on_from_its_memory(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    first = _flat(tmp_path, call_cli)
    again = json.loads(call_cli("leap", "run", "--json", cwd=tmp_path).stdout)
    assert (again["again"], again["path"]) == (True, first["path"])
    make_loose_run(tmp_path / "run", (900,))
    told = json.loads(call_cli("leap", "run", "--json", "--even-if-worse", cwd=tmp_path).stdout)
    assert told["stretches"] == first["stretches"] + 1
    assert told["path"].startswith("forecasts/step_000900")
    assert {path.name for path in tmp_path.rglob("*.memory.safetensors")} == {"run.memory.safetensors"}


def test_the_old_memory_of_another_run_is_left_alone(tmp_path: Path, call_cli: CallCli) -> None:
    make_loose_run(tmp_path / "run")
    _flat(tmp_path, call_cli)
    shutil.copytree(tmp_path / "run", tmp_path / "second" / "run")
    before = tree_digest(tmp_path / "forecasts").keys()
    told: Done = call_cli("leap", "second/run", "--json", cwd=tmp_path)
    assert json.loads(told.stdout)["path"].startswith("forecasts/run/")
    assert tree_digest(tmp_path / "forecasts").keys() > before


def test_fit_knows_a_leap_whose_forecast_lies_where_an_earlier_version_wrote_it(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", *PREDICT, "-o", "forecasts/", cwd=work).returncode == 0
    make_loose_run(work / "run", (1_000, 1_100, 1_200, 1_300))
    (leap,) = json.loads(call_cli("inspect", "run", "--json", cwd=work).stdout)["leaps"]
    assert leap["forecast"] == str((work / "forecasts" / NAME).resolve())
