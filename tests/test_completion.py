"""Shell completion: what a shell asks, and what it gets, in no more time than the program needs to start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from farcast_cli.texts import names_of

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("numpy", "torch", "safetensors", "transformers")
PROGRAM = f"""\
import sys
sys.argv[0] = "farcast"
from farcast_cli.__main__ import main
try:
    main()
finally:
    sys.stderr.write(" ".join(name for name in {HEAVY!r} if name in sys.modules))
"""


def completed(line: str, cwd: Path = ROOT, shell: str = "bash") -> list[str]:
    """What completes the last word of a line; an empty word after a blank."""
    words = line.split(" ")
    asked = {"_FARCAST_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    asked |= {
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": words[-1],
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=cwd,
        env=os.environ | asked | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.split()


LINES = {
    "farcast pre": ["predict"],
    "farcast predict --lay": ["--layout"],
    "farcast predict --layout ": ["same", "safetensors", "pt", "dcp", "hub"],
    "farcast predict --layout sa": ["same", "safetensors"],
    "farcast predict ckpts --for ": ["resume", "evaluation"],
    "farcast leap ckpts --counters k": ["keep"],
    "farcast tune CKPT --method g": ["gauss-newton", "gradient-descent"],
    "farcast help e": ["evaluation", "exit-codes"],
    "farcast ci ": names_of("scripts"),
    "farcast verify one two three --ag": ["--against"],
    "farcast fit s3://bucket/run --st": ["--steps", "--step-from"],
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_an_option_or_its_value_is_completed_and_nothing_heavy_is_imported(line: str) -> None:
    assert completed(line) == LINES[line]


def test_a_wrong_file_of_defaults_does_not_stop_completion(tmp_path: Path) -> None:
    (tmp_path / "farcast.toml").write_text("predict = 3")
    assert completed("farcast predict --lay", cwd=tmp_path) == ["--layout"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same(shell: str) -> None:
    told = " ".join(completed("farcast predict --layout ", shell=shell))
    assert all(name in told for name in ("same", "safetensors", "pt", "dcp"))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_itself_completes_a_line(tmp_path: Path) -> None:
    (tmp_path / "farcast").write_text(f"#!{sys.executable}\nfrom farcast_cli.__main__ import main\nmain()\n")
    (tmp_path / "farcast").chmod(0o755)
    script = (
        'eval "$(_FARCAST_COMPLETE=source_bash farcast)"; COMP_WORDS=(farcast predict --layout sa); COMP_CWORD=3;'
        ' _farcast_completion farcast; printf "%s\\n" "${COMPREPLY[@]}"; complete -p farcast'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.split()[:2] == ["same", "safetensors"]
    assert "-F _farcast_completion farcast" in done.stdout
