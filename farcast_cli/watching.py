"""Watching a run while it trains: look at its folder again and again, keep and judge what is new, and leap if asked to.

Knows when a snapshot is new and whole. What happens comes as events, one after another; nothing is printed here.
"""

from __future__ import annotations

import gc
import math
import re
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from farcast_cli.errors import ANY_COMMAND, FarcastError, MemoryUsedUpError, SampledError, printable, shell_word
from farcast_cli.files.reading import reading, unreadable
from farcast_cli.forecast.fitting import find, fit_planned, plan_found
from farcast_cli.headline import advised
from farcast_cli.keeping import KeepRequest, keep
from farcast_cli.reports.story import propose
from farcast_cli.run.selection import Selection, end_of
from farcast_cli.run.trajectory import MIN_SNAPSHOTS
from farcast_cli.run.trust import BY_EVIDENCE, StepRule
from farcast_cli.trainers import recognise
from farcast_cli.trainers.names import find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path

    from farcast_cli.choices import StepUnit, Verdict
    from farcast_cli.evaluation.hook import Hook
    from farcast_cli.forecast.fitting import FitRequest
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.forecast.history import Past
    from farcast_cli.keeping import Keeping
    from farcast_cli.progress import Progress
    from farcast_cli.request import Outcome, Request
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot

    Marks = tuple[tuple[str, int, int, int], ...]
    """Of each file of an entry: its name, its size, its time of change in ns, its inode."""
    Look = Mapping[str, Marks]
    """What tells each entry of the run's folder from the same entry after a change."""
    Leap = Callable[[Fitted, Progress], Outcome]
    """Writes the forecast to resume from."""

RETRY_S = 60.0  # after a problem, if nothing in the folder has changed: a disk may work again
WHOLE = "--keep weights copies all weights of the snapshots to come"
TWO = "let the trainer keep two checkpoints or more, such as save_total_limit=2"
_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What the user asks to be watched."""

    fit: FitRequest
    """Its history is the folder for kept snapshots."""
    judge: Request
    is_sampled: bool = True
    """Keep only the values that `fit` reads."""
    interval_s: float = 10.0
    until: int | None = None
    """The step at which the watch ends."""
    once: bool = False
    leap: Leap | None = None
    hook: Hook | None = None
    """The command that runs after a leap was written."""

    @property
    def selection(self) -> Selection:
        return self.fit.selection

    def over(self, **changes: object) -> WatchRequest:
        """The same over another selection."""
        return replace(self, fit=replace(self.fit, selection=replace(self.selection, **changes)))  # type: ignore[arg-type]


# --- what happens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewVerdict:
    """A new snapshot, and the verdict on the run with it. Numbers that are not known yet are nan."""

    step: int
    num_snapshots: int
    """In the history."""
    leap: int | None
    """The step of the leap after which the history begins."""
    verdict: Verdict
    words: str
    """The verdict for people."""
    reason: str
    horizon: int = 0
    coherence: float = math.nan
    significance: float = math.nan
    ratio: float = math.nan
    rule: StepRule = BY_EVIDENCE


@dataclass(frozen=True, slots=True)
class LeapWritten:
    """A forecast to resume from is there."""

    step: int
    path: Path
    valid_step: int
    existed: bool
    """It was there already, and nothing was written now."""
    unit: StepUnit = "step"


@dataclass(frozen=True, slots=True)
class CommandEnded:
    """The user's command has ended."""

    checkpoint: Path
    log: Path
    seconds: float
    failed: str
    """What went wrong; empty if nothing did."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something went wrong, or is not as it should be; the watch goes on."""

    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Waiting:
    """There is nothing to do until the next look."""

    what: str
    """What the watch waits for."""
    step: int | None
    """Of the newest snapshot; None before the first."""
    age_s: float
    """Since the newest snapshot was saved; since the watch began, before the first."""
    unit: StepUnit = "step"


@dataclass(frozen=True, slots=True)
class WatchEnded:
    """The watch has ended by itself."""

    step: int | None
    reason: str


Event = NewVerdict | LeapWritten | CommandEnded | Trouble | Waiting | WatchEnded


# --- the loop --------------------------------------------------------------------------------------------------------


