"""The record of a tuning: what was asked for, and what came of it.

The sidecar of a checkpoint holds it, or the metadata of a delta file. What was asked for is known before anything is tuned,
so that the record of an output that is there already can be compared with it (`repeat`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.files.reading import file_size, portable, relative, sha256_of
from farcast_cli.records import CheckpointFile, HeldOut, RowsFile, TunedOn, TuneOptions, TuneSidecar
from farcast_cli.tune.gate import GateResult
from farcast_cli.tune.request import TuneOutcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.delta import Rounded
    from farcast_cli.tune.request import TuneRequest


def asked_to_tune(request: TuneRequest, snapshot: Snapshot, place: Path) -> TuneSidecar:
    """What a request says. Reads the rows, the anchors and the covariance once, for their digests."""
    home = place.resolve().parent
    rows = RowsFile(path=relative(request.data, home), bytes=file_size(request.data), sha256=sha256_of(request.data))
    asked = _asked(snapshot, place, layers=request.layers, method=request.settings.method, rounded=request.rounded)
    return asked.model_copy(update={"gate": request.gate, "data": rows, "options": _options(request, home)})


def asked_to_apply(file: Path, snapshot: Snapshot, place: Path, *, layers: Sequence[str], rounded: Rounded) -> TuneSidecar:
    """The same of `--apply`. Reads the delta file once, for its digest."""
    asked = _asked(snapshot, place, layers=layers, method="apply", rounded=rounded)
    return asked.model_copy(update={"delta": relative(file, place.resolve().parent), "delta_sha256": sha256_of(file)})


def judged(asked: TuneSidecar, outcome: TuneOutcome, verdict: GateResult) -> TuneSidecar:
    """What was asked for, with what came of it."""
    before, after = outcome.tuned_loss
    return asked.model_copy(
        update={
            "held_out": HeldOut(
                before=verdict.before, after=verdict.after, z=verdict.z, rows=verdict.num_rows, judged_by=verdict.judged_by
            ),
            "tuned": TunedOn(before=before, after=after, rows=outcome.num_rows),
            "iterations": outcome.iterations,
            "relative_change": outcome.sizes,
            "notes": outcome.notes,
        }
    )


def outcome_of(record: TuneSidecar, place: Path) -> TuneOutcome:
    """What came of a tuning whose output is there already, as its record tells it."""
    outcome = TuneOutcome(record.layers, record.method, path=place, notes=record.notes, existed=True)
    held_out, tuned = record.held_out, record.tuned
    if held_out is None or tuned is None or record.gate is None:
        return outcome
    z = float("inf") if held_out.z is None else held_out.z
    return replace(
        outcome,
        verdict=GateResult(held_out.before, held_out.after, z, record.gate, held_out.rows, held_out.judged_by),
        num_rows=tuned.rows,
        iterations=record.iterations or 0,
        tuned_loss=(tuned.before, tuned.after),
        sizes=record.relative_change,
    )


def _asked(snapshot: Snapshot, place: Path, *, layers: Sequence[str], method: str, rounded: Rounded) -> TuneSidecar:
    """What every request says."""
    path = relative(snapshot.path, place.resolve().parent)
    return TuneSidecar(
        schema_version=1,
        command="tune",
        name=portable(place.name),
        farcast_version=__version__,
        layers=tuple(layers),
        method=method,
        input=CheckpointFile(path=path, bytes=snapshot.num_bytes, digest=snapshot.digest),
        round=rounded.how,
        seed=rounded.seed,
        notes=(),
    )


def _options(request: TuneRequest, home: Path) -> TuneOptions:
    settings, anchor, val, covariance = request.settings, request.anchor, request.val, request.covariance
    return TuneOptions(
        loss=request.loss,
        activation=request.activations,
        bias=request.biases,
        head=request.head,
        head_bias=request.head_bias,
        anchor=None if anchor is None else relative(anchor, home),
        anchor_sha256=None if anchor is None else sha256_of(anchor),
        anchor_weight=request.anchor_weight,
        covariance=None if covariance is None else relative(covariance, home),
        covariance_sha256=None if covariance is None else sha256_of(covariance),
        transposed=request.is_transposed,
        val=None if val is None else relative(val, home),
        val_sha256=None if val is None else sha256_of(val),
        iterations=settings.iterations,
        rate=settings.rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        ridge=settings.ridge,
        subsample=request.subsample,
    )
