"""What a person should know of a run's folder before the run is forecast, line by line."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from farcast_cli.errors import listed, shell_word
from farcast_cli.run.entries import MADE_OF_OTHERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.forecast.fitting import FitPlan
    from farcast_cli.run.steps import Ignored

MAX_NAMES = 10  # of what is left out for one reason


def cautions_of(plan: FitPlan) -> Iterator[str]:
    """The lines, in the order in which they are printed: what is left out, how steps were told, what the history lacks."""
    found, history = plan.found, plan.past.history
    if plan.replaced:
        yield f"note: {plan.request.output} is the forecaster of another run, {plan.replaced}: it is replaced"
    if found.ignored:
        entries = "entry" if len(found.ignored) == 1 else "entries"
        yield f"{len(found.ignored)} {entries} left out (farcast inspect {shell_word(found.directory)} lists them)"
    for ignored in found.half_written[:MAX_NAMES]:
        yield f"caution: {ignored.path.name} left out: {ignored.reason}"
    if len(found.half_written) > MAX_NAMES:
        yield f"caution: {len(found.half_written) - MAX_NAMES} more snapshots left out"
    yield from _made_of_others(found.ignored)
    yield from (f"note: {text}" for text in found.notes if text not in found.kept_notes)
    if found.rule.unit != "step":
        yield f"note: the unit of this run is the {found.rule.unit}: every number of steps counts {found.rule.unit}s"
    if history.leap:
        yield (
            f"the run resumed from {history.leap.name}, a leap to step {history.leap.resumes_after}:"
            f" fit uses the {len(history.trajectory.snapshots)} snapshots after it, not the {history.num_before} before it"
            " (--steps FROM:TO overrides this)"
        )
    if plan.usable.begins:
        yield plan.usable.begins
    for leap in plan.past.unused:
        if found.steps[0] <= leap.resumes_after < found.steps[-1]:
            yield (
                f"note: {leap.name} is a forecast of this run: if training resumed from it, the chosen steps contain the leap at step"
                f" {leap.resumes_after}, which the forecaster would take for training"
            )
    yield from filter(None, (*found.kept_notes, *plan.past.cautions, plan.usable.left_out, plan.unread))


def _made_of_others(ignored: Sequence[Ignored]) -> Iterator[str]:
    """Averages and choices by name: whoever means them names them with --pattern."""
    names = defaultdict[str, list[str]](list)
    for one in ignored:
        if one.reason.endswith(MADE_OF_OTHERS):
            names[one.reason].append(one.path.name)
    for reason, found in names.items():
        yield f"note: {listed(found, most=3)} left out: {reason}"