def watch(
    request: WatchRequest,
    progress: Progress,
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[Event, None, None]:
    """Follow a run until its end, until the step that is asked for, or for ever.

    A look costs one call of the system for each file of the run. Only a snapshot that is new, and the same at two looks, is
    opened. A problem that stays is told once.

    Raises:
        FarcastError: with `once` only, for what is a problem otherwise.
    """
    with closing(_Watch(request, progress, now)) as watching:
        while True:
            yield from watching.look()
            if watching.over:
                break
            yield watching.waiting()
            sleep(request.interval_s)
        yield from watching.finish()


@dataclass(slots=True)
class _Watch:
    """What is known between two looks."""

    request: WatchRequest
    progress: Progress
    now: Callable[[], float]
    num_looks: int = 0
    seen: Look = field(default_factory=dict)
    """The last look."""
    unsettled: frozenset[str] = frozenset()
    """The entries that changed since the look before."""
    done: Look = field(default_factory=dict)
    """The entries that have been taken into account."""
    failed: tuple[Look, float] | None = None
    """The look of the last problem, and when to try it again."""
    problem: str = ""
    """The problem that stays."""
    told: set[str] = field(default_factory=set)
    newest: NewVerdict | None = None
    saved: float = 0.0
    """When the newest snapshot was saved; when the watch began, before the first."""
    history: tuple[int, ...] = ()
    """The steps that the last verdict is on."""
    end: int | None = None
    """The step at which the run ends, as the newest snapshot told."""
    over: str = ""
    """Why the watch ends."""

    def __post_init__(self) -> None:
        self.saved = self.now()

    @property
    def hook(self) -> Hook | None:
        return self.request.hook

    def close(self) -> None:
        if self.hook:
            self.hook.close()

    def look(self) -> Iterator[Event]:
        """One look at the folder, and what follows from it."""
        is_last = self.request.once and self.num_looks > 0
        yield from self._commanded()
        try:
            fresh = self._fresh()
            if fresh:
                yield from self._judge()
                self.done = {**self.done, **fresh}
            if is_last and self.newest is None:
                find(self._settled().fit, minimum=1)
            self._recover()
        except (FarcastError, OSError, MemoryError) as error:
            if is_last:
                raise
            if not self._has_changed():
                yield from self._fail(error)
        self.over = self.over or ("--once" if is_last else "")

    def waiting(self) -> Waiting:
        step, rule = (self.newest.step, self.newest.rule) if self.newest else (None, BY_EVIDENCE)
        return Waiting(self._wanted(), step, max(0.0, self.now() - self.saved), rule.unit)

    def finish(self) -> Iterator[Event]:
        """Wait for the command that runs, and tell the end."""
        if self.hook:
            self.hook.wait()
        yield from self._commanded()
        yield WatchEnded(self.newest.step if self.newest else None, self.over)

    # --- a look

    def _fresh(self) -> Look:
        """The entries that look like snapshots, are as they were at the last look, and are not taken into account yet."""
        before, self.seen = self.seen, look_at(self.request.selection)
        self.num_looks += 1
        self.unsettled = frozenset(name for name, marks in self.seen.items() if before.get(name) != marks)
        if self._is_resting:
            return {}
        new = {n: marks for n, marks in self.seen.items() if n not in self.unsettled and self.done.get(n) != marks}
        found = {name: marks for name, marks in new.items() if recognise(self.request.selection.directory / name)}
        self.done = {**self.done, **{name: marks for name, marks in new.items() if name not in found}}
        return found

    def _wanted(self) -> str:
        if self.num_looks == 1 and self.seen:
            return "a second look"
        saving = next((name for name in sorted(self.unsettled) if find_step_in_name(name)), "")
        if saving:
            return f"{printable(saving)} to be whole"
        if not self.request.selection.directory.is_dir():
            return "the run's folder"
        return "the next snapshot" if self.newest else "the first snapshot"

    def _settled(self) -> WatchRequest:
        """The request without the entries that are changing."""
        return self.request.over(unsettled=self.unsettled)

    def _judge(self) -> Iterator[Event]:
        """Keep what is new and judge the run with it."""
        request = self._settled()
        kept = keep(KeepRequest(request.selection, request.selection.history, None, request.is_sampled), self.progress)
        for text in kept.cautions:
            yield from self._tell(text)
        if not kept.snapshots:  # what is there is not whole yet
            return
        request = request.over(history=kept.folder)
        found, past = find(request.fit, minimum=1)
        if found.origin.step not in {snapshot.step for snapshot in kept.snapshots}:
            return  # it changed while it was copied, so a later look takes it again
        yield from self._of_restart(found.origin, kept)
        steps = past.history.trajectory.steps
        if steps == self.history:
            return
        judged, fitted = judge(request, found, past, self.progress)
        self.newest, self.history = judged, steps
        self.saved = _saved(self.seen.get(found.origin.path.name), self.now())
        yield judged
        gc.collect()  # the command line has switched the collector off, which a command of a minute does not need
        self.over = self._reached(found.origin)
        if fitted and request.leap and judged.verdict == "forecast":
            yield from self._leap(request.leap, fitted, judged.step)

    def _reached(self, origin: Snapshot) -> str:
        """Why the watch ends with this snapshot; empty if it does not. The last one may tell no end, and the one before did."""
        until, known = self.request.until, self.end
        end = end_of(origin)
        self.end = end[1] if end else None
        if until is not None and origin.step >= until:
            return f"{origin.unit} {until} is reached"
        ends = [end for end in (known, self.end) if end is not None and end <= origin.step]
        return f"the run ended at {origin.unit} {ends[0]}" if ends else ""

    def _of_restart(self, origin: Snapshot, kept: Keeping) -> Iterator[Trouble]:
        """That kept snapshots lie after the run's newest: it began again."""
        last = kept.snapshots[-1].step
        if last > origin.step:
            unit = origin.unit
            yield from self._tell(
                f"the run is at {unit} {origin.step}, and snapshots up to {unit} {last} are kept: did it start again?",
                hint=f"if this is another run, move {shell_word(kept.folder)} away",
            )

    # --- leaps

    def _leap(self, leap: Leap, fitted: Fitted, step: int) -> Iterator[Event]:
        if self.hook and self.hook.is_running:
            yield from self._tell(f"no leap from {fitted.rule.unit} {step}: the command of the last leap still runs")
            return
        try:
            outcome = leap(fitted, self.progress)
        except SampledError as error:
            yield from self._tell(f"no leap from {fitted.rule.unit} {step}: {error}", hint=WHOLE, key="samples")
            return
        except (FarcastError, OSError):
            if not self._has_changed():
                raise
            yield from self._tell(
                f"no leap from {fitted.rule.unit} {step}: the trainer deleted a checkpoint while it was read", hint=TWO
            )
            return
        if outcome.path:
            yield LeapWritten(step, outcome.path, outcome.valid_step, outcome.existed, outcome.rule.unit)
            if self.hook and not outcome.existed:
                self.hook.start(outcome.path)

    def _commanded(self) -> Iterator[CommandEnded]:
        for ran in self.hook.ended() if self.hook else ():
            yield CommandEnded(ran.checkpoint, ran.log, ran.seconds, ran.failed)

    # --- problems

    def _tell(self, text: str, *, hint: str = "", key: str = "") -> Iterator[Trouble]:
        """A problem, unless the same was told before; numbers make no difference."""
        key = key or _NUMBERS.sub("#", text)
        if key not in self.told:
            self.told.add(key)
            yield Trouble(text, hint)

    def _fail(self, error: FarcastError | OSError | MemoryError) -> Iterator[Trouble]:
        """A problem that may pass, unless it is the one that stays."""
        self.failed = self.seen, self.now() + RETRY_S
        found = _of_ours(error, self.request.selection.directory)
        if str(found) != self.problem:
            self.problem = str(found)
            yield Trouble(str(found), found.hint.replace(ANY_COMMAND, "farcast watch "))

    def _has_changed(self) -> bool:
        """Whether the folder has changed since the look: what vanishes while it is read is no problem, and the next look tells."""
        try:
            return look_at(self.request.selection) != self.seen
        except FarcastError:
            return False

    @property
    def _is_resting(self) -> bool:
        """Whether nothing has changed since a problem, and it is too early to try again."""
        return self.failed is not None and self.failed[0] == self.seen and self.now() < self.failed[1]

    def _recover(self) -> None:
        if not self._is_resting:
            self.failed, self.problem = None, ""


def look_at(selection: Selection) -> Look:
    """The marks of all files of the entries that may be snapshots; no file is opened. Empty where the folder is not there.

    Raises:
        UnreadableError: the folder cannot be listed.
    """
    with reading(selection.directory):
        try:
            entries = sorted(selection.directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        chosen = (
            path for path in entries if not path.name.startswith(".") and fnmatchcase(path.name, selection.pattern or "*")
        )
        return {path.name: _marks_of(path) for path in chosen if find_step_in_name(path.name) or recognise(path)}


def _marks_of(entry: Path) -> Marks:
    """A file that vanishes meanwhile has no mark."""
    found = []
    for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(found)


def _saved(marks: Marks | None, now: float) -> float:
    """When the last file of a snapshot was written."""
    return max((mark[2] / 1e9 for mark in marks or ()), default=now)


def _of_ours(error: FarcastError | OSError | MemoryError, directory: Path) -> FarcastError:
    if isinstance(error, FarcastError):
        return error
    return unreadable(directory, error) if isinstance(error, OSError) else MemoryUsedUpError("not enough memory")


# --- the verdict -----------------------------------------------------------------------------------------------------


def judge(request: WatchRequest, found: Trajectory, past: Past, progress: Progress) -> tuple[NewVerdict, Fitted | None]:
    """The verdict on a run, and its forecaster if it has enough snapshots."""
    step, count, leap = found.origin.step, len(past.history.trajectory.snapshots), past.history.leap
    landed = leap.resumes_after if leap else None
    if count < MIN_SNAPSHOTS:
        since = " since the leap" if leap else ""
        reason = f"{count} snapshot{'s' * (count != 1)}{since}, {MIN_SNAPSHOTS} are needed"
        return NewVerdict(step, count, landed, "untestable", f"keep training: {reason}", reason, rule=found.rule), None
    fitted = fit_planned(plan_found(request.fit, found, past), progress).fitted
    proposal = propose(fitted, request.judge)
    outcome, decision = proposal.outcome, proposal.outcome.decision
    title = advised(outcome, proposal.purpose).title.lower()
    return NewVerdict(
        step,
        count,
        landed,
        decision.verdict,
        title if decision.verdict == "forecast" else f"{title}: {decision.reason}",
        decision.reason,
        outcome.horizon,
        decision.coherence,
        decision.significance.p,
        decision.ratio,
        fitted.rule,
    ), fitted
