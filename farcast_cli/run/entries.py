"""What in a folder looks like a snapshot of a run, and what looks like one and is none.

Links, temporary names, what was cut off, and what farcast itself wrote. No snapshot is read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING

from farcast_cli.errors import ANY_COMMAND, SnapshotError, TooFewSnapshotsError, listed, shell_word
from farcast_cli.files.place import sidecar_of
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.run.nothing import nothing_found
from farcast_cli.trainers import named, recognise, refuse_unread
from farcast_cli.trainers.foreign import foreign_at
from farcast_cli.trainers.names import find_step_in_name, is_alias, word_of_others

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.run.steps import Findings, Ignored, StepList, StepRange
    from farcast_cli.trainers.base import Layout

    Candidate = tuple[Path, Layout]

OWN_MARK = b'{"__metadata__":{"farcast":'
"""How the header of a forecaster file begins."""
MADE_OF_OTHERS = "made of other snapshots or chosen among them, no step of the run"
MAX_FOLDERS = 500  # looked into for runs
RUN_DEPTH = 3  # as in lightning_logs/version_0/checkpoints
MAX_HALF_WRITTEN = 4  # in a message, where each comes with its reason
MIN_OTHERS = 2  # snapshots of which an average can be made
LEAP_SNAPSHOTS = 3  # two stretches that agree
_TEMPORARY = re.compile(
    r"^te?mp[-_.]|[-_.](?:te?mp|partial|incomplete)$|\.(?:(?:file)?part|crdownload|(?:op)?download|aria2|!ut)$"
    r"|\.(?:tmp|\w+-tmp)[-_.]?\w*$",
    re.IGNORECASE,
)
"""Names of trainers, browsers and other programs for what they have not finished."""
_NUMBERS = re.compile(r"\d+(?:\.\d+)?")


def candidates_in(directory: Path, pattern: str, steps: StepRange | StepList | None, findings: Findings) -> list[Candidate]:
    """The entries that have a layout; everything else is noted with its reason."""
    if not directory.is_dir():
        what = "a file" if directory.exists() else "nothing"
        above = f": {shell_word(directory.parent)}" if directory.exists() else ""
        raise TooFewSnapshotsError(
            f"{directory}: expected a folder of checkpoints, found {what}",
            hint=f"name the folder that holds them{above}",
            path=directory,
        )
    entries = sorted((path for path in directory.iterdir() if not path.name.startswith(".")), key=_order)
    kinds = {path: recognise(path) for path in entries if not pattern or fnmatchcase(path.name, pattern)}
    links = _links_to_siblings(kinds)
    found = [(p, kind) for p, kind in kinds.items() if kind and p not in links and not _TEMPORARY.search(p.name)]
    of_others = _made_of_others([path for path, _ in found])
    reasons = {path: f"a link to {name}" for path, name in links.items()} | of_others
    reasons |= {path: "does not match --pattern" for path in entries if path not in kinds}
    for path, reason in reasons.items():
        findings.ignore(path, reason)
    _note_no_snapshots({p: kind for p, kind in kinds.items() if p not in reasons}, found, steps, findings)
    found = [(path, kind) for path, kind in found if path not in of_others]
    if not any(find_step_in_name(path.name) for path, _ in found) and not pattern:
        _refuse_folder_of_runs(directory)
    alone = None if any(find_step_in_name(path.name) for path, _ in found) else recognise(directory)
    if alone:
        refuse_unread(directory)
        raise TooFewSnapshotsError(
            f"{directory}: expected a folder of checkpoints, found one {alone.name} checkpoint",
            hint=_hint_at_one(directory, alone, entries),
        )
    if not found:
        raise _nothing_found(directory, pattern, findings, entries)
    unreadable = next((path for path, _ in found if not path.name.isprintable()), None)
    if unreadable:
        raise SnapshotError(f"{unreadable}: its name is no printable text", hint="rename it")
    return found


def _order(path: Path) -> str:
    """What entries of one folder are sorted by: as paths are, in a third of the time."""
    return os.path.normcase(path.name)


def _hint_at_one(directory: Path, kind: Layout, entries: Sequence[Path]) -> str:
    """What to do about a folder that is one checkpoint: one of several in the folder above, or one that its trainer writes over."""
    above = directory.resolve().parent
    siblings = (path for path in islice(above.iterdir(), MAX_FOLDERS) if path != directory.resolve())
    if find_step_in_name(directory.resolve().name) or any(recognise(path) is kind for path in siblings):
        return f"name the folder above it: {shell_word(above)}"
    is_file = len(entries) == 1 and entries[0].is_file()
    what, option = (entries[0], "") if is_file else (directory, "-r ")
    copy = f"ckpts/{what.stem}_STEP{what.suffix}" if is_file else "ckpts/step_STEP"
    return (
        f"a forecast needs the run's history: copy the checkpoint after each save, with its step for STEP: cp {option}{shell_word(what)}"
        f" {shell_word(copy)}; then name ckpts"
    )


def _note_no_snapshots(
    kinds: Mapping[Path, Layout | None], found: Sequence[Candidate], steps: StepRange | StepList | None, findings: Findings
) -> None:
    """Note what has no layout or a temporary name."""
    taken = {path for path, _ in found}
    shapes = {_shape_of(path) for path in taken if path.is_dir()}
    for path in kinds:
        if path not in taken:
            reason = _why_no_snapshot(path, kinds[path], shapes)
            looks_like_one = bool(reason) and named_within(path, steps)
            findings.ignore(path, reason or _what_it_is(path), is_half_written=looks_like_one)


def _what_it_is(path: Path) -> str:
    """What an entry is that nothing reads."""
    kind = foreign_at(path)
    return f"not read: {kind.what}" if kind else "no checkpoint of a known layout"


def _made_of_others(paths: Sequence[Path]) -> dict[Path, str]:
    """The averages and choices among snapshots, with the reason; none where they are all that there is."""
    words = {path: word for path in paths if (word := word_of_others(path.name))}
    others = [path for path in paths if path not in words and not is_alias(path)]
    return (
        {path: f"{word!r} in its name: {MADE_OF_OTHERS}" for path, word in words.items()} if len(others) >= MIN_OTHERS else {}
    )


def _refuse_folder_of_runs(directory: Path) -> None:
    """Refuse a folder that holds runs and no snapshots of its own.

    Raises:
        TooFewSnapshotsError: it is one; the hint names its first run.
    """
    runs = list(_runs_below(directory))
    if runs:
        names = listed(path.relative_to(directory) for path in runs)
        what = "a run in it" if len(runs) == 1 else f"{len(runs)} runs in it"
        raise TooFewSnapshotsError(
            f"{directory}: expected the folder of one run, found {what}: {names}",
            hint=f"{ANY_COMMAND}{shell_word(runs[0])}",
            path=directory,
        )


def _runs_below(directory: Path) -> Iterator[Path]:
    """The folders below that hold at least two checkpoints whose names tell a step; nothing else is looked at."""
    level, num_left = [directory], MAX_FOLDERS
    for _ in range(RUN_DEPTH):
        folders = [path for top in level for path in sorted(top.iterdir()) if _is_plain_folder(path)][:num_left]
        runs = {path for path in folders if _holds_snapshots(path)}
        yield from (path for path in folders if path in runs)
        level, num_left = [path for path in folders if path not in runs], num_left - len(folders)


def _is_plain_folder(path: Path) -> bool:
    return not path.name.startswith(".") and not path.is_symlink() and path.is_dir() and os.access(path, os.R_OK | os.X_OK)


def _holds_snapshots(folder: Path) -> bool:
    named_like = (path for path in sorted(folder.iterdir()) if find_step_in_name(path.name) and not path.name.startswith("."))
    return len(list(islice((path for path in islice(named_like, MAX_FOLDERS) if recognise(path)), 2))) > 1


def _nothing_found(directory: Path, pattern: str, findings: Findings, entries: Sequence[Path]) -> TooFewSnapshotsError:
    half_written = [ignored for ignored in findings.ignored if ignored.is_half_written]
    if half_written:
        return too_few(directory, 0, 1, half_written)
    if not pattern:
        return nothing_found(directory, entries)
    return TooFewSnapshotsError(
        f"{directory}: no snapshots found that match --pattern {shlex.quote(pattern)}",
        hint=f"farcast inspect {shell_word(directory)} shows all",
    )


def _links_to_siblings(entries: Iterable[Path]) -> dict[Path, str]:
    """The entries that are links to another entry, or to what an earlier one is a link to, and that other's name."""
    entries = list(entries)
    if not any(path.is_symlink() for path in entries):
        return {}
    places: dict[str, Path] = {}
    ordered = sorted(entries, key=lambda path: (path.is_symlink(), find_step_in_name(path.name) is None, path.name))
    return {
        path: first.name
        for path in ordered
        if path.exists() and (first := places.setdefault(os.path.realpath(path), path)) is not path and path.is_symlink()
    }


