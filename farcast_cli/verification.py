"""What a forecast was worth, once the truth exists: ||forecast - truth|| / ||reference - truth||.

One pass over three checkpoints; memory is one stretch of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.engine.reader import Reader, Scratch, TensorStretches, read_trajectory, stretches
from farcast_cli.errors import FarcastError, FileFormatError, SnapshotError, UnreadableError, UsageError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import sidecar_of
from farcast_cli.files.reading import file_size, local, read_bytes, reading
from farcast_cli.forecast.history import resumed_from
from farcast_cli.forecast.ledger import Leap
from farcast_cli.remote.mirror import opened
from farcast_cli.results import TensorRatio, VerifyAnswer
from farcast_cli.run.alignment import align
from farcast_cli.run.trajectory import discover, open_snapshot
from farcast_cli.state.rates import read_pace
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.base import LeapMark

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farcast_cli.choices import ClockName
    from farcast_cli.run.alignment import AlignedTensor, Alignment
    from farcast_cli.trainers.base import Snapshot


@dataclass(slots=True)
class _Sums:
    forecast: float = 0.0
    reference: float = 0.0
    absolute: float = 0.0
    count: int = 0


def find_reference(forecast: Path) -> Path:
    """The origin that a forecast was made from, by its sidecar."""
    with reading(forecast):
        sidecar = sidecar_of(forecast, is_file=forecast.is_file())
        has_sidecar, is_there = sidecar.exists(), forecast.exists()
    if not is_there:
        raise SnapshotError(
            f"{forecast}: no such file or folder", hint="give the path that farcast predict printed", path=forecast
        )
    if not has_sidecar:
        raise UsageError(
            f"{forecast}: no {sidecar.name}, so its origin is unknown",
            hint="--reference CKPT names the last snapshot before the forecast",
        )
    try:
        origin = local(_told(sidecar)["origin"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{sidecar}: not a forecast's sidecar", hint="--reference CKPT") from error
    return opened(forecast.parent, origin)


def _told(sidecar: Path) -> Any:
    return parse_json(read_bytes(sidecar, 0, file_size(sidecar)))


def _told_of(forecast: Path) -> Any:
    """What a forecast's sidecar tells; None where there is none, or one that is no JSON."""
    sidecar = sidecar_of(forecast, is_file=forecast.is_file())
    if not sidecar.exists():
        return None
    try:
        return _told(sidecar)
    except UnreadableError:
        raise
    except (FileFormatError, ValueError):
        return None


def _weights_of(forecast: Path) -> tuple[str, ...]:
    """The keys of the weights that were forecast; none where no sidecar tells, or all networks were."""
    try:
        weights = _told_of(forecast)["options"]["weights"]
    except (KeyError, TypeError):
        return ()
    return tuple(map(str, weights)) if isinstance(weights, list) else ()


def _leap_of(forecast: Path, run: Path) -> Leap | None:
    """The leap that a run makes which resumes from a forecast; None where no sidecar tells."""
    told = _told_of(forecast)
    try:
        steps = {"origin_step": told["origin_step"], "valid_step": told["valid_step"]}
        return Leap(run=str(run), forecast=str(forecast), counters=told["options"]["counters"], **steps)
    except (ValueError, KeyError, TypeError):
        return None


def _descends(forecast: Path, reference: Snapshot, truth: Snapshot) -> bool:
    """Whether the truth comes from a run that resumed from the forecast, as its mark or the snapshots before it tell."""
    leap = _leap_of(forecast, truth.path.parent)
    if leap is None or truth.step <= leap.resumes_after:
        return False
    mark = LeapMark(leap.resumes_after, leap.origin_step, leap.valid_step)
    if mark in trainer_of(truth).marks(truth):
        return True
    try:
        found = discover(truth.path.absolute().parent, weights=truth.weights)
    except UnreadableError:
        raise
    except FarcastError:  # a folder that is no run tells nothing
        return False
    earlier = [one for one in found.snapshots if one.step < truth.step]
    begins = () if any(one.step <= leap.origin_step for one in earlier) else (reference,)  # a run that resumed in a new folder
    return resumed_from(leap, replace(found, snapshots=(*begins, *earlier, truth)))


def verify(
    forecast: Path, truth: Path, reference: Path, *, progress: Callable[[str, int], Callable[[int], None]]
) -> VerifyAnswer:
    """Compare three checkpoints of the same model, tensor by tensor.

    Raises:
        SnapshotError: they do not hold the same tensors.
    """
    weights = _weights_of(forecast)
    snapshots = [open_snapshot(path, weights) for path in (reference, forecast, truth)]
    alignment = align(snapshots)
    told = progress("verify", _bytes_of(alignment))
    reader, scratch, per_tensor, total = Reader(), Scratch(), [], _Sums()
    for tensor in alignment.tensors:
        sums = _compare(reader, scratch, tensor, told)
        per_tensor.append(TensorRatio(name=tensor.name, num_elements=tensor.num_elements, ratio=_ratio(sums)))
        for name in ("forecast", "reference", "absolute", "count"):
            setattr(total, name, getattr(total, name) + getattr(sums, name))
    if not total.count:
        raise SnapshotError(f"{forecast}: no values to compare")
    clock, trained = _trained(*snapshots)
    return VerifyAnswer(
        schema_version=1,
        ratio=_ratio(total),
        mean_absolute_error=total.absolute / total.count,
        reference=reference,
        forecast_step=snapshots[1].step,
        truth_step=snapshots[2].step,
        clock=clock,
        trained=trained,
        per_tensor=tuple(per_tensor),
        descends=_descends(forecast, snapshots[0], snapshots[2]),
    )


def _trained(reference: Snapshot, forecast: Snapshot, truth: Snapshot) -> tuple[ClockName, float | None]:
    """The share of the way from the reference to the forecast's step that the truth has behind it, and its unit."""
    start, valid, end = reference.step, forecast.step, truth.step
    if start < 0 or not start < min(valid, end):
        return "steps", None
    pace = read_pace([reference, truth], ahead=max(0, valid - end)).clocked(None, start, max(valid, end))
    whole = pace.total(start, valid)
    return pace.clock, pace.total(start, end) / whole if whole else None


def _bytes_of(alignment: Alignment) -> int:
    return sum(entry.num_bytes for tensor in alignment.tensors for entry in tensor.entries)


def _ratio(sums: _Sums) -> float | None:
    return (sums.forecast / sums.reference) ** 0.5 if sums.reference else None


def _compare(reader: Reader, scratch: Scratch, tensor: AlignedTensor, told: Callable[[int], None]) -> _Sums:
    sums = _Sums()
    for stretch in stretches(tensor.num_elements, num_snapshots=len(tensor.entries)):
        section = TensorStretches(tensor.entries, (stretch,))
        values = scratch.named("values", len(tensor.entries) * stretch.count, np.float64).reshape(-1, stretch.count)
        reference, forecast, truth = read_trajectory(reader, [section], values, scratch)
        error, nothing = forecast - truth, reference - truth
        sums.forecast += float(error @ error)
        sums.reference += float(nothing @ nothing)
        sums.absolute += float(np.abs(error).sum())
        sums.count += stretch.count
        told(section.num_bytes)
    return sums
