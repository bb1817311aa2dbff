"""What all ranks of a call must have planned alike, before any of them writes: digests, which are compared part by part."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.checkpoint.pieces import Copy, Fixed, Values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farcast_cli.checkpoint.pieces import Piece
    from farcast_cli.request import Prepared
    from farcast_cli.trainers.base import Snapshot


def agreed(prepared: Prepared) -> dict[str, str]:
    """Digests by part, as `Team.open` compares them.

    Snapshots agree if their headers do, and the name, the size and the time of change of each file; where they lie may
    differ. Reads headers, and one block of each snapshot.
    """
    linear = prepared.engine.inputs.linear
    arrays = (linear.weights, linear.gain, linear.constant)
    return {
        "version": __version__,
        "files": _digest(text for one in (*prepared.snapshots, prepared.origin) for text in _files_of(one)),
        "coefficients": _digest(
            [repr((linear.origin, *(array.shape for array in arrays))), *(array.tobytes() for array in arrays)]
        ),
        "plan": _digest(_plans_of(prepared)),
    }


def _digest(parts: Iterator[str | bytes] | list[str | bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode(errors="surrogateescape")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def _files_of(snapshot: Snapshot) -> Iterator[str]:
    yield f"{snapshot.path.name} {snapshot.step} {snapshot.digest}"
    for path, (size, changed_ns, _) in sorted(snapshot.marks.items()):
        yield f"{path.name} {size} {changed_ns}"


def _plans_of(prepared: Prepared) -> Iterator[str | bytes]:
    for path, plan in zip(prepared.paths, prepared.plans, strict=True):
        yield path.name
        for output in plan:
            yield f"{output.name} {output.mode} {output.folder_mode} {output.joined!r}"
            for section in output.sections:
                yield repr(section.checksums_at)
                yield from map(_piece, section.pieces)


def _piece(piece: Piece) -> str | bytes:
    if isinstance(piece, Fixed):
        return piece.data
    if isinstance(piece, Copy):
        return f"copy {piece.path.name} {piece.offset} {piece.num_bytes}"
    if isinstance(piece, Values):
        entry = piece.entry
        return f"values {entry.name} {entry.offset} {entry.shape} {piece.index} {piece.dtype.name} {piece.non_negative} {piece.begin}"
    return f"zeros {piece.num_bytes}"
