"""What is printed where stdout or stderr is full, closed or gone, and how paths look that not every locale can spell."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from farcast_cli.forecast.ledger import read_leaps
from tests.conftest import clean_environment, make_torch_run, run_cli, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import CallCli

ROOT = Path(__file__).resolve().parent.parent
LOCALES: dict[str, dict[str, str]] = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
NAMES = {"no UTF-8": b"run\xff", "UTF-8": "rün🙂".encode()}
TO_900 = ("predict", "--horizon", "100", "-q")


def through_shell(
    script: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which `farcast` is this one."""
    start = f'farcast() {{ "{sys.executable}" -m farcast_cli "$@"; }}; {script}'
    variables = clean_environment() | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
    return subprocess.run(["sh", "-c", start], cwd=folder, env=variables, capture_output=True, check=False)


# --- streams ---------------------------------------------------------------------------------------------------------

FULL = Path("/dev/full")
PRINTS = {
    "a table": "inspect run",
    "JSON": "inspect run --json",
    "a path": "predict --horizon 100 -q",
    "help": "--help",
    "the version": "--version",
}


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("what", PRINTS)
def test_where_stdout_is_full_one_line_says_so_and_the_code_is_5(work: Path, what: str) -> None:
    done = through_shell(f"farcast {PRINTS[what]} >/dev/full", work)
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, len(lines)) == (5, 2), lines
    assert lines[0] == "error: stdout: the result cannot be printed: No space left on device"
    if what == "a path":
        assert (
            load_file(work / "forecasts/run/step_000900.safetensors").keys()
            == load_file(work / "run/step_000800.safetensors").keys()
        )


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_an_error_keeps_its_code_where_stdout_is_full(work: Path) -> None:
    done = through_shell("farcast inspect nowhere >/dev/full", work)
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


def test_stdout_that_is_closed_takes_everything(work: Path) -> None:
    done = through_shell("farcast predict --horizon 100 -q >&-; echo $?; farcast inspect run --json >&-; echo $?", work)
    assert (done.stdout, done.stderr) == (b"0\n0\n", b"")
    assert load_file(work / "forecasts/run/step_000900.safetensors")


@pytest.mark.parametrize("where", ["&-", "/dev/full"])
def test_what_stderr_does_not_take_changes_no_code(work: Path, where: str) -> None:
    if where == "/dev/full" and not FULL.exists():
        pytest.skip("no /dev/full here")
    done = through_shell(f"farcast inspect nowhere 2>{where}; echo $?; farcast fit run 2>{where}; echo $?", work)
    assert done.stdout == b"3\nforecaster.safetensors\n0\n"


