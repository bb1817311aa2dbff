"""The record of a tuning: what was asked for, what came of it, and whether the same was done before.

The sidecar of a checkpoint holds it, or the metadata of a delta file. What was asked for is known before anything is tuned,
so that the record of an output that is there already can be compared with it. It is never enough that something has the name:
its content must be what its record lists, and its record what this request would write. Nothing of the layer is read for that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from farcast_cli import __version__
from farcast_cli.errors import FarcastError, OutputError, visible
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import check_ours, read_sidecar, sidecar_of
from farcast_cli.files.reading import file_size, portable, relative, sha256_of
from farcast_cli.files.staged import refuse_existing
from farcast_cli.records import CheckpointFile, HeldOut, RowsFile, TunedOn, TuneOptions, TuneSidecar
from farcast_cli.repeat import changed_since
from farcast_cli.tune.delta import read_about
from farcast_cli.tune.gate import GateResult
from farcast_cli.tune.request import TuneOutcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.files.staged import Check
    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.delta import Rounded
    from farcast_cli.tune.request import TuneRequest


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output of `tune` goes, and which option says so."""

    path: Path
    option: str
    is_file: bool
    overwrite: bool = False

    @property
    def is_delta(self) -> bool:
        """A delta file has its record in its metadata; a checkpoint has a sidecar."""
        return self.option == "--delta-out"

    @property
    def is_taken(self) -> bool:
        return os.path.lexists(self.path)

    def exists_already(self, why: str, *, is_ours: bool = True) -> OutputError:
        replaces = "--overwrite replaces it; " if is_ours else ""
        return OutputError(f"{self.path}: exists already, {why}", hint=f"{replaces}{self.option} OTHER writes elsewhere")

    def read_record(self) -> TuneSidecar:
        """What an output says of itself. Reads a delta file whole, and three blocks of each file of a checkpoint.

        Raises:
            OutputError: it is not what `tune` wrote, it has changed since, or it does not tell all that decides.
        """
        try:
            return TuneSidecar.model_validate(self._content())
        except ValidationError as error:
            raise self.exists_already("made in a way that its record does not tell") from error

    def check_record(self, _path: Path) -> None:
        """See that what has the name may be replaced: it is what `tune` wrote, unchanged."""
        self._content()

    @property
    def check(self) -> Check:
        """Of what has the name right before the output gets it."""
        return self.check_record if self.overwrite else refuse_existing

    def _content(self) -> object:
        try:
            if self.is_delta:
                return parse_json(read_about(self.path).encode("utf-8", "surrogateescape"))
            content = read_sidecar(sidecar_of(self.path, is_file=self.is_file))
            if content and content.get("command") == "tune":
                check_ours(self.path, is_file=self.is_file, run=self.path)
                return content
        except (FarcastError, ValueError) as error:
            raise self.exists_already("not as farcast tune wrote it", is_ours=False) from error
        raise self.exists_already("not written by farcast tune", is_ours=False)

    def changed_ns(self) -> int:
        """When an output was written."""
        return (self.path if self.is_delta else sidecar_of(self.path, is_file=self.is_file)).stat().st_mtime_ns


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
                before=verdict.before, after=verdict.after, z=verdict.z, rows=verdict.num_groups, judged_by=verdict.judged_by
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
        verdict=GateResult(
            held_out.before, held_out.after, z, record.gate, tuned.rows, held_out.rows, judged_by=held_out.judged_by
        ),
        num_rows=tuned.rows,
        iterations=record.iterations or 0,
        tuned_loss=(tuned.before, tuned.after),
        sizes=tuple(float("inf") if size is None else size for size in record.relative_change),
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
    own = request.settings
    files = {"anchor": request.anchor, "covariance": request.covariance, "val": request.val}
    paths = {name: None if path is None else relative(path, home) for name, path in files.items()}
    digests = {f"{name}_sha256": None if path is None else sha256_of(path) for name, path in files.items()}
    return TuneOptions(
        loss=request.loss,
        activation=request.activations,
        bias=request.biases,
        head=request.head,
        head_bias=request.head_bias,
        anchor_weight=request.anchor_weight,
        transposed=request.is_transposed,
        iterations=own.iterations,
        rate=own.rate,
        momentum=own.momentum,
        weight_decay=own.weight_decay,
        ridge=own.ridge,
        subsample=request.subsample,
        **paths,
        **digests,
    )


# --- the same once more -------------------------------------------------------------------------------------------------


def repeated(place: Place, asked: TuneSidecar, snapshot: Snapshot) -> TuneOutcome:
    """What came of the same request when it was made before.

    Raises:
        OutputError: what is there was made of other files, or in another way.
    """
    found = place.read_record()
    if problem := _made_otherwise(found, asked) or changed_since(place.changed_ns(), snapshot):
        raise place.exists_already(problem)
    return outcome_of(found, place.path)


def _made_otherwise(found: TuneSidecar, asked: TuneSidecar) -> str:
    """In what a record differs from what is asked for, in words; "" where it does not."""
    if found.farcast_version != asked.farcast_version:
        return f"made by farcast {visible(found.farcast_version)}"
    was, now = _deciding(found), _deciding(asked)
    if was.keys() != now.keys():
        return f"made with{'out' if asked.delta else ''} --apply"
    if differ := [
        f"{option} {_spelled(was[option])}, now {_spelled(now[option])}" for option in now if was[option] != now[option]
    ]:
        return f"made with {'; '.join(differ)}"
    if found.input != asked.input:
        return f"made from another checkpoint, {visible(found.input.path)}"
    return "" if found.name == asked.name else f"made under the name {visible(found.name)}"


@dataclass(frozen=True, slots=True)
class _File:
    """A file that decides, by its content."""

    sha256: str | None
    path: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.path} (SHA-256 {(self.sha256 or 'not recorded')[:12]})"


def _deciding(record: TuneSidecar) -> dict[str, object]:
    """Every option that decides, with its value."""
    named = {"layer": record.layers, "method": record.method, "round": record.round, "seed": record.seed}
    files: dict[str, object] = {}
    if record.delta is not None:
        files["--apply"] = _File(record.delta_sha256, record.delta)
    if options := record.options:
        whole = options.model_dump()
        for name in ("anchor", "covariance", "val"):
            path, digest = whole.pop(name), whole.pop(f"{name}_sha256")
            files[f"--{name}"] = path and _File(digest, path)
        named |= {"gate": record.gate, **whole}
    if record.data:
        files["--data"] = _File(record.data.sha256, record.data.path)
    return {f"--{key.replace('_', '-')}": value for key, value in named.items()} | files


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        value = ", ".join(map(str, value)) or None
    return "none" if value is None else visible(str(value))
