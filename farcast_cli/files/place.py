"""Where an output and its sidecar lie, and what may be there already.

An output never lies inside the run's folder, and it never replaces anything that farcast did not write. The sidecar tells
what farcast wrote: it lists every file of the output with its size and a fingerprint.
"""

from __future__ import annotations

import hashlib
import os
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, BinaryIO

from farcast_cli import system
from farcast_cli.errors import FarcastError, OutputError
from farcast_cli.files.hidden import clear_left
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import address_for, file_size, local, mode_of, placed, portable, read_bytes, short_name
from farcast_cli.files.staged import refuse_existing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from farcast_cli.files.staged import Check

SIDECAR = "farcast.json"
FINGERPRINT_BYTES = 1 << 16  # from the start, the middle and the end of a file: training changes every one of them
_MAX_SIDECAR = 64 << 20  # bytes


def sidecar_of(place: Path, *, is_file: bool) -> Path:
    """Where an output's provenance lies: inside a folder, beside a file under its whole name."""
    return place.with_name(f"{place.name}.{SIDECAR}") if is_file else place / SIDECAR


def open_new(path: Path, *, like: Path) -> BinaryIO:
    """A new file, with the permissions that all files of a checkpoint have, within the umask.

    What is learned from private weights is as private as they are.
    """
    files = [like] if like.is_file() else [file for file in like.rglob("*") if file.is_file()]
    mode = reduce(and_, map(mode_of, files), 0o666) | 0o600
    return os.fdopen(system.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")


def list_files(place: Path) -> list[dict[str, Any]]:
    """The files of an output, each with its size in bytes and its fingerprint; the sidecar is left out.

    Reads at most three blocks of each.
    """
    if place.is_file():
        return [_described(place, place.name)]
    found = sorted(path for path in place.rglob("*") if path != place / SIDECAR and (path.is_symlink() or _is_leaf(path)))
    return [_described(path, path.relative_to(place).as_posix()) for path in found]


def _is_leaf(path: Path) -> bool:
    """A file, or a folder that is empty: farcast makes none, so somebody else did."""
    return not path.is_dir() or not any(path.iterdir())


def _described(path: Path, name: str) -> dict[str, Any]:
    if path.is_dir() and not path.is_symlink():
        return {"name": portable(name), "bytes": 0, "fingerprint": ""}
    return {"name": portable(name), "bytes": file_size(path), "fingerprint": _fingerprint(path)}


def _fingerprint(path: Path) -> str:
    size = file_size(path)
    count = min(size, FINGERPRINT_BYTES)
    whole = hashlib.sha256()
    for offset in sorted({0, (size - count) // 2, size - count}):
        whole.update(read_bytes(path, offset, count))
    return whole.hexdigest()[:32]


def check_place(
    place: Path,
    *,
    run: Path | None,
    existing: Check = refuse_existing,
    has_sidecar_beside: bool = False,
    clears: bool = True,
    option: str = "-o",
) -> None:
    """See that an output may be written at a place: outside the run, and over nothing but what may be replaced.

    What killed processes left of the output is removed, once it is known to lie outside the run.

    Args:
        run: the run's folder; None for a checkpoint that is by itself.
        existing: of what lies there already.
        has_sidecar_beside: whether the output is a file with a sidecar of its own.
        clears: whether leftovers may be removed; a dry run changes nothing.
        option: the one that names the place.

    Raises:
        OutputError: it may not, or another process writes this output.
    """
    if not place.name:
        raise OutputError(f"{option} {place}: expected the path of an output, found one without a name", hint=f"{option} OUT")
    beside = [sidecar_of(place, is_file=True)] if has_sidecar_beside else []
    if run is not None:
        check_outside(place, run, option=option)
    for path in [place, *beside] if clears else []:
        clear_left(path)
    if os.path.lexists(place):
        existing(place)
    for path in beside:
        if os.path.lexists(path):
            check_sidecar_ours(path)


def check_outside(place: Path, run: Path, *, option: str = "-o") -> None:
    """See that an output does not lie in the run's folder.

    Raises:
        OutputError: it does.
    """
    its_run = address_for(run)
    is_inside = its_run is not None and f"{address_for(place)}/".startswith(f"{its_run}/")
    if is_inside or any(place.resolve().is_relative_to(home) for home in _homes(run)):
        raise OutputError(
            f"{place}: lies inside the run's folder {run}",
            hint=f"the trainer could resume from it or delete it: choose a place outside with {option}",
        )


def _homes(run: Path) -> set[Path]:
    """The run's folder, and the folders in which its entries really lie, if they are links."""
    entries = list(run.iterdir()) if run.is_dir() else []
    return {run.resolve(), *(entry.resolve().parent for entry in entries if entry.is_symlink())}


def check_ours(place: Path, *, is_file: bool, run: Path) -> None:
    """See that an output is one that farcast wrote for a run, and that nothing has changed it since.

    Raises:
        OutputError: it is not.
    """
    check_run(place, is_file=is_file, run=run)
    hint = "farcast replaces only what it wrote itself, unchanged: -o OUT writes elsewhere"
    sidecar = sidecar_of(place, is_file=is_file)
    content = read_sidecar(sidecar)
    if content is None or (is_file and content.get("name") != portable(place.name)) or place.is_symlink():
        raise OutputError(f"{place}: exists and is not a forecast", hint=hint)
    told, found = content.get("files"), _list_or_none(place)
    if told == found and found is not None and not _is_newer(place, sidecar):
        return
    known = [one.get("name") for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    strangers = sorted(one["name"] for one in found or [] if one["name"] not in known)
    what = f"holds {strangers[0]!r}, which farcast did not write" if strangers else "has changed since farcast wrote it"
    raise OutputError(f"{place}: {what}", hint=hint)


def check_run(place: Path, *, is_file: bool, run: Path) -> None:
    """See that an output is not one that farcast wrote for another run.

    Raises:
        OutputError: it is.
    """
    content = read_sidecar(sidecar_of(place, is_file=is_file))
    if other := content and other_run(content, place.parent, run):
        raise OutputError(
            f"{place}: exists already, a forecast of another run, {other}",
            hint="-o OUT writes elsewhere; or remove it yourself",
        )


def folders_for(run: Path, parent: Path) -> list[Path]:
    """The folders that may be a run's own, in the order of choice: `ckpts`, then `a-ckpts`, `x-a-ckpts`.

    Its own name comes first; the names of the folders above tell it from another run of that name.
    """
    parts = run.resolve().parts[1:] or ("run",)
    return [parent / short_name("-".join(parts[start:])) for start in reversed(range(len(parts)))]


def other_run(content: Mapping[str, Any], home: Path, run: Path) -> Path | None:
    """The run that an output was made of, if that is another than `run`; None if the sidecar does not tell.

    A sidecar of an earlier version names only the origin.

    Args:
        content: of the sidecar.
        home: the folder of the output; the paths in the sidecar are relative to it.
    """
    try:
        if "run" in content:
            told = placed(home.resolve(), local(content["run"]))
            return None if told == run.resolve() else told
        origin = placed(home.resolve(), local(content["origin"]))
    except (KeyError, TypeError, AttributeError, ValueError, OSError):
        return None
    return None if any(origin.is_relative_to(own) for own in _homes(run)) else origin.parent


def check_sidecar_ours(sidecar: Path) -> None:
    """See that a sidecar beside a file is one that farcast wrote for that file.

    Raises:
        OutputError: it is something else.
    """
    content = None if sidecar.is_symlink() else read_sidecar(sidecar)
    if content is None or content.get("name") != portable(sidecar.name.removesuffix(f".{SIDECAR}")):
        raise OutputError(
            f"{sidecar}: exists and is not a forecast's sidecar", hint="move it away, or choose another place with -o"
        )


def _is_newer(place: Path, sidecar: Path) -> bool:
    """Whether a file was written to after the sidecar, which farcast writes last; a store has each file's time of upload."""
    if address_for(place):
        return False
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path != sidecar and path.is_file()]
    return any(path.stat().st_mtime_ns > sidecar.stat().st_mtime_ns for path in files)


def _list_or_none(place: Path) -> list[dict[str, Any]] | None:
    try:
        return list_files(place)
    except (FarcastError, OSError):
        return None


def only_file_of(place: Path) -> Path | None:
    """The checkpoint's file in a folder that farcast wrote around it; None where the folder is anything else."""
    told = (read_sidecar(place / SIDECAR) or {}).get("files")
    names = [one.get("name") for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    found = place / local(names[0]) if len(names) == 1 and isinstance(names[0], str) else None
    return found if found and found.parent == place and found.is_file() else None


def read_sidecar(sidecar: Path) -> dict[str, Any] | None:
    """What a sidecar says; None where there is none, or something else."""
    try:
        size = file_size(sidecar)
        content = parse_json(read_bytes(sidecar, 0, size)) if sidecar.is_file() and size <= _MAX_SIDECAR else None
    except (FarcastError, ValueError):
        return None
    return content if isinstance(content, dict) and "farcast_version" in content else None
