"""With a command to judge checkpoints, only what it prefers to the origin is published."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file

import farcast_cli
from farcast_cli.errors import UsageError
from farcast_cli.evaluation import command as command_module
from farcast_cli.evaluation.command import LOG_BYTES, Command, Log, Stop, Watch
from farcast_cli.evaluation.judge import Evaluator, Trial, best_trial, last_number
from farcast_cli.forecast.forecaster_file import load_fitted
from farcast_cli.prediction import predict
from farcast_cli.request import Request
from tests.conftest import PATIENCE_S, clean_environment, make_loose_run, popen_cli, tree_digest, wait_until
from tests.tiny import predict_run, write_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.conftest import CallCli, Done

STEPS = tuple(range(100, 900, 100))
LAST, STEP = 8.0, 2.0  # the last weight, and the step that 200 more steps of a straight path take
ALL = {"origin", "strength-1", "strength-0.5", "strength-0.25"}
LOGS = [
    "step_1000.safetensors.eval",
    *(f"step_1000.safetensors.eval/{name}.log" for name in ("origin", "strength-0.25", "strength-0.5", "strength-1")),
]
OUTPUT = ["step_1000.safetensors", "step_1000.safetensors.farcast.json"]
LEDGER = "ledger.jsonl"  # what may be resumed from


@pytest.fixture
def fitted(tmp_path: Path, call_cli: CallCli) -> Path:
    """A folder with a forecaster of a run whose weights rise by one from snapshot to snapshot."""
    write_run(tmp_path / "run", {"w": np.arange(1.0, 9.0)[:, None] * np.ones((1, 4))}, STEPS)
    assert call_cli("fit", "run", cwd=tmp_path).returncode == 0
    return tmp_path


def _script(folder: Path, *lines: str) -> str:
    """A command that judges a checkpoint by its first weight, `w`; it imports no library, which would take most of its time."""
    read = (
        *("import json, struct, sys", "raw = open(sys.argv[1], 'rb').read()", "begin = 8 + int.from_bytes(raw[:8], 'little')"),
        *("entry = json.loads(raw[8:begin])['w']", "assert entry['dtype'] == 'F32'"),
        "(w,) = struct.unpack_from('<f', raw, begin + entry['data_offsets'][0])",
    )
    (folder / "judge.py").write_text("\n".join([*read, *lines]))
    return f"{sys.executable} -I -S {folder / 'judge.py'} {{ckpt}}"


def _shell(folder: Path, *lines: str) -> str:
    """A command that is a small shell script."""
    (folder / "judge.sh").write_text("\n".join(lines) + "\n")
    return f"sh {folder / 'judge.sh'} {{ckpt}}"


def _arguments(command: str, *more: object) -> tuple[object, ...]:
    return ("predict", "--horizon", 200, "--method", "line", "--eval-cmd", command, *more)


def code_told(stdout: str) -> int:
    """The exit code in the one object that a call with --json prints where it fails."""
    code: int = json.loads(stdout)["error"]["code"]
    return code


def _predict(folder: Path, command: str, call_cli: CallCli, *more: object) -> Done:
    return call_cli(*_arguments(command, "--json", *more), cwd=folder)


def _log(folder: Path, name: str = "origin") -> str:
    return (folder / "forecasts" / "run" / "step_1000.safetensors.eval" / f"{name}.log").read_text()


def _left(folder: Path) -> list[str]:
    """Everything below the place for the run's forecasts, hidden files included, and the ledger."""
    place = folder / "forecasts"
    return sorted(name.removeprefix("run/") for name in tree_digest(place).keys() - {"run"}) if place.exists() else []


