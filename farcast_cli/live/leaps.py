"""Leaps of a run that is training: when to call, the call itself, the weights that the model gets, and what is removed.

The files are those of `farcast leap`: the run's newest checkpoint, the last leap and the memory are read, and a checkpoint, the
memory and the ledger's lines are written. The checkpoint has no optimizer, which the model's own training goes on with.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.choices import DEFAULT_LEDGER
from farcast_cli.engine.reader import Resources
from farcast_cli.errors import FarcastError, SnapshotError, TooFewSnapshotsError
from farcast_cli.files.place import check_ours, read_sidecar, sidecar_of
from farcast_cli.folder import folder_of
from farcast_cli.forecast.memory import check_memory_ours, memory_of, read_memory
from farcast_cli.forecast.state_ledger import withdraw_from_both
from farcast_cli.leaps.ask import Ask
from farcast_cli.leaps.call import leap
from farcast_cli.leaps.decision import LEFT_TO_TRAIN
from farcast_cli.live.loss import LiveLoss
from farcast_cli.live.processes import by_the_first, is_first, share
from farcast_cli.progress import silent
from farcast_cli.publish import leap_of
from farcast_cli.request import Request
from farcast_cli.run.steps import StepRange
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.settings import check_leap_options, ledgers_of, selection_of
from farcast_cli.trainers.base import LeapMark

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from farcast_cli.choices import OutputLayout, StepFrom
    from farcast_cli.forecast.ledger import Leap
    from farcast_cli.leaps.ask import Leapt
    from farcast_cli.live.loss import Loss
    from farcast_cli.live.weights import LiveModel
    from farcast_cli.request import Outcome
    from farcast_cli.run.selection import Selection
    from farcast_cli.trainers.base import Snapshot

_log = logging.getLogger("farcast")


@dataclass(frozen=True, slots=True)
class Landed:
    """What came of a call: the leap whose weights the model has now, or why there is none."""

    step: int
    horizon: int
    """Steps that the weights moved ahead; 0: no leap."""
    reason: str
    gain: float = math.nan
    share: float = math.nan
    cosine: float = math.nan
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """In words."""
        what = f"a leap of {self.horizon} steps" if self.horizon else "no leap"
        return f"step {self.step}: {what}: {'; '.join((self.reason, *self.notes))}"

    @property
    def mark(self) -> LeapMark | None:
        """Of the leap, for the trainer to carry on."""
        return LeapMark(self.step, self.step, self.step + self.horizon) if self.horizon else None

    @property
    def numbers(self) -> dict[str, float]:
        """What a trainer logs, as far as it is known."""
        known = {"horizon": float(self.horizon), "gain": self.gain, "share": self.share, "cosine": self.cosine}
        return {f"farcast_{name}": number for name, number in known.items() if math.isfinite(number)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaps:
    """How a run leaps while it trains. The options are those of `farcast leap`; `loss` takes the place of its --eval-cmd.

    Args:
        every: steps between two leaps; by default each save is followed by a call.
        loss: takes the model and returns its loss on a small data set, always the same one.
        output: the folder of the leaps and the memory, outside the run's; forecasts/RUN/ by default.
        step_from: the evidence that tells the steps, as of --step-from.
        weights: the keys of the model's own weights in a file with several networks, as of --weights.
        threads: worker processes that read and compute, made by fork as those of a DataLoader; 1: none.
        strict: raise an error, which otherwise is a warning.
    """

    every: int | None = None
    loss: Loss | None = None
    maximize: bool = False
    gain: float | None = None
    max_gain: float | None = None
    output: str | os.PathLike[str] | None = None
    ledger: str | os.PathLike[str] = DEFAULT_LEDGER
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pattern: str = ""
    step_from: StepFrom | None = None
    weights: str | None = None
    layout: OutputLayout = "same"
    threads: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        check_leap_options(every=self.every, gain=self.gain, max_gain=self.max_gain, output=self._named)

    @property
    def _named(self) -> str | None:
        """The folder that the user named; the separator at the end says that it is one."""
        return None if self.output is None else os.path.join(self.output, "")  # noqa: PTH118

    def is_due(self, step: int) -> bool:
        return self.every is None or step % self.every == 0

    def after_save(self, live: LiveModel, run: Path, step: int, *, num_steps: int | None = None) -> Landed | None:
        """Leap from the checkpoint that the run has just saved, and give its weights to the model of every process.

        Args:
            num_steps: of the whole run, where that is known.

        Returns:
            what came of it; None where the call failed, of which a warning was logged.
        """
        if num_steps and num_steps - step < LEFT_TO_TRAIN * num_steps:
            return Landed(
                step, 0, f"{num_steps - step} steps are left: the last {LEFT_TO_TRAIN:.0%} of a run are for training only"
            )
        return self._guarded(lambda: self._leap(live, run, step), live, step)

    def after_resume(self, live: LiveModel, run: Path, step: int, marks: Collection[LeapMark]) -> Landed | None:
        """Make the last leap again if the run resumed from the checkpoint before it; start a new memory if it left that path.

        Args:
            marks: the leaps that the run descends from, as its own state says.
        """
        return self._guarded(lambda: self._leap_again(live, run, step, marks), live, step)

    def _guarded(self, work: Callable[[], Landed | None], live: LiveModel, step: int) -> Landed | None:
        try:
            landed = by_the_first(work)
        except FarcastError as error:
            if self.strict:
                raise
            _tell(
                logging.WARNING, f"step {step}: no leap, and training goes on: {error}" + f" ({error.hint})" * bool(error.hint)
            )
            return None
        if landed and landed.horizon:
            share(live.tensors[name] for name in sorted(live.tensors))
        if landed:
            _tell(logging.INFO, landed.text)
        return landed

    def _ask(self, run: Path, scorer: LiveLoss | None, step: int | None = None) -> Ask:
        request = Request(
            optimizer="drop",
            counters="keep",
            layout=self.layout,
            output=self._named,
            overwrite=True,
            ledgers=ledgers_of(Path(self.ledger)),
            resources=Resources(num_workers=self.threads),
            evaluator=scorer,
        )
        return Ask(request, self._selection(run, StepRange(last=step)), self.every, self.gain, self.max_gain)

    def _selection(self, run: Path, steps: StepRange) -> Selection:
        options: Any = {"step_from": self.step_from, "weights": self.weights}
        return replace(selection_of(run, self.include, self.exclude, None, self.pattern, **options), steps=steps)

    def _place(self, run: Path) -> Path:
        return memory_of(Path(self._named) if self._named else folder_of(run), run, self.pattern)

    def _leap(self, live: LiveModel, run: Path, step: int) -> Landed:
        origin = self._origin(run, step)
        if origin is None:
            raise SnapshotError(f"{run}: expected a checkpoint of step {step}, found none", hint="save before a leap")
        live.check(origin)
        live.check_same(origin)
        before = self._last_leap(run)
        scorer = LiveLoss(self.loss, live, origin, maximize=self.maximize) if self.loss else None
        found = leap(self._ask(run, scorer, step), silent)
        try:
            if found.outcome.path:
                self._land(live, run, found.outcome, origin)
        finally:
            if before and before != found.outcome.path:
                _remove(before, run)
        return _landed(found, step)

    def _origin(self, run: Path, step: int) -> Snapshot | None:
        """The run's checkpoint of a step."""
        with suppress(TooFewSnapshotsError):
            return discover(run, **self._selection(run, StepRange(step, step)).entries).origin
        return None

    def _land(self, live: LiveModel, run: Path, outcome: Outcome, origin: Snapshot) -> None:
        """Fill the model with a forecast; if that stops, the model has the origin's weights, and nothing tells of the leap."""
        assert outcome.path is not None  # noqa: S101 - there is a forecast to land at
        try:
            target = open_snapshot(outcome.path, self._selection(run, StepRange()).weights)
            live.check(target)
            live.fill(target)
        except BaseException:
            live.restore(origin)
            self._withdraw(leap_of(run, outcome, outcome.path, "keep", origin), run)
            self._forget(run)
            raise

    def _withdraw(self, made: Leap, run: Path) -> None:
        """Take a leap back from the ledgers; the reason why it was not made is told in any case."""
        try:
            withdraw_from_both(ledgers_of(Path(self.ledger)), run, [made])
        except FarcastError as error:
            _tell(logging.WARNING, f"the ledger still tells of a leap that was not made: {error}")

    def _last_leap(self, run: Path) -> Path | None:
        memory = read_memory(self._place(run))
        return memory.forecast if memory else None

    def _leap_again(self, live: LiveModel, run: Path, step: int, marks: Collection[LeapMark]) -> Landed | None:
        memory = read_memory(self._place(run))
        if memory is None:
            return None
        record = memory.record
        last = LeapMark(record.landing_step, record.origin_step, record.origin_step + record.horizon)
        if record.origin_step <= step and (not record.forecast or last in marks):
            return None
        origin = self._origin(run, step) if record.forecast and record.origin_step == step else None
        if origin and memory.began_at(origin):
            return self._leap(live, run, step)
        self._forget(run)
        return Landed(step, 0, "the run left the path of its last leap: a new memory starts")

    def _forget(self, run: Path) -> None:
        last, place = self._last_leap(run), self._place(run)
        check_memory_ours(place, run)
        place.unlink()
        if last:
            _remove(last, run)


