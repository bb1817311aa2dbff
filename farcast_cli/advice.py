"""What a person can do where no forecast was written: only what was tried against the run's own history, and works."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.errors import FarcastError, shell_word
from farcast_cli.predict import Judged, judge, origin_of
from farcast_cli.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.request import Outcome, Start


def advice(fitted: Fitted, request: Request, outcomes: Sequence[Outcome]) -> str:
    """The ways on after a call that wrote nothing, in one line. Reads the origin's headers at most.

    Args:
        outcomes: of that call, none with a path.
    """
    return "; ".join(_ways(fitted, request, outcomes, _start(fitted, request)))


def _start(fitted: Fitted, request: Request) -> Start | None:
    """The origin; None where its files are gone, so that nothing can be written from it."""
    try:
        return origin_of(fitted, request)
    except FarcastError:
        return None


def _ways(fitted: Fitted, request: Request, outcomes: Sequence[Outcome], start: Start | None) -> Iterator[str]:
    advances = request.purpose == "resume" and request.counters == "advance"
    if not (advances and start and start.ends_before(1)):
        yield "keep training and fit again"
    if start is None:
        return
    if not any(outcome.trials for outcome in outcomes):  # else it was not the history that was against it
        yield from _supported(fitted, request)
    averages = request.purpose == "resume" and _is_refused_as_average(fitted, request)
    if not averages and not (advances and any(start.ends_before(outcome.horizon) for outcome in outcomes)):
        yield "--even-if-worse writes it anyway"


def _is_refused_as_average(fitted: Fitted, request: Request) -> bool:
    """Whether it is a method that puts a run back: it is not to be resumed from, whatever the history says."""
    return judge(fitted, request).method.averages


def _supported(fitted: Fitted, request: Request) -> Iterator[str]:
    """The commands by which the run's history supports a forecast."""
    bare = Request(
        origin_step=request.origin_step, purpose=request.purpose, resources=request.resources, counters=request.counters
    )
    proposed = _judged(fitted, bare) if request.horizons or request.to_step is not None or request.method else None
    if proposed and request.purpose == "resume":
        yield _command(request, f" --horizon {proposed.request.horizons[0]}") + " is supported by the history"
    evaluated = _judged(fitted, replace(bare, purpose="evaluation"))
    if evaluated and (request.purpose == "resume" or proposed):
        yield _command(request, " --for evaluation") + " writes the weights to evaluate or ship"


def _judged(fitted: Fitted, request: Request) -> Judged | None:
    """What is judged of another request; None where it would write nothing."""
    try:
        found = judge(fitted, request)
    except FarcastError:
        return None
    return found if found.is_supported else None


def _command(request: Request, more: str) -> str:
    """A command to paste: with the place if that is a folder, as another horizon has another name."""
    origin = "" if request.origin_step is None else f" --origin {request.origin_step}"
    counters = " --counters keep" if request.counters == "keep" and request.purpose == "resume" else ""
    place = f" -o {shell_word(request.output)}" if request.output and request.output.endswith(os.sep) else ""
    return f"farcast predict{request.source}{origin}{more}{counters}{place}"
