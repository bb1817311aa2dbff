"""`make crash`: the whole sweep in several processes, its table, and what was wrong in words.

Each command's result is kept in a file, and taken from there while the code is the same: a sweep that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import farcast_cli
from tests.crash.commands import COMMANDS, Command, make_bases
from tests.crash.shim import build, why_not
from tests.crash.sweep import Swept, file_name, from_json, summary, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent.parent
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
SHOWN = 3  # examples of a fault in one column


def run_sweep(names: Sequence[str], home: Path, out: Path, *options: str) -> None:
    """Sweep over some commands in a process that is started with the shim; `home` holds it, the runs and the work."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("FARCAST_")}
    variables |= {"FARCAST_STATE_DIR": ""}  # a fault of the second ledger is no fault of the command
    variables |= {"LD_PRELOAD": str(home / "shim.so"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folders = [str(folder) for folder in (home / "bases", home / "work", out)]
    command = [sys.executable, "-m", "tests.crash.sweep", *folders, *options, "--", *names]
    subprocess.run(command, check=True, env=variables, stdin=subprocess.DEVNULL)


def prepare(home: Path) -> None:
    build(home)
    make_bases(home / "bases")


def place_for_work() -> Path | None:
    """Memory, where there is some: a sync to a disk takes its time, and no power is cut here."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None


def examples(results: Sequence[Swept]) -> Iterator[str]:
    """The first few cases in words for every fault and column."""
    for result in results:
        shown: dict[tuple[str, str], int] = {}
        for example in result.examples:
            key = example["fault"], example["column"]
            shown[key] = shown.get(key, 0) + 1
            if shown[key] <= SHOWN and not example["is_note"]:
                where = f"{example['fault']} at call {example['call']}, {example['kind']} {example['at']}"
                yield f"{result.name}: {where}: {example['column']}: {' '.join(example['what'].split())}"


def has_faults(results: Sequence[Swept]) -> bool:
    return any(not example["is_note"] for result in results for example in result.examples)


def fingerprint() -> str:
    """Of the code that is swept over, and of the sweep."""
    digest = hashlib.sha256()
    for folder in (Path(farcast_cli.__file__).parent, Path(__file__).parent):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _chosen(asked: argparse.Namespace) -> list[Command]:
    wanted = [command for command in COMMANDS if not asked.only or any(word in command.name for word in asked.only)]
    if not wanted:
        sys.exit(f"--only: expected a part of one of: {', '.join(command.name for command in COMMANDS)}")
    return wanted


def _options(asked: argparse.Namespace) -> list[str]:
    options = ["--few", str(asked.few)] if asked.few else []
    options += ["--every"] if asked.every else []
    return options + (["--until", str(time.monotonic() + asked.seconds)] if asked.seconds else [])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="commands whose name holds this; may be given again")
    parser.add_argument("--few", type=int, default=0, metavar="N", help="so many calls of each fault, not all")
    parser.add_argument("--every", action="store_true", help="equal calls in a row too, not the first, middle and last alone")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after this time; what is left is said")
    parser.add_argument("--again", action="store_true", help="forget what an earlier sweep found")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/out/crash", help="where the results are kept")
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    if reason := why_not():
        sys.exit(f"no sweep: {reason}")
    wanted, settings = _chosen(asked), f"{asked.few}-{asked.every}"
    out = asked.out / f"{fingerprint()[:12]}-{settings}"
    out.mkdir(parents=True, exist_ok=True)
    todo = [command for command in wanted if asked.again or not _is_done(out / file_name(command))]
    if todo:
        _sweep(todo, out, asked)
    _report([from_json((out / file_name(command)).read_text()) for command in wanted])


def _sweep(todo: Sequence[Command], out: Path, asked: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="farcast-crash-", dir=place_for_work()) as name:
        home = Path(name)
        prepare(home)
        options = _options(asked)
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda command: run_sweep([command.name], home, out, *options), todo))


def _is_done(result: Path) -> bool:
    return result.exists() and not from_json(result.read_text()).num_left


def _report(results: Sequence[Swept]) -> None:
    sys.stdout.write("\n".join(["", *table(results), "", *summary(results), "", *examples(results)]) + "\n")
    for result in results:
        if result.num_left:
            sys.stdout.write(f"{result.name}: {result.num_left} of {result.num_points} calls left out, the time was over\n")
    sys.exit(int(has_faults(results)))


if __name__ == "__main__":
    main()
