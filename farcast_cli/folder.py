"""Which folder under `forecasts/` is a run's own.

It has the name of the run's folder. Where another run of that name has forecasts there, the names of the folders above come
before it: `ckpts`, `a-ckpts`, `x-a-ckpts`. What lies in a folder tells whose it is: the sidecars, and the memory of leaps. A run
stays in the folder that it has, also when a name before it becomes free.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from farcast_cli.choices import DEFAULT_FOLDER
from farcast_cli.errors import FarcastError, OutputError
from farcast_cli.files.place import SIDECAR, folders_for, other_run, read_sidecar
from farcast_cli.forecast.memory import MEMORY_ENDING, memory_of, read_memory

if TYPE_CHECKING:
    from pathlib import Path

OWN, ANOTHERS = "has forecasts of this run", "has forecasts of another run"


def folder_of(run: Path) -> Path:
    """Where the forecasts of a run and its memory go if the user names no place.

    An earlier version kept all memories in `forecasts/` itself. A run whose memory is there goes on there.

    Raises:
        OutputError: all names are taken.
    """
    if _memory_run(memory_of(DEFAULT_FOLDER, run)) == run.resolve():
        return DEFAULT_FOLDER
    holdings = [(folder, _holding(folder, run)) for folder in folders_for(run, DEFAULT_FOLDER)]
    found = next((folder for wanted in (OWN, "") for folder, holding in holdings if holding == wanted), None)
    if found is None:
        raise OutputError(f"{DEFAULT_FOLDER}: another run's forecasts have this run's place", hint="-o OUT/ writes elsewhere")
    return found


def note_on(folder: Path, run: Path) -> str:
    """What a person should know of the name of a run's folder; "" if it is the usual one."""
    usual, *others = folders_for(run, DEFAULT_FOLDER)
    holding = _holding(usual, run) if folder in others else ""
    return f"{usual} {holding}: the forecasts of this run are in {folder}" if holding else ""


def _holding(folder: Path, run: Path) -> str:
    """What a folder holds, in words; "" where it is free. A forecast itself is no place for others."""
    if not os.path.lexists(folder):
        return ""
    if not folder.is_dir():
        return "is a file"
    if read_sidecar(folder / SIDECAR):
        return "is itself a forecast"
    try:
        found = {_holding_of(entry, run) for entry in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror}", hint="-o OUT/ writes elsewhere") from error
    return next((one for one in (ANOTHERS, OWN) if one in found), "")


def _holding_of(entry: Path, run: Path) -> str:
    if entry.name.endswith(MEMORY_ENDING):
        owner = _memory_run(entry)
        return "" if owner is None else OWN if owner == run.resolve() else ANOTHERS
    content = read_sidecar(entry if entry.name.endswith(f".{SIDECAR}") else entry / SIDECAR)
    if content is None:
        return ""
    return OWN if other_run(content, entry.parent, run) is None else ANOTHERS


def _memory_run(path: Path) -> Path | None:
    """Whose memory a file is; None where there is none, or a damaged one."""
    try:
        memory = read_memory(path)
    except FarcastError:
        return None
    return memory.run if memory else None
