"""The same command twice: the same path, exit code 0, and nothing is written; anything else in its place stays and is named."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import loose_name, make_loose_run, tree_digest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli

OUT = "forecasts/run/step_000900.safetensors"


def stamps(folder: Path) -> dict[str, int]:
    """When each file was last written to, and that it is the same file."""
    return {str(path): path.stat().st_mtime_ns + path.stat().st_ino for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "options",
    [
        ("--horizon", "100"),
        (),
        ("--horizon", "100,200"),
        ("--horizon", "100", "--method", "line", "--scale", "0.5", "--layout", "pt", "--clock", "steps"),
        ("--for", "evaluation"),
        ("--horizon", "5000", "--even-if-worse", "--dtype", "bfloat16"),
        ("run", "--horizon", "100"),
    ],
)
def test_the_same_command_twice_gives_the_same_path_and_writes_nothing(
    options: tuple[str, ...], work: Path, call_cli: CallCli
) -> None:
    first = call_cli("predict", *options, cwd=work)
    before = stamps(work)
    second = call_cli("predict", *options, cwd=work)
    assert (first.returncode, second.returncode) == (0, 0), second
    assert second.stdout == first.stdout
    assert "already there, made from the same snapshots with the same options: nothing was written" in second.stderr
    assert stamps(work) == before


def test_json_says_that_it_was_there_and_only_then(work: Path, call_cli: CallCli) -> None:
    first, second = (json.loads(call_cli("predict", "--horizon", 100, "--json", cwd=work).stdout) for _ in range(2))
    assert "existed" not in first
    changed = {"existed": True, "bytes_read": 0, "bytes_written": 0, "seconds": 0.0, "unchanged_share": None}
    assert second == first | changed


def test_of_several_horizons_only_the_missing_ones_are_written(work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 100, cwd=work).returncode == 0
    before = {name: stamp for name, stamp in stamps(work / "forecasts").items() if "step_000900" in name}
    assert call_cli("predict", "--horizon", "100,200", "-o", "forecasts/", cwd=work).returncode == 0
    after = stamps(work / "forecasts")
    assert {name: after[name] for name in before} == before
    assert call_cli("predict", "--horizon", 200, "-o", "fresh/", cwd=work).returncode == 0
    name = "step_001000.safetensors"
    assert (work / "forecasts" / name).read_bytes() == (work / "fresh" / name).read_bytes()


def test_the_evaluation_is_not_run_again(work: Path, call_cli: CallCli) -> None:
    (work / "count.sh").write_text('echo x >> "$1"; case "$2" in *forecasts*) echo 1;; *) echo 2;; esac\n')
    options = ("--horizon", 100, "--eval-cmd", f"sh {work}/count.sh {work}/calls {{ckpt}}", "--json")
    first = json.loads(call_cli("predict", *options, cwd=work).stdout)
    calls = (work / "calls").read_text()
    second = call_cli("predict", *options, cwd=work)
    assert (second.returncode, (work / "calls").read_text()) == (0, calls)
    assert json.loads(second.stdout)["evaluations"] == first["evaluations"] != []
    without = call_cli("predict", "--horizon", 100, cwd=work)
    assert (without.returncode, without.errors) == (5, [f"error: {OUT}: exists already, made with --eval-cmd"])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("--horizon", 200), ("--horizon", 100), "made with --horizon 200"),
        (("--horizon", 100, "--method", "line"), ("--horizon", 100), "made with --method line"),
        (("--horizon", 100), ("--horizon", 100, "--step-norm", "free"), "made with no --step-norm"),
        (("--horizon", 100, "--scale", 0.5), ("--horizon", 100), "made with --scale 0.5"),
        (("--horizon", 5000, "--even-if-worse"), ("--horizon", 100), "made with --horizon 5000, --even-if-worse"),
        (("--horizon", 100), ("run", "--exclude", "norm*", "--horizon", 100), "made from other snapshots or other tensors"),
        (("run", "--steps", "200:", "--horizon", 100), ("--horizon", 100), "made from other snapshots or other tensors"),
        (("--horizon", 100, "--origin", 700), ("--horizon", 100), "made with --origin 700"),
    ],
)
def test_what_was_made_in_another_way_stays_and_the_difference_is_named(
    first: tuple[Any, ...], second: tuple[Any, ...], words: str, work: Path, call_cli: CallCli
) -> None:
    assert call_cli("predict", *first, "-o", "a.safetensors", cwd=work).returncode == 0
    before = stamps(work)
    done = call_cli("predict", *second, "-o", "a.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.errors == [f"error: a.safetensors: exists already, {words}"]
    assert stamps(work) == before


@pytest.mark.parametrize("what", ["forecast", "sidecar", "no sidecar", "snapshot", "side file", "half a sidecar"])
def test_a_sidecar_that_does_not_match_the_files_is_not_trusted(what: str, work: Path, call_cli: CallCli) -> None:
    assert call_cli("predict", "--horizon", 100, cwd=work).returncode == 0
    forecast, sidecar = work / OUT, work / f"{OUT}.farcast.json"
    if what == "forecast":
        raw = bytearray(forecast.read_bytes())
        raw[-1] ^= 1
        forecast.write_bytes(raw)
    elif what == "snapshot":
        os.utime(work / "run" / loose_name(800))
    elif what == "no sidecar":
        sidecar.unlink()
    elif what == "half a sidecar":
        sidecar.write_text(sidecar.read_text()[:200])
    else:
        content = json.loads(sidecar.read_text())
        content["files" if what == "side file" else "ratio"] = [] if what == "side file" else 0.125
        sidecar.write_text(json.dumps(content))
    before = tree_digest(work)
    done = call_cli("predict", "--horizon", 100, cwd=work)
    assert (done.returncode, done.stdout) == (5, "")
    assert "exists already" in done.errors[0]
    assert tree_digest(work) == before


def test_fit_says_when_it_replaces_the_forecaster_of_another_run(work: Path, call_cli: CallCli) -> None:
    make_loose_run(work / "second", seed=1)
    assert "another run" not in call_cli("fit", "run", cwd=work).stderr
    told = call_cli("fit", "second", cwd=work)
    assert told.returncode == 0
    assert "note: forecaster.safetensors is the forecaster of another run, run: it is replaced" in told.stderr
