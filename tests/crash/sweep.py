"""One command, struck at many of its calls by many faults; and what came of it, in numbers and in words.

`LD_PRELOAD=shim.so python -m tests.crash.sweep BASES WORK OUT NAME...` is the process that does it; see `__main__.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.crash.child import Caller, Done, import_everything
from tests.crash.commands import COMMANDS, Command
from tests.crash.judge import COLUMNS, NOTES, Judge, State, Verdict
from tests.crash.shim import FAULTS, Call, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_EXAMPLES = 400


@dataclass(slots=True)
class Tally:
    """A fault at the calls of one command: the number of cases, and of those with something wrong, by column."""

    cases: int = 0
    found: dict[str, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        for column, number in other.found.items():
            self.found[column] = self.found.get(column, 0) + number


@dataclass(slots=True)
class Swept:
    """A command's part of the table, the cases in words, and the calls of a run that nothing struck."""

    name: str
    work: str
    tallies: dict[str, Tally] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    """What was there before."""
    made: list[str] = field(default_factory=list)
    """What is published, each as one."""
    num_points: int = 0
    num_left: int = 0
    seconds: float = 0.0


class Stage:
    """A command's work folder, which is put back after every call."""

    def __init__(self, command: Command, bases: Path, home: Path) -> None:
        shutil.rmtree(home, ignore_errors=True)
        self.work = home / "work"
        shutil.copytree(bases / command.base, self.work)
        self._args, self._caller = command.args, Caller(self.work)
        for args in command.before:
            _expect(0, self._caller.plain(args), args)
        self.before = State.of(self.work)
        self._template = home / "template"
        shutil.copytree(self.work, self._template)
        _expect(command.code, self._caller.plain(self._args), self._args)
        self.reference = State.of(self.work)
        self.reset(self.reference)
        done, self.calls = self._caller.watched(self._args)
        _expect(command.code, done, self._args)
        again = State.of(self.work)
        assert again == self.reference or _same_but_logs(again, self.reference), f"{command.name}: two runs differ"
        self.reset(again)
        self._reruns: dict[Any, tuple[Done, State]] = {}

    def reset(self, now: State) -> None:
        """Put back what a call changed; the run's own files are left alone where they are as they were."""
        if now.tree == self.before.tree:
            return
        keep = {"run"} if now.part("run") == self.before.part("run") else set()
        for path in self.work.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in self._template.iterdir():
            if path.name not in keep:
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, self.work / path.name)

    def strike(self, fault: Fault, target: int) -> tuple[Done, State]:
        done = self._caller.struck(self._args, fault, target)
        known = self.calls[target - 1]
        if done.struck and (done.struck.kind, done.struck.path) == (known.kind, known.path):
            done = replace(done, struck=known)
        return done, State.of(self.work)

    def rerun(self, now: State) -> tuple[Done, State]:
        """The command called again in the folder as it is; what is known from an equal folder is not tried again."""
        key = tuple(now.tree.items()), now.ledger
        if key not in self._reruns:
            done = self._caller.plain(self._args)
            now = State.of(self.work)
            self._reruns[key] = done, now
        return self._reruns[key]


def _expect(code: int, done: Done, args: Sequence[str]) -> None:
    assert done.code == code, f"{' '.join(args)}: exit code {done.code}: {done.err}"


def _same_but_logs(one: State, other: State) -> bool:
    differ = {path for path in one.tree.keys() | other.tree.keys() if one.tree.get(path) != other.tree.get(path)}
    return all(".eval" in path for path in differ)


