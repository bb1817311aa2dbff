"""The same request once more: a forecast that is there already, unchanged, and made of the same snapshots in the same way.

It is never enough that something has the name. Its files must be those that its sidecar lists, and its sidecar the one that
this request would write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from farcast_cli.choices import Verdict
from farcast_cli.errors import OutputError, visible
from farcast_cli.evaluation.judge import Trial
from farcast_cli.files.place import SIDECAR, check_ours, check_run, read_sidecar, sidecar_of
from farcast_cli.files.reading import local, mark_of, portable
from farcast_cli.files.staged import refuse_existing
from farcast_cli.sidecar import compose

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.records import FittedOn
    from farcast_cli.request import Outcome, Prepared, Request
    from farcast_cli.trainers.base import Snapshot

_NOT_COMPARED = ("evaluations", "files", "verdict")  # compared each in its own way
_OPTIONS = {"horizon": "--horizon", "for": "--for", "method": "--method", "clock": "--clock", "origin_step": "--origin"}
_COUNTED = {"step_from": ("--step-from", None), "unit": ("--unit", "step")}
"""What a sidecar leaves out if it is the default."""


def check_unchanged(place: Path, *, is_file: bool, run: Path) -> None:
    """See that what has a forecast's name is a forecast of this run that nothing has changed.

    Raises:
        OutputError: it is not: it exists already.
    """
    check_run(place, is_file=is_file, run=run)
    try:
        check_ours(place, is_file=is_file, run=run)
    except OutputError:
        refuse_existing(place)


def repeated(prepared: Prepared, index: int, finished: Outcome, request: Request, on: FittedOn) -> Outcome | None:
    """The outcome that a forecast which is there already stands for; None where the place is free.

    Args:
        finished: the outcome that writing it would have.

    Raises:
        OutputError: what is there was made in another way.
    """
    place, is_file = prepared.paths[index], prepared.container.is_one_file
    if request.overwrite or not os.path.lexists(place):
        return None
    check_unchanged(place, is_file=is_file, run=prepared.run)
    sidecar = sidecar_of(place, is_file=is_file)
    found: Any = read_sidecar(sidecar)
    wanted = json.loads(compose(prepared, finished, request, written=place, fitted_on=on).as_json())
    planned = {portable(file.name or place.name): file.num_bytes for file in prepared.plans[index]}
    try:
        later, made_ns = {SIDECAR, prepared.container.card}, mark_of(sidecar)[1]
        inputs = (*prepared.snapshots, prepared.origin)
        problem = _made_otherwise(found, wanted, planned, request, later) or changed_since(made_ns, *inputs)
        trials = _trials(found, place.parent)
    except (KeyError, TypeError, ValueError, AttributeError):
        problem, trials = "made in a way that its sidecar does not tell", ()
    if problem:
        raise OutputError(f"{place}: exists already, {problem}", hint="--overwrite replaces it; -o OUT writes elsewhere")
    decision = replace(finished.decision, verdict=found["verdict"])
    return replace(finished, existed=True, decision=decision, trials=trials)


def _made_otherwise(
    found: Any, wanted: dict[str, Any], planned: Mapping[str, int], request: Request, later: Collection[str]
) -> str:
    """In what a sidecar differs from the one that would be written, in words; "" where it does not.

    Args:
        later: the files that are written after those that are planned.
    """
    if found.get("farcast_version") != wanted["farcast_version"]:
        return f"made by farcast {visible(str(found.get('farcast_version')))}"
    if "momentum" in found:
        return "made by farcast leap"
    options = [_spelled(_OPTIONS[key], found.get(key)) for key in _OPTIONS if found.get(key) != wanted[key]]
    counted = {option: (found.get(key, usual), wanted.get(key, usual)) for key, (option, usual) in _COUNTED.items()}
    options += [_spelled(option, its) for option, (its, mine) in counted.items() if its != mine]
    options += _other_options(found.get("options"), wanted["options"])
    if bool(found.get("evaluations")) != (request.evaluator is not None):
        options.append("--eval-cmd" if found.get("evaluations") else "no --eval-cmd")
    if found["verdict"] not in get_args(Verdict):
        raise ValueError(found["verdict"])
    if found["verdict"] != "forecast" and not request.even_if_worse:
        options.append("--even-if-worse")
    if options:
        return f"made with {', '.join(options)}"
    judged = request.evaluator is not None
    if _compared(found, judged=judged) != _compared(wanted, judged=judged):
        return "made from other snapshots or other tensors"
    listed = {file["name"]: file["bytes"] for file in found["files"] if file["fingerprint"] and file["name"] not in later}
    return "" if listed == {name: size for name, size in planned.items() if name not in later} else "made with other files"


def _other_options(found: object, wanted: Mapping[str, Any]) -> list[str]:
    if not isinstance(found, Mapping):
        return ["other options"]
    return [_spelled(f"--{key.replace('_', '-')}", found.get(key)) for key in wanted if found.get(key) != wanted[key]]


def _spelled(option: str, value: object) -> str:
    return f"no {option}" if value is None else f"{option} {visible(str(value))}"


def _compared(content: dict[str, Any], *, judged: bool) -> dict[str, Any]:
    """What must be equal.

    Args:
        judged: by the evaluation command, which chooses a share of the update, and so the mean coefficients.
    """
    kept = {key: value for key, value in content.items() if key not in _NOT_COMPARED}
    if not judged:
        return kept
    return kept | {"inputs": [{k: v for k, v in one.items() if k != "mean_weight"} for one in content["inputs"]]}


def changed_since(made_ns: int, *snapshots: Snapshot) -> str:
    """Which file of some snapshots was written to after an output; a digest does not cover a trainer's state."""
    files = (file for snapshot in snapshots for file in snapshot.marks)
    newer = next((file for file in files if mark_of(file)[1] > made_ns), None)
    return f"and {newer} has changed since" if newer else ""


def _trials(found: dict[str, Any], home: Path) -> tuple[Trial, ...]:
    """The runs of the evaluation command, as the sidecar tells of them."""
    return tuple(
        Trial(
            float(one["strength"]),
            float("nan") if one["value"] is None else float(one["value"]),
            float(one["seconds"]),
            home / local(one["log"]) if one.get("log") else None,
        )
        for one in found.get("evaluations", ())
    )
