"""The same tuning once more: an output that is there already, unchanged, and made of the same files in the same way.

It is never enough that something has the name. Its content must be what its record lists, and its record what this request
would write. Nothing of the layer is read for that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError

from farcast_cli.errors import FarcastError, OutputError, visible
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import check_ours, read_sidecar, sidecar_of
from farcast_cli.files.staged import refuse_existing
from farcast_cli.records import TuneSidecar
from farcast_cli.repeat import changed_since
from farcast_cli.tune.delta import read_about
from farcast_cli.tune.record import outcome_of

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.files.staged import Check
    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.request import TuneOutcome


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

    def exists_already(self, why: str) -> OutputError:
        return OutputError(
            f"{self.path}: exists already, {why}", hint=f"--overwrite replaces it; {self.option} OTHER writes elsewhere"
        )

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
        """See that what has the name can be compared with a request, or replaced: it is what `tune` wrote, unchanged."""
        self.read_record()

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
            raise self.exists_already("not as farcast tune wrote it") from error
        raise self.exists_already("not written by farcast tune")

    def changed_ns(self) -> int:
        """When an output was written."""
        return (self.path if self.is_delta else sidecar_of(self.path, is_file=self.is_file)).stat().st_mtime_ns


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
    was, now = _options(found), _options(asked)
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


def _options(record: TuneSidecar) -> dict[str, object]:
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
