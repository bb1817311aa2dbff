"""What must hold after a call was struck, and after the same command was called again.

Nothing that was there is lost or changed; what bears a final name is whole, the old or the new; the exit code says
what happened; what is left over is hidden; and the rerun ends where a run that nothing strikes ends.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from tests.crash.shim import READS, Call

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.crash.child import Done
    from tests.crash.shim import Fault

Tree = dict[str, str]
"""Every path below a folder with the hash of its content; folders and links say so."""
Column = Literal["lost", "half-written", "in part", "leftovers", "wrong code", "ledger", "rerun unlike"]
COLUMNS: tuple[Column, ...] = ("lost", "half-written", "in part", "leftovers", "wrong code", "ledger", "rerun unlike")
PUBLISHED = "published, told as failed"
IN_PART = "in part until the rerun"
NOTES = (PUBLISHED, IN_PART)
"""What is counted and is no fault: nothing else can be done by a process that was killed, or whose last sync failed."""

LEDGER = "forecasts/ledger.jsonl"
HOME = "forecasts/run"
FOLDER = "folder"
ABSENT, OLD, NEW, HALF = "absent", "old", "new", "half"
CLEANING = {"unlink", "rmdir", "open-read"}
"""Calls that remove what was not published; where they fail, something stays."""
TOLERATED = {*CLEANING, "flock", "link"}
"""Calls whose failure need not fail the command: filesystems without locks, and what can only be cleared up later."""


def tree_of(top: Path) -> Tree:
    return {path.relative_to(top).as_posix(): _digest(path) for path in sorted(top.rglob("*"))}


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_dir():
        return FOLDER
    data = path.read_bytes()
    return hashlib.sha256(_without_times(data) if path.name.endswith("farcast.json") else data).hexdigest()


def _without_times(data: bytes) -> bytes:
    """A sidecar without the seconds that the evaluations took."""
    try:
        content = json.loads(data)
    except ValueError:  # half of one
        return data
    for evaluation in content.get("evaluations", ()):
        evaluation["seconds"] = 0
    return json.dumps(content).encode()


def ledger_lines(work: Path) -> tuple[str, ...]:
    path = work / LEDGER
    return tuple(path.read_text(errors="replace").splitlines()) if path.is_file() else ()


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts if not path.startswith("run/"))


def is_log(path: str) -> bool:
    return any(part.endswith(".eval") for part in PurePosixPath(path).parts)


@dataclass(frozen=True, slots=True)
class State:
    """A work folder: its tree, and the lines of its ledger."""

    tree: Tree
    ledger: tuple[str, ...]

    @classmethod
    def of(cls, work: Path) -> State:
        return cls(tree_of(work), ledger_lines(work))

    def part(self, unit: str) -> Tree:
        """What lies at a path and below it."""
        return {path: digest for path, digest in self.tree.items() if path == unit or path.startswith(f"{unit}/")}


@dataclass(slots=True)
class Verdict:
    """What was wrong, by column, in words; and what was noted."""

    faults: list[tuple[Column, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


class Judge:
    """Knows a command's folder before it, and after a run that nothing struck."""

    def __init__(self, work: Path, before: State, reference: State, code: int = 0) -> None:
        self._work, self._before, self._reference, self._well = work, before, reference, code
        changed = {path for path in reference.tree if before.tree.get(path) != reference.tree[path] and not is_log(path)}
        self.units = sorted({_unit_of(path) for path in changed} - {"forecasts", HOME, LEDGER})
        self._inputs = {path for path in before.tree if _unit_of(path) not in {*self.units, "forecasts", HOME, LEDGER}}

    def is_input(self, call: Call) -> bool:
        return self._relative(call.path) in self._inputs

    def judge(self, fault: Fault, done: Done, after: State) -> Verdict:
        """After the struck call."""
        verdict, struck = Verdict(), done.struck or Call("none", "")
        states = {unit: self._state(unit, after) for unit in self.units}
        verdict.faults += self._kept(after, states)
        verdict.faults += [("half-written", f"{unit} is neither the old nor the new") for unit in _in(states, HALF)]
        if len(set(states.values()) - {HALF}) > 1 and set(states.values()) - {ABSENT, OLD}:
            told = ", ".join(f"{unit}: {state}" for unit, state in states.items())
            if fault.is_kill:
                verdict.notes.append((IN_PART, told))
            else:
                verdict.faults.append(("in part", told))
        verdict.faults += [("leftovers", path) for path in self._leftovers(fault, struck, after)]
        if not fault.is_kill:
            verdict.faults += self._ledger(done, after, states)
        is_published = set(states.values()) == {NEW}
        if is_published and done.code not in {self._well, -9}:
            verdict.notes.append((PUBLISHED, f"exit code {done.code}: {done.err.strip()[-200:]}"))
        verdict.faults += [("wrong code", why) for why in self._told(fault, struck, done, is_published=is_published)]
        return verdict

    def judge_rerun(self, done: Done, after: State) -> list[tuple[Column, str]]:
        """After the same command, called again."""
        states = {unit: self._state(unit, after) for unit in self.units}
        said = (done.err.strip() or "nothing")[-300:]
        unlike = [unit for unit, state in states.items() if state != NEW]
        found: list[tuple[Column, str]] = [("rerun unlike", f"{unit} is {states[unit]} after the rerun") for unit in unlike]
        if done.code != self._well and not (done.code == 5 and "exists already" in done.err and not unlike):
            found.append(("rerun unlike", f"exit code {done.code}: {said}"))
        extra = [path for path in after.tree if path not in self._reference.tree and not is_log(path)]
        if done.code != self._well:  # a refused command clears nothing up
            extra = [path for path in extra if not is_hidden(path)]
        found += [("leftovers", f"{path} after the rerun") for path in extra[:1]]
        if Counter(after.ledger) != Counter(self._reference.ledger):
            found.append(("ledger", f"{len(after.ledger)} lines after the rerun, expected {len(self._reference.ledger)}"))
        return found

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self._work}/")

    def _state(self, unit: str, state: State) -> str:
        found = state.part(unit)
        if not found:
            return ABSENT
        return NEW if found == self._reference.part(unit) else OLD if found == self._before.part(unit) else HALF

    def _kept(self, after: State, states: dict[str, str]) -> Iterable[tuple[Column, str]]:
        for path in self._inputs:
            if after.tree.get(path) != self._before.tree[path]:
                yield "lost", f"{path} is {'changed' if path in after.tree else 'gone'}"
        for unit in _in(states, ABSENT):
            if self._before.part(unit):
                yield "lost", f"{unit} is gone, and there is no new one"

    def _leftovers(self, fault: Fault, struck: Call, after: State) -> Iterable[str]:
        """What is neither old nor new. Hidden is what an interrupted command may leave, and one that cannot remove it."""
        may_hide = fault.is_kill or fault.is_signal or struck.kind in CLEANING
        known = self._before.tree.keys() | self._reference.tree.keys()
        yield from [
            path for path in after.tree if path not in known and not is_log(path) and not (is_hidden(path) and may_hide)
        ]
        if "forecasts" in after.tree.keys() - self._before.tree.keys() and not fault.is_kill and struck.kind not in CLEANING:
            yield from [] if len(after.part("forecasts")) > 1 else ["forecasts (empty)"]

    def _ledger(self, done: Done, after: State, states: dict[str, str]) -> Iterable[tuple[Column, str]]:
        """A line for each forecast that was published, and for no other."""
        is_published = set(states.values()) == {NEW}
        expected = self._reference.ledger if is_published else self._before.ledger
        if NEW in states.values() and not is_published:
            return  # told as published in part
        if Counter(after.ledger) != Counter(expected):
            yield "ledger", f"{len(after.ledger)} lines, expected {len(expected)}, with exit code {done.code}"

    def _told(self, fault: Fault, struck: Call, done: Done, *, is_published: bool) -> Iterable[str]:
        """What the exit code and the messages say wrongly."""
        if fault.is_kill:
            return
        allowed = self._codes(fault, struck)
        if done.code not in allowed and not (fault.is_signal and done.code == self._well):
            expected = " or ".join(map(str, sorted(allowed)))
            yield f"exit code {done.code}, expected {expected}: {done.err.strip()[-300:]}"
        elif done.code == self._well and not is_published:
            yield f"exit code {done.code}, and not all is published"
        if "Traceback" in done.err:
            yield f"a traceback: {done.err.strip().splitlines()[-1]}"
        if done.code and done.out:
            yield f"exit code {done.code}, and stdout holds {done.out.strip()[:80]}"
        if done.code in {4, 5}:
            yield from self._named(struck, done)

    def _codes(self, fault: Fault, struck: Call) -> set[int]:
        """By the call that was struck: calls may come in another order than in the run that was watched."""
        path = self._relative(struck.path)
        if fault.is_signal:
            return {130}
        well = self._well
        if fault.name == "short write":
            return {well}
        if struck.kind in READS and path in self._inputs:
            return {well, 4}  # well where it was only looked at, and what is published is right
        if not struck.succeeded:  # it fails when nothing strikes it, too: a folder that is there, a ledger that is not
            return {well, 4, 5}
        if path == LEDGER and struck.kind in READS:
            return {4, 5}
        return {well, 5} if struck.kind in TOLERATED or is_log(path) else {5}

    def _named(self, struck: Call, done: Done) -> Iterable[str]:
        """One line of error; an input's where an input could not be read, else an output's."""
        if len(done.errors) != 1:
            yield f"{len(done.errors)} lines of error, expected 1"
            return
        own = {"forecasts", "error: .:", *(Path(unit).name for unit in self.units)}  # or the folder that is to hold them
        names = {Path(struck.path).name} if done.code == 4 else own
        if not any(name in done.errors[0] for name in names):
            yield f"{done.errors[0][:200]} names none of {', '.join(sorted(names))}"


def _unit_of(path: str) -> str:
    """What is published as one: an entry of the run's folder under `forecasts/`, of `forecasts/`, or of the folder itself."""
    parts = PurePosixPath(path).parts
    return "/".join(parts[:3] if path.startswith(f"{HOME}/") else parts[:2] if parts[0] == "forecasts" else parts[:1])


def _in(states: dict[str, str], wanted: str) -> list[str]:
    return [unit for unit, state in states.items() if state == wanted]
