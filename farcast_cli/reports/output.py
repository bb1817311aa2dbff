"""The file of a report: its form by the name's ending, and what it may replace."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.errors import OutputError, UsageError, shell_word
from farcast_cli.files.place import check_place, open_new
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.files.staged import staged
from farcast_cli.optional import need

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.files.staged import Check
    from farcast_cli.reports.story import Story

ENDINGS = (".html", ".png", ".md")
MAX_BYTES = 1 << 26  # of a file that can be a report
SOFTWARE = "farcast report"
_MARK = "<!-- farcast report {} -->\n"
"""The last line of a page and of Markdown, with the SHA-256 of all above it: a report that somebody edited is not replaced."""
_MARK_KEY = b"farcast sha256\0"  # of a text in a picture, with the SHA-256 of all other bytes
_END_BYTES = 12  # of a PNG's last chunk


def check_form(place: Path | None) -> None:
    """See that a file's name is that of a report that can be made here.

    Raises:
        UsageError: no ending of a report, or a package that its form needs is missing.
    """
    if place is None:
        return
    if place.suffix not in ENDINGS:
        raise UsageError(f"-o {place}: expected a name that ends in {', '.join(ENDINGS)}", hint=f"-o {shell_word(place)}.html")
    if place.suffix != ".md":
        need("matplotlib", f"a report in {place.suffix}")


def check_output(place: Path | None, run: Path, *, overwrite: bool) -> None:
    """See that a report may be written at a place, before anything is computed.

    Raises:
        OutputError: the place is in the run's folder, or a file is there that farcast did not write.
    """
    if place is not None:
        check_place(place, run=run, existing=_existing(overwrite=overwrite))


def write_report(story: Story, place: Path | None, *, overwrite: bool) -> None:
    """Write the report, completely or not at all. It is as private as the run's newest snapshot, if that is still there.

    Raises:
        OutputError: it cannot be written.
    """
    if place is None:
        return
    raw, newest = _content(story, place), story.fitted.directory / story.fitted.provenance.snapshots[-1].path
    with staged(place, check=_existing(overwrite=overwrite)) as temporary, open_new(temporary, like=newest) as file:
        file.write(raw)


def _content(story: Story, place: Path) -> bytes:
    if place.suffix == ".md":
        from farcast_cli.reports.text import markdown

        return _marked(markdown(story))
    if place.suffix == ".png":
        from farcast_cli.reports.figures import picture

        return _marked_picture(picture(story, software=f"{SOFTWARE} {__version__}"))
    from farcast_cli.reports.page import page

    return _marked(page(story))


def _marked(text: str) -> bytes:
    raw = text.encode()
    return raw + _MARK.format(hashlib.sha256(raw).hexdigest()).encode()


def _marked_picture(raw: bytes) -> bytes:
    """A PNG with its mark before the last chunk."""
    return raw[:-_END_BYTES] + _picture_mark(raw) + raw[-_END_BYTES:]


def _picture_mark(raw: bytes) -> bytes:
    """The tEXt chunk that marks a picture.

    Source: Portable Network Graphics (third edition), W3C, 5.3 and 11.3.3.2.
    """
    content = b"tEXt" + _MARK_KEY + hashlib.sha256(raw).hexdigest().encode()
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def _existing(*, overwrite: bool) -> Check:
    return _check_file if overwrite else _check_report


def _check_file(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise OutputError(f"{path}: expected a file, found a folder", hint="choose another file with -o")


def _check_report(path: Path) -> None:
    """A report that nobody edited may be replaced; anything else is the user's own."""
    _check_file(path)
    if os.path.islink(path) or not path.is_file() or not _is_report(path):  # noqa: PTH114 - of a path that may lead nowhere
        raise OutputError(
            f"{path}: exists and is not a report that farcast wrote, or has changed since",
            hint="--overwrite replaces it; -o OUT writes elsewhere",
        )


def _is_report(path: Path) -> bool:
    size = file_size(path)
    raw = read_bytes(path, 0, size) if size <= MAX_BYTES else b""
    if raw.startswith(b"\x89PNG"):
        start = len(raw) - _END_BYTES - len(_picture_mark(b""))
        return start > 0 and raw == _marked_picture(raw[:start] + raw[-_END_BYTES:])
    mark = _MARK.format(hashlib.sha256(raw[: -len(_MARK.format("0" * 64))]).hexdigest()).encode()
    return raw.endswith(mark)
