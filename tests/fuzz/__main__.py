"""`make fuzz`: every target for so many seconds, and a table of how its cases ended.

A case that found something is made again by `--only TARGET --seed SEED --case NUMBER`, which leaves its file in `--keep`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.fuzz.harness import Harness, Tally, Watch, limit_memory
from tests.fuzz.targets import TARGETS, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENDS = ("read", "refused, 2", "refused, 3", "refused, 4", "refused, 5", "other exceptions")


def table(tallies: Sequence[Tally]) -> Iterator[str]:
    yield "| reader | cases | " + " | ".join(ENDS) + " | findings | slowest |"
    yield "| --- |" + " ---: |" * (len(ENDS) + 3)
    for tally in tallies:
        ends = " | ".join(str(tally.ended.get(end, 0)) for end in ENDS)
        found = sum(count for _, count in tally.findings.values())
        yield f"| {tally.name} | {tally.cases} | {ends} | {found} | {tally.slowest_s:.2f} s |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.0, help="for each target")
    parser.add_argument("--cases", type=int, default=0, help="of each target")
    parser.add_argument("--only", action="append", metavar="TEXT", help="targets whose name holds this; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, and keep its file")
    parser.add_argument("--keep", type=Path, default=Path("case"), help="where the file of --case goes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _keep(name: str, asked: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = make(name, Path(folder))
        asked.keep.write_bytes(Harness(Watch(), asked.seed).content(target, asked.case))


def main() -> None:
    asked = _arguments()
    names = [name for name in TARGETS if not asked.only or any(text in name for text in asked.only)]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch and numpy, on what is damaged
    if asked.case is not None:
        _keep(names[0], asked)
    folder = Path(tempfile.mkdtemp(prefix="farcast-fuzz-"))
    try:
        targets = [make(name, folder) for name in names]
        for target in targets:  # what is imported late is imported now
            with suppress(Exception):  # some have no good file
                target.read()
        limit_memory()
        harness, tallies = Harness(Watch(), asked.seed), []
        for target in targets:
            one = (
                {"cases": 1, "first": asked.case}
                if asked.case is not None
                else {"cases": asked.cases, "seconds": asked.seconds}
            )
            tallies.append(harness.run(target, **one))
            if not asked.json:
                sys.stderr.write(f"{target.name}: {tallies[-1].cases}\n")
    finally:
        shutil.rmtree(folder)
    _report(tallies, asked)


def _report(tallies: Sequence[Tally], asked: argparse.Namespace) -> None:
    if asked.json:
        sys.stdout.write(json.dumps([asdict(tally) for tally in tallies]) + "\n")
        return
    sys.stdout.write("\n".join(table(tallies)) + "\n")
    for tally in tallies:
        for finding, (first, count) in tally.findings.items():
            sys.stdout.write(f"{tally.name}: {finding}: {count} cases, the first --case {first} --seed {asked.seed}\n")
    sys.exit(int(any(tally.findings for tally in tallies)))


if __name__ == "__main__":
    main()
