"""The files of a snapshot's folder, links followed: where a link may lead, and which ones are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError, UnsafeFileError
from farcast_cli.files.reading import reading

if TYPE_CHECKING:
    from collections.abc import Iterator


def files_below(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file of a snapshot's folder with its name relative to the folder, sorted; links are followed.

    Raises:
        UnsafeFileError: a link that leads out of the run's folder, whose target a forecast would copy.
        FileFormatError: a link that leads nowhere or in a circle.
    """
    with reading(folder):
        found = sorted(_files_in(folder, _homes_of(folder), (Path(os.path.realpath(folder)),)))
    yield from ((path, path.relative_to(folder).as_posix()) for path in found)


def _homes_of(folder: Path) -> tuple[Path, ...]:
    """Where links inside a snapshot's folder may lead.

    Into the run's folder; into the folder's own place where the folder is a link; in a Hugging Face hub cache, whose
    snapshots/REV/FILE are links, to the blobs of the same repository.
    """
    real = Path(os.path.realpath(folder))
    blobs = real.parent.parent / "blobs"
    cache = (blobs,) if real.parent.name == "snapshots" and blobs.is_dir() else ()
    return (real, *cache) if folder.is_symlink() else (real.parent, *cache)


def _files_in(folder: Path, homes: tuple[Path, ...], above: tuple[Path, ...]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_symlink():
            _check_link(path, homes, above)
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from _files_in(path, homes, (*above, Path(os.path.realpath(path))))
        else:
            raise FileFormatError(f"{path}: neither a file nor a folder: it cannot be copied", hint="remove it")


def _check_link(path: Path, homes: tuple[Path, ...], above: tuple[Path, ...]) -> None:
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENOENT, errno.ENOTDIR}:
            raise
        where = "in a circle" if error.errno == errno.ELOOP else "nowhere"
        raise FileFormatError(f"{path}: a link that leads {where}", hint="remove it, or restore what it points to") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise UnsafeFileError(
            f"{path}: a link to {real}, outside the run's folder: a forecast would copy that file",
            hint="replace the link by the file itself, if it belongs to the checkpoint",
        )
    if any(place.is_relative_to(real) for place in above):
        raise FileFormatError(f"{path}: a link that leads in a circle", hint="remove it")