def test_with_all_streams_closed_no_output_file_gets_their_number(work: Path) -> None:
    done = through_shell("farcast predict --horizon 100 <&- >&- 2>&-; echo $?", work)
    assert done.stdout == b"0\n"
    whole = work / "forecasts/run/step_000900.safetensors"
    assert through_shell("farcast predict --horizon 100 -q -o again.safetensors", work).returncode == 0
    assert whole.read_bytes() == (work / "again.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code"), [("inspect run", 0), ("inspect run --json", 0), ("predict --horizon 100 -q", 0)]
)
def test_a_reader_that_goes_away_changes_nothing(work: Path, arguments: str, code: int) -> None:
    done = through_shell(f"(sleep 0.2; farcast {arguments}; echo $? >code) | true", work)
    wait_until(lambda: (work / "code").exists() and (work / "code").read_text(), "the command did not end")
    assert (work / "code").read_text() == f"{code}\n"
    assert done.stderr == b""


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("what", NAMES)
def test_a_printed_path_is_the_very_bytes_of_the_name(work: Path, what: str, locale: str) -> None:
    run, home = os.fsencode(work) + b"/" + NAMES[what], b"out-" + NAMES[what]
    (work / "run").rename(os.fsdecode(run))
    script = b'set -e; f=$(farcast fit "$RUN" -q -o "$OUT/f"); farcast predict --forecaster "$f" --horizon 100 -q -o "$OUT/"'
    done = through_shell(script.decode(), work, LOCALES[locale] | {"RUN": os.fsdecode(NAMES[what]), "OUT": os.fsdecode(home)})
    assert (done.returncode, done.stdout, done.stderr) == (0, home + b"/step_000900.safetensors\n", b"")
    assert (work / os.fsdecode(done.stdout.strip())).is_file()


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize(("first", "second"), [("ASCII", "UTF-8"), ("UTF-8", "ASCII")])
def test_what_is_written_in_one_locale_is_read_in_another(work: Path, what: str, first: str, second: str) -> None:
    name = os.fsdecode(NAMES[what])
    (work / "run").rename(work / name)
    assert run_cli("fit", name, "-q", "--ledger", "leaps", cwd=work, env=LOCALES[first]).returncode == 0
    predicted = run_cli(
        *TO_900, "--ledger", "leaps", "-o", f"{name}.safetensors", cwd=work, env=LOCALES[second], errors="replace"
    )
    assert predicted.returncode == 0, predicted
    (leap,) = read_leaps(work / "leaps", work / name)
    assert Path(leap.forecast) == (work / f"{name}.safetensors").resolve()
    truth = work / name / "step_000700.safetensors"
    verified = run_cli("verify", f"{name}.safetensors", "--against", truth, "--json", cwd=work, env=LOCALES[first])
    assert verified.returncode == 0, verified
    told: dict[str, Any] = json.loads(verified.stdout)
    assert Path(told["reference"]).name == "step_000800.safetensors"
    fitted_again = run_cli("fit", name, "-q", "--ledger", "leaps", cwd=work, env=LOCALES[first], errors="replace")
    assert (fitted_again.returncode, fitted_again.stderr) == (0, "")


def test_a_path_with_a_newline_is_escaped_on_stdout_and_exact_in_json(work: Path) -> None:
    done = run_cli(*TO_900, "-o", "two\nlines.safetensors", cwd=work)
    assert (done.returncode, done.stdout) == (0, "two\\nlines.safetensors\n")
    assert "--json" in done.stderr
    assert done.stderr.count("\n") == 1
    told = run_cli(*TO_900, "-o", "two\nlines.safetensors", "--overwrite", "--json", cwd=work)
    assert json.loads(told.stdout)["path"] == "two\nlines.safetensors"


def test_an_interrupt_while_the_command_is_imported_is_one_line_and_code_130(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from farcast_cli.__main__ import main\n"
        "main()\n"
    )
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted: nothing has been done\n")


def test_a_terminal_is_never_sent_what_it_would_obey(work: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "farcast_cli", *TO_900, "-o", "\x1b[2J\udcff.safetensors"]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=work, env=environment, stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 65536)
    os.close(ours)
    assert done.returncode == 0
    assert b"\x1b[2J" not in shown
    assert b"\\x1b[2J\\udcff.safetensors" in shown


def test_a_torch_checkpoint_may_bear_a_name_that_is_no_text(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_torch_run(tmp_path / "run\udcff")
    assert call_cli("fit", run.name, "-q", "--json", cwd=tmp_path).returncode == 0
    command = ("predict", "--horizon", 10, "--even-if-worse", "-q", "-o", "\udcfe_90.pt", "--eval-cmd", "echo 1 # {ckpt}")
    done = run_cli(*command, cwd=tmp_path, errors="surrogateescape")
    assert (done.returncode, done.stdout) == (0, "\udcfe_90.pt\n"), done
    log = tmp_path / "\udcfe_90.pt.eval" / "origin.log"
    assert b"run\xff" in log.read_bytes()


def test_a_snapshot_whose_name_is_no_text_is_refused_by_its_name(work: Path) -> None:
    (work / "run/step_000800.safetensors").rename(work / "run/step_000800\udcff.safetensors")
    done = run_cli("inspect", "run", cwd=work)
    assert (done.returncode, done.hints) == (3, ["hint: rename it"])
    assert "step_000800\\udcff.safetensors" in done.errors[0]


def test_a_locale_without_bars_gets_plain_ones(work: Path) -> None:
    done = run_cli("backtest", "--horizon", "100", "-v", cwd=work, env=LOCALES["ASCII"])
    assert done.returncode == 0
    assert "####" in done.stdout
    assert done.stdout.isascii()
