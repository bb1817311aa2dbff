"""What all ranks of a call must have planned alike, before any of them works: digests, which are compared part by part."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.checkpoint.pieces import Copy, Fixed, Values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from farcast_cli.checkpoint.pieces import OutputFile, Piece
    from farcast_cli.engine.linear import LinearMap
    from farcast_cli.trainers.base import Snapshot


def agreed(
    snapshots: Iterable[Snapshot], plan: Iterable[str | bytes], *, coefficients: Iterable[str | bytes] = (), engine: str = ""
) -> dict[str, str]:
    """Digests by part, as `Team.open` compares them.

    Snapshots agree if their headers do, and the name, the size and the time of change of each file; where they lie may
    differ. Reads headers, and one block of each snapshot.

    Args:
        plan: what is to be done.
        coefficients: of the forecasts; another processor may round them in another way.
        engine: what sums up, if sums are shared; the kernel and numpy round them in different ways.
    """
    return {
        "version": __version__,
        "engine": engine,
        "files": _digest(text for one in snapshots for text in _files_of(one)),
        "coefficients": _digest(coefficients),
        "plan": _digest(plan),
    }


def _digest(parts: Iterable[str | bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode(errors="surrogateescape")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def _files_of(snapshot: Snapshot) -> Iterator[str]:
    yield f"{snapshot.path.name} {snapshot.step} {snapshot.digest}"
    for path, (size, changed_ns, _) in sorted(snapshot.marks.items()):
        yield f"{path.name} {size} {changed_ns}"


def numbers_of(linear: LinearMap) -> Iterator[str | bytes]:
    """The coefficients of forecasts."""
    arrays = (linear.weights, linear.gain, linear.constant)
    yield repr((linear.origin, *(array.shape for array in arrays)))
    yield from (array.tobytes() for array in arrays)


def bytes_of(paths: Sequence[Path], plans: Sequence[Sequence[OutputFile]]) -> Iterator[str | bytes]:
    """What every byte of the outputs will be, and the names of the outputs."""
    for path, plan in zip(paths, plans, strict=True):
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
