"""What a person can do where no forecast was written: only what was tried against the run's own history, and works."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.errors import FarcastError, shell_word
from farcast_cli.prediction import Judged, judge, origin_of, plan
from farcast_cli.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.request import Outcome


def advice(fitted: Fitted, request: Request, outcomes: Sequence[Outcome]) -> str:
    """The ways on after a call that wrote nothing, in one line. Reads headers at most, and plans what it proposes.

    Args:
        outcomes: of that call, none with a path.
    """
    return "; ".join(_ways(fitted, request, outcomes))


def _ways(fitted: Fitted, request: Request, outcomes: Sequence[Outcome]) -> Iterator[str]:
    if not _is_finished(fitted, request):
        yield "keep training and fit again"
    if not any(outcome.trials for outcome in outcomes):  # else it was not the history that was against it
        yield from _supported(fitted, request)
    forced = _planned(fitted, replace(request, even_if_worse=True))
    if forced and not (request.purpose == "resume" and forced.method.averages):  # such a method puts a run back
        yield "--even-if-worse writes it anyway"


def _is_finished(fitted: Fitted, request: Request) -> bool:
    """Whether the trainer's state says that no step is left to train after a leap."""
    try:
        return request.purpose == "resume" and request.counters == "advance" and origin_of(fitted, request).ends_before(1)
    except FarcastError:
        return False


def _supported(fitted: Fitted, request: Request) -> Iterator[str]:
    """The commands by which the run's history supports a forecast."""
    place = request.output if request.output and request.output.endswith(("/", os.sep)) else None
    bare = Request(
        purpose=request.purpose,
        origin_step=request.origin_step,
        counters=request.counters,
        output=place,
        resources=request.resources,
    )
    is_bare = not (request.horizons or request.to_step is not None or request.method)
    proposed = None if is_bare else _planned(fitted, bare)
    if proposed and request.purpose == "resume":
        yield _command(request, f" --horizon {proposed.request.horizons[0]}") + " is supported by the history"
    if (proposed or request.purpose == "resume") and _planned(fitted, replace(bare, purpose="evaluation")):
        yield _command(request, " --for evaluation") + " writes the weights to evaluate or ship"


def _planned(fitted: Fitted, request: Request) -> Judged | None:
    """What is judged of another request; None where it would fail or write nothing."""
    try:
        found = judge(fitted, replace(request, dry_run=True))
        if found.chosen:
            plan(fitted, found)
    except FarcastError:
        return None
    return found if found.chosen else None


def _command(request: Request, more: str) -> str:
    """A command to paste: with the place if that is a folder, as another horizon has another name."""
    counters = " --counters keep" if request.counters == "keep" and request.purpose == "resume" else ""
    place = f" -o {shell_word(request.output)}" if request.output and request.output.endswith(("/", os.sep)) else ""
    return f"farcast predict{request.source}{request.origin_option}{more}{counters}{place}"
