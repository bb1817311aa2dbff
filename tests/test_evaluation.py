"""With a command to judge checkpoints, only what it prefers to the origin is published."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file

from farcast_cli.errors import UsageError
from farcast_cli.evaluation import Evaluator, Trial, best_trial
from tests.tiny import write_run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import CallCli, Done

STEPS = tuple(range(100, 900, 100))
LAST, STEP = 8.0, 2.0  # the last weight, and the step that 200 more steps of a straight path take


@pytest.fixture
def fitted(tmp_path: Path, call_cli: CallCli) -> Path:
    """A folder with a forecaster of a run whose weights rise by one from snapshot to snapshot."""
    write_run(tmp_path / "run", {"w": np.arange(1.0, 9.0)[:, None] * np.ones((1, 4))}, STEPS)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    return tmp_path


def _script(folder: Path, *lines: str) -> str:
    """A command that judges a checkpoint by its first weight, `w`."""
    text = "\n".join(
        ["import sys", "from safetensors.numpy import load_file", "w = float(load_file(sys.argv[1])['w'][0])", *lines]
    )
    (folder / "judge.py").write_text(text)
    return f"{sys.executable} {folder / 'judge.py'} {{ckpt}}"


def _predict(folder: Path, command: str, call_cli: CallCli, *more: str) -> Done:
    return call_cli("predict", "--horizon", 200, "--method", "line", "--eval-cmd", command, "--json", *more, cwd=folder)


def _left(folder: Path) -> list[str]:
    """Everything below the place for forecasts, hidden files included."""
    place = folder / "forecasts"
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*")) if place.exists() else []


@pytest.mark.parametrize(
    ("target", "strength"), [(LAST + STEP, 1.0), (LAST + 0.5 * STEP, 0.5), (LAST + 0.25 * STEP, 0.25), (LAST + 50, 1.0)]
)
def test_the_best_strength_of_the_step_is_kept(target: float, strength: float, fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print('loss:', abs(w - {target}))"), call_cli)
    told = json.loads(done.stdout)
    assert done.returncode == 0
    written = load_file(fitted / "forecasts" / "step_1000.safetensors")["w"]
    np.testing.assert_allclose(written, LAST + strength * STEP, rtol=1e-6)  # float32
    assert _left(fitted) == ["step_1000.farcast.json", "step_1000.safetensors"]
    assert told["path"] == "forecasts/step_1000.safetensors"
    sidecar = json.loads((fitted / "forecasts" / "step_1000.farcast.json").read_text())
    assert [trial["strength"] for trial in sidecar["evaluations"]] == [0.0, 1.0, 0.5, 0.25]
    values = [trial["value"] for trial in sidecar["evaluations"]]
    assert values == pytest.approx([abs(LAST + share * STEP - target) for share in (0, 1, 0.5, 0.25)], rel=1e-5)


@pytest.mark.parametrize("target", [LAST, LAST - 1])
def test_a_forecast_that_is_not_better_than_the_origin_leaves_nothing(target: float, fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print(abs(w - {target}))"), call_cli)
    told = json.loads(done.stdout)
    assert done.returncode == 10
    assert (told["path"], told["verdict"]) == (None, "abstain")
    assert _left(fitted) == []


def test_a_tie_goes_to_the_origin(fitted: Path, call_cli: CallCli) -> None:
    assert _predict(fitted, _script(fitted, "print(1.5)"), call_cli).returncode == 10
    assert _left(fitted) == []


def test_even_if_worse_writes_the_full_step(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, "print(w)"), call_cli, "--even-if-worse")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert told["verdict"] == "abstain"  # as the command says
    assert told["unchanged_share"] == 0.0
    assert told["bytes_written"] == (fitted / "forecasts" / "step_1000.safetensors").stat().st_size
    written = load_file(fitted / "forecasts" / "step_1000.safetensors")["w"]
    np.testing.assert_allclose(written, LAST + STEP, rtol=1e-6)  # float32


@pytest.mark.parametrize(("target", "strength"), [(LAST + STEP, 1.0), (LAST + 0.5 * STEP, 0.5)])
def test_larger_is_better_when_that_is_said(target: float, strength: float, fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print('accuracy', -abs(w - {target}))"), call_cli, "--maximize")
    assert done.returncode == 0
    written = load_file(fitted / "forecasts" / "step_1000.safetensors")["w"]
    np.testing.assert_allclose(written, LAST + strength * STEP, rtol=1e-6)  # float32


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["print(1); sys.exit(3)"], "failed with exit code 3"),
        (["raise RuntimeError('no')"], "failed with exit code 1"),
        (["print('no figure here')"], "printed no finite number"),
        (["pass"], "printed no finite number"),
        (["print(3.5, 'nan')"], "printed no finite number"),
        (["print('-inf')"], "printed no finite number"),
        ([f"print(1 if w == {LAST} else 'nan')"], "printed no finite number"),
        ([f"sys.exit(w != {LAST}) if w != {LAST} else print(1)"], "failed with exit code 1"),
    ],
)
def test_a_command_that_fails_or_says_no_number_publishes_nothing(
    lines: list[str], message: str, fitted: Path, call_cli: CallCli
) -> None:
    """Whether on the origin or on the forecast."""
    done = _predict(fitted, _script(fitted, *lines), call_cli)
    assert done.returncode == 2
    assert message in done.errors[0]
    assert done.stdout == ""
    assert _left(fitted) == []


def test_a_command_without_a_place_for_the_checkpoint_is_refused(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, "python eval.py", call_cli)
    assert done.returncode == 2
    assert "expected {ckpt}" in done.errors[0]


def test_each_of_several_horizons_is_judged_by_itself(fitted: Path, call_cli: CallCli) -> None:
    """Weight 9.1 is best: full for 100 steps (9.0), half for 200 (9.0), a quarter for 400 (9.0)."""
    command = _script(fitted, "print(abs(w - 9.1))")
    done = call_cli("predict", "--horizon", "100,200,400", "--method", "line", "--eval-cmd", command, cwd=fitted)
    assert done.returncode == 0
    for step in (900, 1000, 1200):
        written = load_file(fitted / "forecasts" / f"step_{step}.safetensors")["w"]
        np.testing.assert_allclose(written, 9.0, rtol=1e-6)  # float32
    assert done.stdout.splitlines() == [f"forecasts/step_{step}.safetensors" for step in (900, 1000, 1200)]


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("0.25", 0.25),
        ("loss 3.5 acc 0.75", 0.75),
        ("1e-3", 1e-3),
        ("-2.5E+2", -250.0),
        (".5", 0.5),
        ("12.", 12.0),
        ("step 100\\nloss=2.125\\n", 2.125),
        ("ppl: 7\\n\\n", 7.0),
        ("loss: 1_000 then 0.5%", 0.5),
        ("{'eval_loss': 0.4375}", 0.4375),
    ],
)
def test_the_last_number_on_stdout_is_the_score(printed: str, value: float, tmp_path: Path) -> None:
    assert Evaluator(f"printf '%b' \"{printed}\" # {{ckpt}}").score(tmp_path) == value


def test_the_checkpoints_path_is_quoted_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b;exit 1"
    folder.mkdir()
    (folder / "it's").write_text("0.5")
    monkeypatch.chdir(folder)
    from pathlib import Path as Relative

    assert Evaluator("cd / && cat {ckpt}").score(Relative("it's")) == 0.5


def test_numbers_on_stderr_are_not_the_score(tmp_path: Path) -> None:
    assert Evaluator("echo 1.5; echo 9.5 >&2 # {ckpt}").score(tmp_path) == 1.5
    with pytest.raises(UsageError):
        Evaluator("echo 9.5 >&2 # {ckpt}").score(tmp_path)


def test_of_equal_trials_the_first_is_the_best() -> None:
    trials = [Trial(0.0, 2.0), Trial(1.0, 2.0), Trial(0.5, 1.0), Trial(0.25, 1.0)]
    assert best_trial(trials, maximize=False) == Trial(0.5, 1.0)
    assert best_trial(trials, maximize=True) == Trial(0.0, 2.0)
    assert math.isfinite(best_trial(trials, maximize=True).value)
