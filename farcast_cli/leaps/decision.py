"""Whether to leap and how far: the gain steered by the loss or by the share, what speaks against it, and what to say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.forecast.momentum import AGREES, Momentum, Remembered, steered

if TYPE_CHECKING:
    from farcast_cli.evaluation.judge import Trial
    from farcast_cli.forecast.steering import Losses
    from farcast_cli.leaps.ask import Ask
    from farcast_cli.leaps.evidence import Gathered
    from farcast_cli.request import Outcome, Start
    from farcast_cli.run.trajectory import Trajectory

LEFT_TO_TRAIN = 0.1  # of the run, after its last leap: a leap needs training after it
LEFT_TO_SETTLE = 0.5  # of what is left of a run whose counters advance
UNJUDGED = 1.0  # the largest gain while the loss has not been seen to change
FIRST_CALLS = 3  # stretches, up to which the notes for a beginner are said
WORTH = 0.1  # the smallest gain that is worth a restart
ADVISED = 50  # leaps in a run, and so a stretch of 2 % of it
"""Measured: 20 leaps gain less (docs/results.md)."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What is known of the loss: what earlier calls saw, and what the user's command says now, if it was asked."""

    losses: Losses
    trials: tuple[Trial, ...] = ()
    signal: float = math.nan
    is_worse_ahead: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision rests on."""

    ask: Ask
    trajectory: Trajectory
    start: Start
    found: Gathered
    after: Remembered | None
    """The memory with the last stretch; None where there is no stretch yet."""
    heard: Heard

    def steered(self) -> Momentum:
        """The gain moved by the loss where it could be measured, else by the share."""
        if self.after is None:
            return Momentum()
        signal, losses = self.heard.signal, self.heard.losses
        momentum, limit = self.after.momentum, self.ask.limit
        if self.found.time.is_rising:  # no leap is made, so nothing is learned of leaps
            return momentum
        if math.isnan(signal):
            limit = limit if self.ask.request.evaluator is None else min(limit, UNJUDGED)
            share = min(momentum.share, 0.0) if self.heard.is_worse_ahead else momentum.share
            return steered(momentum, share, limit=limit)
        return steered(momentum, losses.signal(signal, momentum.share), limit=min(limit, losses.limit))

    def decide(self, momentum: Momentum) -> tuple[float, str]:
        """The gain to leap by, 0 for none; and why."""
        if self.after is None:
            return 0.0, self._alone()
        signal, losses = self.heard.signal, self.heard.losses
        gain = momentum.gain if self.ask.gain is None else self.ask.gain
        if self.ask.is_forced:
            return (max(gain, WORTH) if self.ask.gain is None else gain), "asked for"
        left = math.inf if self.start.steps_left is None else self.start.steps_left
        share = f"share {momentum.share:.2g}"
        against = losses.objection(signal, momentum.share)
        is_bent = not math.isnan(signal) and losses.limit <= min(momentum.gain, self.ask.limit)
        objections = (
            (math.isnan(momentum.share), "the memory has one stretch: a leap needs two that agree"),
            (not self.found.time.ahead, "the learning rate is 0: there is no training to skip"),
            (left <= 0, self.start.limit),
            (not self._moved, "the weights have not moved since the last call"),
            (math.isnan(signal) and self.heard.is_worse_ahead, "the loss is higher ahead than behind"),
            (self.found.time.is_rising, "the learning rate is still rising: leaps begin one stretch after the warm-up"),
            (
                self.is_near_end,
                f"{left} steps are left: the last {LEFT_TO_TRAIN:.0%} of a run are for training only",
            ),
            (bool(against), against),
            (
                math.isnan(signal) and momentum.share < AGREES,
                f"{share}: the last stretches made too little of the predicted move, needed {AGREES}",
            ),
            (
                self.ask.limit < WORTH,
                f"the largest gain is {self.ask.limit:g}: under {WORTH} a leap is not worth a restart",
            ),
            (
                gain < WORTH and is_bent,
                f"gain {gain:.2g}: a longer leap would raise the loss by more than its usual change",
            ),
            (gain < WORTH and not math.isnan(signal), f"gain {gain:.2g}: the loss was against the last leaps, {share}"),
            (gain < WORTH, f"gain {gain:.2g}: training reversed the last leaps, {share}"),
        )
        objection = next((text for holds, text in objections if holds), None)
        if self.ask.request.counters == "advance":  # a leap over the end could not settle
            gain = min(gain, LEFT_TO_SETTLE * left / self.found.time.every)
        held = ", limited by the curvature of the loss" if is_bent else ""
        return (0.0, objection) if objection else (gain, f"gain {gain:.2g}{held}, {share}")

    def _alone(self) -> str:
        """Why there is no stretch yet."""
        before = len(self.trajectory.snapshots) - 1
        known = f" ({before} earlier ones are before the last leap and do not count)" if before else ""
        return f"one snapshot so far{known}: a leap needs a stretch of training"

    @property
    def _moved(self) -> bool:
        """Whether training has moved the weights in the last stretch."""
        move = self.found.stretches[-1][0] if self.found.stretches else None
        return move is None or float(move @ self.found.products @ move) > 0

    @property
    def is_near_end(self) -> bool:
        """Whether too little of the run is left to train after a leap."""
        end, left = self.start.end, self.start.steps_left
        return end is not None and left is not None and left < LEFT_TO_TRAIN * end[1]

    @property
    def _is_new_length(self) -> bool:
        """Whether no earlier call has had a stretch of this length."""
        before = self.found.memory.record if self.found.memory else None
        return before is None or not before.count or before.every != self.found.time.every

    def notes(self, outcome: Outcome) -> tuple[str, ...]:
        """What a person should know, beside what was decided."""
        end, signal = self.start.end, self.heard.signal
        advice = max(1, round(end[1] / ADVISED)) if end else None
        said = [f"{one.path.name} left out: {one.reason}" for one in self.trajectory.half_written]
        said += self.found.notes
        if outcome.trials and math.isnan(signal):
            seen = "the loss has not changed yet" if self.heard.losses.falls_weight else "only one loss was measured so far"
            said.append(f"{seen}, so only the share changes the gain")
        has_command = self.ask.request.evaluator is not None
        if has_command and self.ask.request.dry_run:
            said.append("a dry run does not measure the loss: the real call may decide differently")
        elif has_command and not outcome.trials:
            said.append("--eval-cmd was not run: it tests the direction of earlier calls, so it runs from the next call on")
        count = self.after.momentum.count if self.after else 0
        if outcome.path and not outcome.trials and (has_command or count <= FIRST_CALLS):  # to say it once is enough
            how = "" if has_command else ": --eval-cmd measures the loss"
            said.append(f"no loss was measured, so farcast cannot know whether leaps lower it{how}")
            if self.found.time.pace.clock == "steps":
                said.append(
                    "the learning rate is unknown, so farcast cannot detect a warm-up: leaps during a warm-up harm the run"
                )
        if advice and count and self._is_new_length and not advice / 2 <= self.found.time.every <= 2 * advice:
            said.append(
                f"stretches of {self.found.time.every} steps: leaps gained most at every 2 % of a run, which is {advice} steps here"
            )
        return tuple(said)