def points(calls: Sequence[Call], fault: Fault, judge: Judge, *, every: bool) -> list[int]:
    """The numbers of the calls to strike, from 1. Of many equal ones in a row, the first, the middle and the last."""
    found: list[int] = []
    numbered = [(number, call) for number, call in enumerate(calls, 1)]
    for _, row in groupby(numbered, key=lambda item: (item[1].kind, item[1].path)):
        same = [number for number, _ in row]
        if fault.applies_to(calls[same[0] - 1], is_input=judge.is_input(calls[same[0] - 1])):
            found += same if every else sorted({same[0], same[len(same) // 2], same[-1]})
    return found


def few_points(calls: Sequence[Call], candidates: Sequence[int], turn: int, count: int) -> list[int]:
    """Some of the candidates: of a kind of call that is another at every turn, and the last rename."""
    kinds = sorted({calls[number - 1].kind for number in candidates})
    chosen = {number for number in candidates if calls[number - 1].kind in {"rename", "exchange"}}
    picked = set(sorted(chosen)[-1:]) if turn % 2 else set()
    for step in range(count):
        kind = kinds[(turn + step * 3) % len(kinds)]
        same = [number for number in candidates if calls[number - 1].kind == kind]
        picked.add(same[turn * 7 % len(same)])
    return sorted(picked)


@dataclass(slots=True)
class Sweep:
    """A command on its stage, the judge of it, and what was found so far."""

    stage: Stage
    judge: Judge
    result: Swept

    def try_one(self, fault: Fault, number: int) -> None:
        """One case, and the rerun where it left anything."""
        done, after = self.stage.strike(fault, number)
        if done.struck is not None:
            verdict = self.judge.judge(fault, done, after)
            if after.tree != self.stage.before.tree:
                verdict.faults += self.judge.judge_rerun(*self.stage.rerun(after))
            self._enter(verdict, fault, done.struck, number)
        self.stage.reset(State.of(self.stage.work))

    def _enter(self, verdict: Verdict, fault: Fault, struck: Call, number: int) -> None:
        found = [*verdict.faults, *verdict.notes]
        self.result.tallies[fault.name].add(Tally(1, Counter({column for column, _ in found})))
        at, case = struck.path.removeprefix(self.result.work + "/"), {"fault": fault.name, "call": number, "kind": struck.kind}
        for column, what in found[: MAX_EXAMPLES - len(self.result.examples)]:
            told = what.replace(self.result.work, "")
            self.result.examples.append({**case, "at": at, "column": column, "what": told, "is_note": column in NOTES})


def sweep(command: Command, bases: Path, home: Path, *, few: int = 0, every: bool = False, deadline: float = 0.0) -> Swept:
    """Strike a command. `few` calls of each fault, or all; until a time of the clock."""
    started = time.monotonic()
    stage = Stage(command, bases, home)
    judge = Judge(stage.work, stage.before, stage.reference, command.code)
    result = Swept(command.name, str(stage.work), calls=stage.calls, known=sorted(stage.before.tree), made=judge.units)
    sweeping = Sweep(stage, judge, result)
    for turn, fault in enumerate(FAULTS):
        numbers = points(stage.calls, fault, judge, every=every)
        if few and numbers:
            numbers = few_points(stage.calls, numbers, COMMANDS.index(command) + turn, few)
        result.tallies[fault.name] = Tally()
        result.num_points += len(numbers)
        for number in numbers:
            if deadline and time.monotonic() > deadline:
                result.num_left += 1
            else:
                sweeping.try_one(fault, number)
    result.seconds = time.monotonic() - started
    shutil.rmtree(home)
    return result


SHOWN = (*COLUMNS, *NOTES)


def table(results: Sequence[Swept]) -> Iterator[str]:
    """Command x fault, in Markdown."""
    yield from _heads("command", "fault")
    for result in results:
        for name, tally in result.tallies.items():
            if tally.cases:
                yield _row(tally, f"`{result.name}`", name)


def summary(results: Sequence[Swept]) -> Iterator[str]:
    """All commands together, fault by fault; a row of sums at the end."""
    yield from _heads("fault")
    whole = Tally()
    for fault in FAULTS:
        total = Tally()
        for tally in [result.tallies[fault.name] for result in results if fault.name in result.tallies]:
            total.add(tally)
        whole.add(total)
        yield _row(total, fault.name)
    yield _row(whole, "all")


def _heads(*first: str) -> Iterator[str]:
    heads = ("cases", *COLUMNS, *(f"({note})" for note in NOTES))
    yield f"| {' | '.join((*first, *heads))} |"
    yield "|" + " --- |" * len(first) + " ---: |" * len(heads)


def _row(tally: Tally, *first: str) -> str:
    numbers = (tally.cases, *(tally.found.get(column, 0) for column in SHOWN))
    return f"| {' | '.join((*first, *map(str, numbers)))} |"


def as_json(result: Swept) -> str:
    return json.dumps(asdict(result))


def from_json(text: str) -> Swept:
    content = json.loads(text)
    tallies = {name: Tally(**tally) for name, tally in content.pop("tallies").items()}
    calls = [Call(**call) for call in content.pop("calls")]
    return Swept(**content, tallies=tallies, calls=calls)


def file_name(command: Command) -> str:
    return "".join(c if c.isalnum() else "-" for c in command.name) + ".json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bases", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--few", type=int, default=0)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--until", type=float, default=0.0, metavar="TIME", help="of the machine's monotonic clock")
    asked = parser.parse_args()
    import_everything()
    for command in COMMANDS:
        if command.name in asked.names:
            home = asked.work / Path(file_name(command)).stem
            done = sweep(command, asked.bases, home, few=asked.few, every=asked.every, deadline=asked.until)
            (asked.out / file_name(command)).write_text(as_json(done))
            sys.stdout.write(f"{command.name}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