def _why_no_snapshot(path: Path, kind: Layout | None, shapes: set[str]) -> str:
    """What keeps an entry that looks like a snapshot from being one; "" where it does not look like one."""
    if kind is None and find_step_in_name(path.name) is None:
        return ""
    if _TEMPORARY.search(path.name):
        return "a temporary name: still being saved, or interrupted"
    if path.is_symlink() and not path.exists():
        return "a link that leads nowhere or in a circle"
    if path.is_dir() and _shape_of(path) in shapes:
        return "incomplete: named like a snapshot, but without weights"
    return ""


def _shape_of(path: Path) -> str:
    """A name without its numbers."""
    return _NUMBERS.sub("#", path.name)


def too_few(directory: Path, count: int, minimum: int, half_written: Sequence[Ignored]) -> TooFewSnapshotsError:
    left_out = listed((f"{one.path.name} ({one.reason})" for one in half_written), most=MAX_HALF_WRITTEN)
    hint = "call farcast keep after each save, or keep more checkpoints (in the Trainer: a smaller save_steps, no save_total_limit),"
    hint += " or widen --steps"
    hint += "; farcast leap needs three snapshots only" if minimum > LEAP_SNAPSHOTS else ""
    wanted = f"{minimum} snapshot" + "s" * (minimum != 1)
    return TooFewSnapshotsError(
        f"{directory}: expected at least {wanted}, found {count}" + (f"; left out: {left_out}" if left_out else ""),
        hint="wait until they are saved, or save or download them again; otherwise " + hint if left_out else hint,
    )