def _gone(pid_file: Path) -> bool:
    """Whether a process is no more; one that has ended and that nobody waits for counts as gone."""
    number = pid_file.read_text().strip()
    try:
        return not number or Path("/proc", number, "stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return True


def _all_gone(pids: Path) -> set[str]:
    """Wait until every process whose id is here is no more: one that was killed may be so a moment later. Their names."""
    wait_until(lambda: all(map(_gone, pids.iterdir())), "the command goes on")
    return {path.name for path in pids.iterdir()}


@pytest.mark.parametrize(
    ("target", "strength"), [(LAST + STEP, 1.0), (LAST + 0.5 * STEP, 0.5), (LAST + 0.25 * STEP, 0.25), (LAST + 50, 1.0)]
)
def test_the_best_strength_of_the_step_is_kept(target: float, strength: float, fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print('loss:', abs(w - {target}))"), call_cli)
    told = json.loads(done.stdout)
    assert done.returncode == 0
    written = load_file(fitted / "forecasts" / "run" / "step_1000.safetensors")["w"]
    np.testing.assert_allclose(written, LAST + strength * STEP, rtol=1e-6)  # float32
    assert _left(fitted) == [LEDGER, OUTPUT[0], *LOGS, OUTPUT[1]]
    assert told["path"] == "forecasts/run/step_1000.safetensors"
    sidecar = json.loads((fitted / "forecasts" / "run" / "step_1000.safetensors.farcast.json").read_text())
    assert [trial["strength"] for trial in sidecar["evaluations"]] == [0.0, 1.0, 0.5, 0.25]
    values = [trial["value"] for trial in sidecar["evaluations"]]
    assert values == pytest.approx([abs(LAST + share * STEP - target) for share in (0, 1, 0.5, 0.25)], rel=1e-5)


@pytest.mark.parametrize("target", [LAST, LAST - 1])
def test_a_forecast_that_is_not_better_than_the_origin_leaves_nothing(target: float, fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print(abs(w - {target}))"), call_cli)
    told = json.loads(done.stdout)
    assert done.returncode == 10
    assert (told["path"], told["verdict"]) == (None, "abstain")
    assert _left(fitted) == LOGS


def test_a_tie_goes_to_the_origin(fitted: Path, call_cli: CallCli) -> None:
    assert _predict(fitted, _script(fitted, "print(1.5)"), call_cli).returncode == 10
    assert _left(fitted) == LOGS


def test_even_if_worse_writes_the_full_step(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, "print(w)"), call_cli, "--even-if-worse")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert told["verdict"] == "abstain"  # as the command says
    assert told["unchanged_share"] == 0.0
    assert told["bytes_written"] == (fitted / "forecasts" / "run" / "step_1000.safetensors").stat().st_size
    written = load_file(fitted / "forecasts" / "run" / "step_1000.safetensors")["w"]
    np.testing.assert_allclose(written, LAST + STEP, rtol=1e-6)  # float32


@pytest.mark.parametrize(("target", "strength"), [(LAST + STEP, 1.0), (LAST + 0.5 * STEP, 0.5)])
def test_larger_is_better_when_that_is_said(target: float, strength: float, fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print('accuracy', -abs(w - {target}))"), call_cli, "--maximize")
    assert done.returncode == 0
    written = load_file(fitted / "forecasts" / "run" / "step_1000.safetensors")["w"]
    np.testing.assert_allclose(written, LAST + strength * STEP, rtol=1e-6)  # float32


@pytest.mark.parametrize(
    ("lines", "message", "run"),
    [
        (["print(1); sys.exit(3)"], "failed with exit code 3 on the origin: 1", "origin"),
        (["print(1); raise RuntimeError('no')"], "failed with exit code 1 on the origin: RuntimeError: no", "origin"),
        (["print(1); sys.exit(137)"], "failed with exit code 137 (SIGKILL) on the origin", "origin"),
        (["print('no figure here')"], "printed no number on the origin: no figure here", "origin"),
        (["pass"], "printed no number on the origin: it printed nothing", "origin"),
        (["print('9.5', file=sys.stderr)"], "printed no number on the origin: 9.5", "origin"),
        (["print(3.5, 'nan')"], "printed nan as its last number on the origin", "origin"),
        (["print('-inf')"], "printed -inf as its last number on the origin", "origin"),
        ([f"print(1 if w == {LAST} else 'nan')"], "printed nan as its last number on strength 1", "strength-1"),
        ([f"print(1 if w != {LAST + STEP / 4} else 'no')"], "printed no number on strength 0.25", "strength-0.25"),
        ([f"sys.exit(w != {LAST}) if w != {LAST} else print(1)"], "failed with exit code 1 on strength 1", "strength-1"),
    ],
)
def test_a_command_that_fails_or_says_no_number_publishes_nothing_and_its_log_is_named(
    lines: list[str], message: str, run: str, fitted: Path, call_cli: CallCli
) -> None:
    """Whether on the origin or on the forecast."""
    done = _predict(fitted, _script(fitted, *lines), call_cli)
    assert (done.returncode, code_told(done.stdout)) == (2, 2)
    assert message in done.errors[0]
    assert f"forecasts/run/step_1000.safetensors.eval/{run}.log; nothing was published" in done.hints[0]
    assert set(_left(fitted)) <= set(LOGS)
    assert f"step_1000.safetensors.eval/{run}.log" in _left(fitted)


def test_a_command_that_is_killed_by_a_signal_is_an_error_with_its_name(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, "echo 1; kill -SEGV $$ # {ckpt}", call_cli)
    assert (done.returncode, code_told(done.stdout)) == (2, 2)
    assert "was killed by SIGSEGV on the origin: 1" in done.errors[0]
    assert _left(fitted) == LOGS[:2]


def test_a_command_without_a_place_for_the_checkpoint_is_refused(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, "python3 eval.py", call_cli)
    assert done.returncode == 2
    assert "expected {ckpt}" in done.errors[0]


def test_each_of_several_horizons_is_judged_by_itself(fitted: Path, call_cli: CallCli) -> None:
    """Weight 9.1 is best: full for 100 steps (9.0), half for 200 (9.0), a quarter for 400 (9.0)."""
    command = _script(fitted, "print(abs(w - 9.1))")
    done = call_cli("predict", "--horizon", "100,200,400", "--method", "line", "--eval-cmd", command, cwd=fitted)
    assert done.returncode == 0
    for step in (900, 1000, 1200):
        written = load_file(fitted / "forecasts" / "run" / f"step_{step}.safetensors")["w"]
        np.testing.assert_allclose(written, 9.0, rtol=1e-6)  # float32
    assert done.stdout.splitlines() == [f"forecasts/run/step_{step}.safetensors" for step in (900, 1000, 1200)]


def test_a_command_that_fails_on_one_of_several_horizons_publishes_none(fitted: Path, call_cli: CallCli) -> None:
    command = _script(fitted, "print(9 - w) if w < 11 else sys.exit(1)")
    done = call_cli("predict", "--horizon", "100,400", "--method", "line", "--eval-cmd", command, cwd=fitted)
    assert (done.returncode, done.stdout) == (2, "")
    assert "failed with exit code 1 on strength 1" in done.errors[0]
    assert [name for name in _left(fitted) if not name.endswith(".log")] == [
        "step_1200.safetensors.eval",
        "step_900.safetensors.eval",
    ]


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("0.25", 0.25),
        ("loss 3.5 acc 0.75", 0.75),
        ("1e-3", 1e-3),
        ("-2.5E+2", -250.0),
        (".5", 0.5),
        ("12.", 12.0),
        ("step 100\nloss=2.125\n", 2.125),
        ("ppl: 7\n\n", 7.0),
        ("loss: 1_000 then 0.5%", 0.5),
        ("{'eval_loss': 0.4375}", 0.4375),
        ("loss 0.5, from step-100 of v2 in 12.5s", 0.5),
        ("loss 0.5 (torch 2.6.0+cpu)", 0.5),
        ("the loss is 0.5.", 0.5),
        ("\x1b[32m0.5\x1b[0m", 0.5),
        ("10%\r20%\r0.75", 0.75),
        ("-inf", -math.inf),
        ("info: banan", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_score_and_a_part_of_a_word_is_none(printed: str, value: float | None) -> None:
    assert last_number(printed) == value


@pytest.mark.parametrize(
    "command",
    [
        'cat "{ckpt}"',
        "cat '{ckpt}'",
        'sh -c "cat {ckpt}"',
        "cat \\{ckpt}",
        "cat <<X\n{ckpt}\nX",
        'echo "a" "b{ckpt}"',
        "cat `echo {ckpt}`",
    ],
)
def test_a_path_with_a_command_in_it_never_goes_between_quotes_of_the_users_own(tmp_path: Path, command: str) -> None:
    assert Evaluator(command).command_for(tmp_path / "plain") == command.replace("{ckpt}", f"{tmp_path}/plain")
    with pytest.raises(UsageError, match="inside quotes"):
        Evaluator(command).command_for(tmp_path / "run$(touch marker)")


@pytest.mark.parametrize("command", ["cat {ckpt}", 'python3 -c \'print(1)\' "a\\"b" {ckpt}', "echo it\\'s {ckpt} '{x}'"])
def test_a_path_with_a_command_in_it_is_quoted_outside_of_quotes(tmp_path: Path, command: str) -> None:
    place = tmp_path / "run$(touch marker)"
    place.mkdir()
    words = ["sh", "-c", Evaluator(command.replace("cat", "test -d")).command_for(place)]
    done = subprocess.run(words, cwd=tmp_path, check=False)
    assert not (tmp_path / "marker").exists()
    assert done.returncode == 0


def test_the_checkpoints_path_is_quoted_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b;exit 1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert Evaluator("cat {ckpt}").command_for(Path("it's")) == "cat '" + f"{folder}/it's".replace("'", "'\"'\"'") + "'"


def test_a_run_in_a_folder_with_an_odd_name_can_be_judged(tmp_path: Path, call_cli: CallCli) -> None:
    odd = tmp_path / "a b;exit 1 it's"
    write_run(odd / "run", {"w": np.arange(1.0, 9.0)[:, None] * np.ones((1, 4))}, STEPS)
    assert call_cli("fit", "run", cwd=odd).returncode == 0
    assert _predict(odd, "cd / && test -s {ckpt} && echo $FARCAST_STRENGTH", call_cli, "--maximize").returncode == 0
    assert _left(odd) == [LEDGER, OUTPUT[0], *LOGS, OUTPUT[1]]


def test_of_equal_trials_the_first_is_the_best() -> None:
    trials = [Trial(0.0, 2.0), Trial(1.0, 2.0), Trial(0.5, 1.0), Trial(0.25, 1.0)]
    assert best_trial(trials, maximize=False) == Trial(0.5, 1.0)
    assert best_trial(trials, maximize=True) == Trial(0.0, 2.0)
    assert math.isfinite(best_trial(trials, maximize=True).value)


# --- what a run of the command is given, and what is kept of it ------------------------------------------------------


def test_strength_value_seconds_and_log_of_every_run_are_told_and_kept(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, _script(fitted, f"print('to stderr', file=sys.stderr); print(abs(w - {LAST + STEP}))"), call_cli)
    told = json.loads(done.stdout)["evaluations"]
    assert [trial["strength"] for trial in told] == [0.0, 1.0, 0.5, 0.25]
    assert [trial["value"] for trial in told] == pytest.approx([STEP, 0, 0.5 * STEP, 0.75 * STEP], abs=1e-5)  # float32
    assert all(0 < trial["seconds"] < PATIENCE_S for trial in told)
    assert [trial["log"] for trial in told] == [f"forecasts/run/{LOGS[i]}" for i in (1, 4, 3, 2)]
    for trial in told:
        command, *said, _, remark = (fitted / trial["log"]).read_text().splitlines()
        assert command.startswith(f"$ {sys.executable}")
        assert sorted(said) == [str(trial["value"]), "to stderr"]  # which of two streams is read first is chance
        assert remark.startswith("[exit code 0, after ")
    sidecar = json.loads((fitted / "forecasts" / "run" / "step_1000.safetensors.farcast.json").read_text())
    assert sidecar["evaluations"] == [trial | {"log": trial["log"].removeprefix("forecasts/run/")} for trial in told]


def test_the_command_knows_what_it_judges_and_has_nothing_to_read(fitted: Path, call_cli: CallCli) -> None:
    lines = ["env | grep -E '^FARCAST_(STRENGTH|ORIGIN_STEP|VALID_STEP|JOB)=' | sort", "cat", 'echo "end: $FARCAST_STRENGTH"']
    assert _predict(fitted, _shell(fitted, *lines), call_cli, "--maximize").returncode == 0
    for name in ALL:
        strength = name.partition("-")[2] or "0"
        said = ["FARCAST_JOB=0", "FARCAST_ORIGIN_STEP=800", f"FARCAST_STRENGTH={strength}", "FARCAST_VALID_STEP=1000"]
        assert _log(fitted, name).splitlines()[1:6] == [*said, f"end: {strength}"]


def test_a_long_output_is_kept_by_its_start_and_its_end(fitted: Path, call_cli: CallCli) -> None:
    line = "x" * 99
    lines = ["print('the start')", f"for i in range(40000): print({line!r})", "print('loss', 100 - w)"]
    assert _predict(fitted, _script(fitted, *lines), call_cli).returncode == 0
    for name in ALL:
        log = _log(fitted, name)
        assert 2 * LOG_BYTES < len(log) < 2 * LOG_BYTES + 1000
        assert log.splitlines()[1] == "the start"
        assert log.splitlines()[-3].startswith("loss 9")
        assert log.splitlines()[-1].startswith("[exit code 0, after ")
        assert (
            f"[{len('the start') + 1 + 40000 * 100 + len(log.splitlines()[-3]) + 1 - 2 * LOG_BYTES} bytes are left out" in log
        )


def test_the_logs_of_an_earlier_forecast_are_replaced_and_nothing_else_in_their_folder(fitted: Path, call_cli: CallCli) -> None:
    assert _predict(fitted, _script(fitted, "print('first', 9 - w)"), call_cli).returncode == 0
    (fitted / "forecasts" / "run" / "step_1000.safetensors.eval" / "mine.txt").write_text("mine")
    done = _predict(fitted, _script(fitted, "sys.exit('second')"), call_cli, "--overwrite")
    assert done.returncode == 2
    mine, first = "step_1000.safetensors.eval/mine.txt", LOGS[:2]
    assert _left(fitted) == [LEDGER, OUTPUT[0], first[0], mine, first[1], OUTPUT[1]]
    assert "second" in _log(fitted)


def test_a_file_in_the_place_of_the_logs_is_an_output_error(fitted: Path, call_cli: CallCli) -> None:
    (fitted / "forecasts" / "run").mkdir(parents=True)
    (fitted / "forecasts" / "run" / "step_1000.safetensors.eval").write_text("mine")
    done = _predict(fitted, "echo 1 {ckpt}", call_cli)
    assert (done.returncode, code_told(done.stdout)) == (5, 5)
    assert "forecasts/run/step_1000.safetensors.eval: the logs of the evaluation command cannot be written" in done.errors[0]
    assert _left(fitted) == ["step_1000.safetensors.eval"]


def test_logs_that_would_lie_in_the_runs_folder_are_refused(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run.safetensors.eval")
    assert call_cli("fit", run, cwd=tmp_path).returncode == 0
    before = tree_digest(tmp_path)
    done = _predict(tmp_path, "echo 1 {ckpt}", call_cli, "-o", "run.safetensors")
    assert (done.returncode, code_told(done.stdout)) == (5, 5)
    assert "run.safetensors.eval: lies inside the run's folder" in done.errors[0]
    assert tree_digest(tmp_path) == before


def test_a_command_that_changes_the_forecast_publishes_nothing(fitted: Path, call_cli: CallCli) -> None:
    done = _predict(fitted, "test $FARCAST_STRENGTH = 0 || echo >> {ckpt}; echo 1", call_cli)
    assert (done.returncode, code_told(done.stdout)) == (2, 2)
    assert "changed the checkpoint at strength 1" in done.errors[0]
    assert "step_1000.safetensors" not in _left(fitted)


# --- time ------------------------------------------------------------------------------------------------------------

DEAF = "trap '' TERM INT HUP"
ENDLESS = ("sleep 1000 & echo $! > {pids}/$FARCAST_STRENGTH.child", "echo $$ > {pids}/$FARCAST_STRENGTH", "echo started; wait")


def _endless(folder: Path, *first: str) -> tuple[str, Path]:
    """A command without an end that starts another one, and the folder where both leave their process ids."""
    pids = folder / "pids"
    pids.mkdir()
    return _shell(folder, *first, *(line.format(pids=pids) for line in ENDLESS), "echo 1"), pids


@pytest.mark.parametrize("first", [(), (DEAF,)], ids=["willing", "deaf"])
def test_a_command_that_runs_over_its_time_is_killed_with_all_that_it_started(
    fitted: Path, call_cli: CallCli, first: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "GRACE_S", 0.2)
    command, pids = _endless(fitted, *first)
    for limit in (0.25, 4, 64):  # a busy machine may not have started the command by then
        done = _predict(fitted, command, call_cli, "--eval-timeout", limit)
        if "started" in _log(fitted).splitlines():
            break
    assert (done.returncode, code_told(done.stdout)) == (2, 2)
    assert f"ran over its {limit:g} s and was killed on the origin: started" in done.errors[0]
    assert "--eval-timeout" in done.hints[0]
    assert "killed for running over its time" in _log(fitted)
    assert _left(fitted) == ["step_1000.safetensors.eval", "step_1000.safetensors.eval/origin.log"]
    assert _all_gone(pids) == {"0", "0.child"}


def test_a_run_that_fails_ends_the_others(fitted: Path, call_cli: CallCli) -> None:
    command, pids = _endless(fitted, 'test "$FARCAST_STRENGTH" != 0.25 || exit 7')
    done = _predict(fitted, command, call_cli, "--jobs", 4)
    assert (done.returncode, code_told(done.stdout)) == (2, 2)
    assert "exit code 7 on strength 0.25" in done.errors[0]
    assert _left(fitted) == LOGS
    _all_gone(pids)


def test_what_a_command_leaves_running_ends_soon_after_it(
    fitted: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "LINGER_S", 0.2)
    (fitted / "pids").mkdir()
    command = f"sleep 1000 & echo $! > {fitted}/pids/$FARCAST_STRENGTH; echo 1 # {{ckpt}}"
    assert _predict(fitted, command, call_cli, "--jobs", 4).returncode == 10
    assert _all_gone(fitted / "pids") == {"0", "1", "0.5", "0.25"}


def test_what_a_pipe_still_prints_after_the_shell_has_ended_is_heard(
    fitted: Path, call_cli: CallCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "LINGER_S", PATIENCE_S)
    done = _predict(fitted, "(sleep 0.05; echo $FARCAST_STRENGTH) & # {ckpt}", call_cli, "--maximize")
    assert [trial["value"] for trial in json.loads(done.stdout)["evaluations"]] == [0, 1, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eval-timeout", 0), "--eval-timeout 0: expected a positive number of seconds"),
        (("--eval-timeout", "nan"), "--eval-timeout nan: expected a positive number of seconds"),
        (("--jobs", 0), "--jobs"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(
    options: Sequence[object], message: str, fitted: Path, call_cli: CallCli
) -> None:
    done = _predict(fitted, "echo 1 {ckpt}", call_cli, *options)
    assert done.returncode == 2
    assert message in done.errors[0]


# --- several at once -------------------------------------------------------------------------------------------------


def _meeting(folder: Path, others: int) -> str:
    """A command that ends well only where so many others run at the same time: each waits for all."""
    place = folder / "meeting"
    place.mkdir()
    lines = [
        "import os, pathlib, time",
        f"place, deadline = pathlib.Path({str(place)!r}), time.monotonic() + {PATIENCE_S}",
        "(place / f\"{os.environ['FARCAST_STRENGTH']} {os.environ['FARCAST_JOB']}\").touch()",
        f"while len(list(place.iterdir())) < {others + 1}:",
        "    assert time.monotonic() < deadline, 'nobody came'",
        "    time.sleep(0.01)",
        f"print(abs(w - {LAST + STEP}))",
    ]
    return _script(folder, *lines)


@pytest.mark.parametrize("jobs", [2, 4, 9])
def test_jobs_run_at_once(jobs: int, fitted: Path, call_cli: CallCli) -> None:
    done = call_cli(*_arguments(_meeting(fitted, min(jobs, 4) - 1), "--json"), cwd=fitted, env={"FARCAST_JOBS": str(jobs)})
    assert done.returncode == 0, done.stderr
    assert [trial["strength"] for trial in json.loads(done.stdout)["evaluations"]] == [0, 1, 0.5, 0.25]
    np.testing.assert_allclose(load_file(fitted / "forecasts" / "run" / "step_1000.safetensors")["w"], LAST + STEP, rtol=1e-6)
    assert _left(fitted) == [LEDGER, OUTPUT[0], *LOGS, OUTPUT[1]]
    places = dict(path.name.split() for path in (fitted / "meeting").iterdir())
    assert {places["0"], places["1"]} == {"0", "1"}
    assert set(places.values()) == {str(job) for job in range(min(jobs, 4))}


def test_one_job_runs_one_at_a_time(fitted: Path, call_cli: CallCli) -> None:
    lines = (f"mkdir {fitted}/alone || exit 9", "sleep 0.1", "echo $FARCAST_STRENGTH", f"rmdir {fitted}/alone")
    assert _predict(fitted, _shell(fitted, *lines), call_cli, "--maximize").returncode == 0


@pytest.mark.parametrize(("score", "more", "most"), [("9 - w", (), 2), ("w", (), 1), ("w", ("--even-if-worse",), 2)])
def test_on_disk_are_a_candidate_per_job_and_the_best_so_far(
    score: str, more: Sequence[str], most: int, fitted: Path, call_cli: CallCli
) -> None:
    lines = [
        "import os, pathlib",
        f"print('candidates:', len(list(pathlib.Path({str(fitted / 'forecasts')!r}).rglob('*.partial/*/step_1000.safetensors'))))",
        f"print({score})",
    ]
    _predict(fitted, _script(fitted, *lines), call_cli, *more)
    counts = [int(line.split()[1]) for name in ALL for line in _log(fitted, name).splitlines() if line.startswith("cand")]
    assert (len(counts), max(counts)) == (4, most)
    assert not [name for name in _left(fitted) if "partial" in name]


def test_several_jobs_write_the_same_bytes_as_one(fitted: Path) -> None:
    loaded, written = load_fitted(fitted / "forecaster.safetensors"), []
    for jobs in (1, 3):
        evaluator = Evaluator(_script(fitted, f"print(abs(w - {LAST + STEP / 2}))"), num_jobs=jobs)
        [outcome] = predict_run(loaded, f"{fitted / str(jobs)}/", horizons=[200], method="line", evaluator=evaluator)
        assert outcome.path is not None
        written.append(outcome.path.read_bytes())
    assert written[0] == written[1]


# --- interruptions ---------------------------------------------------------------------------------------------------


def _started(folder: Path, command: str, *more: object) -> subprocess.Popen[str]:
    """A real farcast that hears every signal, even where the tests run in the background or under `nohup`."""

    def hear() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return popen_cli(*_arguments(command, *more), cwd=folder, preexec_fn=hear)


def _wait_for_files(process: subprocess.Popen[str], folder: Path, num: int) -> None:
    """Until the commands of a farcast have written so many files, each of one line."""

    def are_there() -> bool:
        lines = [path.read_text() for path in folder.iterdir()]
        return len(lines) == num and all(line.endswith("\n") for line in lines)

    wait_until(lambda: are_there() or process.poll() is not None, "the command was not started, or not told to end")


def _end(process: subprocess.Popen[str]) -> str:
    """The stderr of a farcast that was interrupted."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.terminate()  # where it did not end: its commands would go on
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_evaluation_leaves_no_process_and_no_file_but_the_logs(
    fitted: Path, sent: signal.Signals, jobs: int
) -> None:
    command, pids = _endless(fitted)
    process = _started(fitted, command, "--jobs", jobs)
    _wait_for_files(process, pids, 2 * jobs)
    process.send_signal(sent)
    assert "interrupted" in _end(process)
    _all_gone(pids)
    assert _left(fitted) == (LOGS if jobs == 4 else LOGS[:2])
    assert "[interrupted, after" in _log(fitted)


def test_a_second_interrupt_does_not_wait_for_a_command_that_will_not_end(fitted: Path) -> None:
    told = fitted / "told"
    told.mkdir()
    command, pids = _endless(fitted, f"(trap 'echo end > {told}/$FARCAST_STRENGTH' TERM; sleep 1000 & wait) &", DEAF)
    process = _started(fitted, command, "--jobs", 2)
    _wait_for_files(process, pids, 4)
    process.send_signal(signal.SIGINT)
    _wait_for_files(process, told, 2)
    process.send_signal(signal.SIGINT)
    _end(process)
    _all_gone(pids)
    assert _left(fitted) == [LOGS[0], LOGS[1], LOGS[4]]
    assert all("[interrupted, after" in _log(fitted, name) for name in ("origin", "strength-1"))


@pytest.mark.parametrize("streams", ["", ">/dev/null 2>&1 <&-"])
def test_a_command_ends_with_its_children_when_farcast_is_killed(fitted: Path, streams: str) -> None:
    command, pids = _endless(fitted, f"(exec sleep 1000 {streams}) & echo $! > {fitted}/pids/deep", "sleep 0.1")
    process = _started(fitted, command)
    _wait_for_files(process, pids, 3)
    process.kill()
    process.communicate()
    assert _all_gone(pids) == {"0", "0.child", "deep"}


def test_what_does_not_end_when_it_is_told_to_is_ended_after_a_while(tmp_path: Path) -> None:
    deaf = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    script = f"import os; from farcast_cli.evaluation.command import Watch; Watch({{}}, grace_s=1); os.kill(os.getpid(), {signal.SIGKILL:d})"
    with subprocess.Popen(deaf, stdout=subprocess.PIPE, start_new_session=True) as stubborn:
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline() == b"ready\n"
        started = time.monotonic()
        environment = clean_environment() | {"PYTHONPATH": str(Path(farcast_cli.__file__).parent.parent)}
        subprocess.run([sys.executable, "-c", script.format(stubborn.pid)], env=environment, cwd=tmp_path, check=False)
        assert stubborn.wait(PATIENCE_S) == -signal.SIGKILL
        assert time.monotonic() - started >= 1


def test_the_watcher_ends_with_the_command_and_holds_no_stream_of_the_users(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "echo 1")
    run = Command("echo 1", log, {})
    watcher = run._watcher._process
    assert os.getsid(watcher.pid) == watcher.pid
    assert run.follow(None, Stop()).stdout == "1\n"
    assert watcher.returncode == -signal.SIGKILL
    run.close()
    log.close("over")


def test_a_watcher_of_a_group_that_has_ended_ends_too() -> None:
    ended = subprocess.Popen(["true"], start_new_session=True)
    ended.wait()
    watch = Watch(ended.pid)
    os.close(watch._end)
    assert watch._process.wait(PATIENCE_S) >= 0


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_progress_callback_hears_of_every_run_and_of_its_end(fitted: Path) -> None:
    heard: list[tuple[str, int]] = []

    def progress(phase: str, total: int) -> Callable[[int], None]:
        heard.append((phase, total))
        return lambda done: heard.append((phase, -1)) if not total and done else None

    request = Request((200,), method="line", output=f"{fitted}/", evaluator=Evaluator("echo 1 {ckpt} | cut -c1"))
    predict(load_fitted(fitted / "forecaster.safetensors"), request, progress)
    runs = ("the origin", "strength 1", "strength 0.5", "strength 0.25")
    assert [entry for entry in heard if entry[0].startswith("evaluate")] == [
        (f"evaluate {run}", number) for run in runs for number in (0, -1)
    ]


def test_a_person_sees_which_candidate_is_evaluated(fitted: Path) -> None:
    ours, theirs = pty.openpty()
    environment = clean_environment() | {"PYTHONPATH": str(Path(farcast_cli.__file__).parent.parent), "TERM": "xterm"}
    (fitted / "seen").mkdir()
    waits = (
        f"for _ in $(seq {10 * PATIENCE_S:.0f}); do test -e seen/$FARCAST_STRENGTH && break; sleep 0.1; done; echo 1 # {{ckpt}}"
    )
    command = [sys.executable, "-m", "farcast_cli", *map(str, _arguments(waits))]
    runs = {"the origin": "0", "strength 1": "1", "strength 0.5": "0.5", "strength 0.25": "0.25"}
    with subprocess.Popen(command, cwd=fitted, env=environment, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = bytearray()
        with suppress(OSError):  # the other end is closed
            while data := os.read(ours, 4096):
                shown += data
                for run, name in runs.items():
                    if f"evaluate {run}".encode() in shown:
                        (fitted / "seen" / name).touch()
    os.close(ours)
    assert process.returncode == 10
    assert {path.name for path in (fitted / "seen").iterdir()} == set(runs.values())
    assert b"0 bytes" not in shown
