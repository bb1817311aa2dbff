"""What farcast says of a run, its exit code and its JSON are one verdict, and every command has the same."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import STEPS, loose_name, make_loose_run, make_turning_run, weights_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import CallCli, Done

TITLES = {"forecast": "LEAP", "abstain": "KEEP TRAINING", "untestable": "KEEP TRAINING"}


@dataclass(frozen=True)
class Kind:
    """A run, what is asked of it, and what every command must say."""

    verdict: str
    options: tuple[object, ...] = ()
    title: str = ""
    is_written: bool = False


def ended(folder: Path, *, at: int = STEPS[-1]) -> None:
    for step in STEPS:
        torch.save({"model": weights_at(step), "step": step, "args": {"max_steps": at}}, folder / f"step_{step}.pt")


def nearly_ended(folder: Path) -> None:
    ended(folder, at=STEPS[-1] + 60)


def farther(folder: Path) -> None:
    """A steady direction under so much noise that the weights ahead are farther from the later ones."""
    for step in STEPS:
        path, noise = weights_at(step), torch.Generator().manual_seed(step)
        save_file(
            {name: value + 0.17 * torch.randn(value.shape, generator=noise) for name, value in path.items()},
            folder / loose_name(step),
        )


KINDS: dict[str, tuple[Callable[[Path], object], Kind]] = {
    "forecast": (make_loose_run, Kind("forecast", is_written=True)),
    "refused": (make_turning_run, Kind("abstain")),
    "untestable": (make_loose_run, Kind("untestable", ("--horizon", 5000))),
    "forced": (make_turning_run, Kind("abstain", ("--even-if-worse",), is_written=True)),
    "forced beyond the test": (make_loose_run, Kind("untestable", ("--horizon", 5000, "--even-if-worse"), is_written=True)),
    "over": (ended, Kind("abstain", title="DO NOT LEAP")),
    "near the end": (nearly_ended, Kind("forecast", is_written=True)),
}


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Kind]:
    make, kind = KINDS[request.param]
    (tmp_path / "run").mkdir()
    make(tmp_path / "run")
    return tmp_path, kind


def titles_in(text: str) -> list[str]:
    return re.findall(r"^(?:farcast predict would say: )?(LEAP|KEEP TRAINING|DO NOT LEAP)\b", text, re.MULTILINE)


def answer(done: Done) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_predict_says_one_thing_in_words_by_its_exit_code_and_in_json(case: tuple[Path, Kind], call_cli: CallCli) -> None:
    work, kind = case
    text = call_cli("predict", "run", *kind.options, cwd=work)
    said = answer(call_cli("predict", "run", *kind.options, "--json", cwd=work))
    title = kind.title or TITLES[kind.verdict]
    assert titles_in(text.stderr)[-1] == title
    assert said["verdict"] == kind.verdict
    assert (text.returncode == 0, bool(text.stdout), said["path"] is not None) == (kind.is_written,) * 3
    assert text.returncode in {0, 10}
    assert ("nothing written" in text.stderr) == (not kind.is_written)
    assert ("although the verdict is against it" in text.stderr) == (kind.is_written and kind.verdict != "forecast")


def test_every_command_says_of_a_run_what_predict_says(case: tuple[Path, Kind], call_cli: CallCli) -> None:
    work, kind = case
    if kind.options:
        pytest.skip("they take no horizon, and force nothing")
    title, is_for = kind.title or TITLES[kind.verdict], kind.verdict == "forecast"
    fitted = call_cli("fit", "run", cwd=work)
    assert titles_in(fitted.stderr) == [title]
    assert ("next: farcast predict, or" in fitted.stderr) == is_for
    assert ("keep training" in fitted.stderr.splitlines()[-1]) == (title == "KEEP TRAINING")
    predicted = answer(call_cli("predict", "run", "--dry-run", "--json", cwd=work))
    tested = answer(call_cli("backtest", "--horizon", predicted["horizon"], "--json", cwd=work))
    assert (tested["verdict"], predicted["verdict"]) == (kind.verdict, kind.verdict)
    table = call_cli("backtest", "--horizon", predicted["horizon"], cwd=work).stdout
    assert f"horizon {predicted['horizon']}, blend: {kind.verdict}" in table
    assert ("predict writes this" in table, "predict writes none" in table) == (is_for, not is_for)
    assert titles_in(call_cli("report", "--text", cwd=work).stdout) == [title]
    told = answer(call_cli("report", "--json", cwd=work))
    assert (told["title"].upper().startswith(title), told["forecast"]["verdict"]) == (True, kind.verdict)
    lines = call_cli("watch", "run", "--once", "--interval", 0.01, "--json", cwd=work).stdout.splitlines()
    (judged,) = [one for line in lines if (one := json.loads(line))["event"] == "judged"]
    assert (judged["verdict"], judged["words"].upper().startswith(title)) == (kind.verdict, True)


def test_a_back_test_promises_no_forecast_beyond_the_end_of_the_run(tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "run").mkdir()
    nearly_ended(tmp_path / "run")
    done = call_cli("backtest", "run", "--horizon", "50,100", "--json", cwd=tmp_path)
    assert answer(done)["verdict"] == {"50": "forecast", "100": "abstain"}
    assert call_cli("predict", "run", "--horizon", 100, cwd=tmp_path).returncode == 2
    shown = call_cli("backtest", "run", "--horizon", 100, cwd=tmp_path).stdout
    assert "abstain (the run ends at step 860: a leap must end before that)" in shown
    assert "predict writes none" in shown


def test_leap_says_one_thing_in_words_by_its_exit_code_and_in_json(case: tuple[Path, Kind], call_cli: CallCli) -> None:
    work, kind = case
    forced = [option for option in kind.options if option == "--even-if-worse"]
    done = call_cli("leap", "run", *forced, cwd=work)
    said = answer(call_cli("leap", "run", *forced, "--json", cwd=work))
    is_leap = done.returncode == 0
    assert done.returncode in {0, 10}
    assert (": no leap: " in done.stderr, "go on from" in done.stderr) == (not is_leap, not is_leap)
    assert (said["verdict"], said["path"] is not None, bool(done.stdout)) == (
        "forecast" if is_leap else "abstain",
        is_leap,
        is_leap,
    )
    assert is_leap or not forced


def test_numbers_that_speak_against_a_leap_come_with_what_decides(tmp_path: Path, call_cli: CallCli) -> None:
    (tmp_path / "run").mkdir()
    farther(tmp_path / "run")
    said = answer(call_cli("predict", "run", "--dry-run", "--json", cwd=tmp_path))
    assert said["verdict"] == "forecast"
    assert said["expected_ratio"] > 1
    for command, *more in (("fit", "run"), ("predict", "run", "--dry-run"), ("report", "run", "--text")):
        done = call_cli(command, *more, cwd=tmp_path)
        words = " ".join((done.stdout + done.stderr).split())
        assert "Its weights are farther from the later ones at first; the direction decides." in words
    assert re.search(r"expected error +1\.\d+ +S and p decide", done.stdout)