def run_entries(directory: Path, layout: str, pattern: str = "") -> Iterator[Path]:
    """The entries of a folder that are snapshots of a layout, by their names and the names inside them."""
    for path in directory.iterdir():
        is_wanted = (
            not path.name.startswith(".") and not _TEMPORARY.search(path.name) and fnmatchcase(path.name, pattern or "*")
        )
        kind = recognise(path) if is_wanted else None
        if kind and kind.name == layout:
            yield path


def is_own_file(path: Path) -> bool:
    """Whether a file is a forecaster that `fit` wrote."""
    if not path.is_file():
        return False
    head = read_bytes(path, 0, min(file_size(path), len(OWN_MARK) + 8))
    return head[8:] == OWN_MARK


def is_output(path: Path) -> bool:
    """Whether a checkpoint is one that farcast wrote: it has a sidecar."""
    return sidecar_of(path, is_file=path.is_file()).is_file()


def main_layout(candidates: Sequence[Candidate]) -> Layout:
    """The layout of most candidates; the first in the order of the folder breaks a tie."""
    counts = Counter(layout.name for _, layout in candidates)
    return named(counts.most_common(1)[0][0])


def named_within(path: Path, steps: StepRange | StepList | None) -> bool:
    """Whether a name may belong to the asked-for steps; a snapshot left out by name is never opened."""
    found = find_step_in_name(path.name)
    return steps is None or found is None or int(found[1]) in steps