def _landed(found: Leapt, step: int) -> Landed:
    outcome, momentum = found.outcome, found.momentum
    reason = "made again after an interruption" if found.is_again and outcome.path else outcome.decision.reason
    horizon = outcome.horizon if outcome.path else 0
    notes = (*found.notes, *([found.worth.told()] if found.worth else []))
    return Landed(step, horizon, reason, momentum.gain, momentum.share, found.cosine, notes)


def _remove(forecast: Path, run: Path) -> None:
    """Remove the checkpoint of a leap that no further leap needs: if it has no optimizer, and is as farcast wrote it."""
    is_file = forecast.is_file()
    sidecar = sidecar_of(forecast, is_file=is_file)
    told = read_sidecar(sidecar) or {}
    if not forecast.exists() or told.get("options", {}).get("optimizer") != "drop":
        return
    try:
        check_ours(forecast, is_file=is_file, run=run)
        if is_file:
            forecast.unlink()
            sidecar.unlink()
        else:
            shutil.rmtree(forecast)
    except (FarcastError, OSError) as error:  # the leap itself is done
        _tell(logging.WARNING, f"the leap before the last stays on disk: {error}")


def _tell(level: int, text: str) -> None:
    """Log a line, once for all processes."""
    if is_first():
        _log.log(level, "%s", text)
