"""The losses that a run logged by itself: in its trainer's state, or in a log that its trainer writes beside the checkpoints.

Read here: what the trainer's own state holds, CSV and JSON lines with a column of steps, and TensorBoard's event files.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from farcast_cli.errors import FarcastError, FileFormatError, UsageError, shell_word
from farcast_cli.files.reading import fetch, file_size, open_input, open_read_only, reading
from farcast_cli.optional import need
from farcast_cli.trainers import trainer_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from farcast_cli.run.trajectory import Trajectory

LossKind = Literal["training", "evaluation"]
LOSS_KINDS: tuple[LossKind, LossKind] = ("training", "evaluation")
Points = tuple[tuple[int, float], ...]
"""Losses by step, in the order of the steps."""
Logged = tuple["array[int]", "array[float]"]
"""Steps and losses as they were logged; a log may have millions."""

_STEPS = ("step", "global_step", "steps", "iteration", "iter", "trainer/global_step", "_step")
_LOG_NAMES = ("metrics.csv", "losses.csv", "log.csv", "losses.jsonl", "metrics.jsonl", "log.jsonl", "train_log.jsonl")
_EVENTS = "events.out.tfevents.*"
_CHECKPOINTS = {"checkpoints", "ckpts", "ckpt", "weights"}  # folders beside which, not in which, a run's log lies
_EVALUATION = re.compile(r"eval|val|test|dev|held", re.IGNORECASE)
_LOSS = re.compile(r"(?:^|[/_.\- ])loss(?:$|[_/]|\b)", re.IGNORECASE)
_LONGEST_LINE = 1 << 20  # bytes
_MOST_COLUMNS = 1000  # of losses
_LARGEST = 1e30  # of a loss that is a number: pictures of larger ones fail
_LAST_STEP = 1 << 53  # up to it, a float holds each step


@dataclass(frozen=True, slots=True)
class LossLog:
    """What a run logged of its losses, and where."""

    source: Path
    training: Points = ()
    evaluation: Points = ()
    unread: str = ""
    """Why a log that nobody named could not be read."""

    def of(self, kind: LossKind) -> Points:
        return self.training if kind == "training" else self.evaluation

    def __bool__(self) -> bool:
        return bool(self.training or self.evaluation)


def losses_of(trajectory: Trajectory, named: Path | None = None) -> LossLog | None:
    """The losses of a run; None if it logged none where they are looked for.

    Args:
        named: the log that the user names. Others are not looked at.

    Raises:
        FileFormatError: the named log holds no steps, or no loss.
        UsageError: the named log is TensorBoard's, and its package is not installed.
    """
    if trajectory.rule.unit != "step":
        if named is not None:
            raise UsageError(f"--losses {named}: a log counts steps, and the unit of this run is the {trajectory.rule.unit}")
        return None
    if named is not None:
        found = _read(named)
        if not found:
            raise FileFormatError(
                f"{named}: expected losses by step, found none",
                hint="a CSV or JSON-lines file needs a column 'step' and one such as 'loss', 'train_loss' or 'val_loss'",
            )
        return found
    origin = trajectory.origin
    training, evaluation = map(_in_order, trainer_of(origin).logged_losses(origin))
    kept = LossLog(origin.path, training, evaluation)
    if kept:
        return kept
    tried = [_tried(path) for path in _logs_near(trajectory.directory)]
    return next(filter(None, tried), next((log for log in tried if log.unread), None))


def _tried(path: Path) -> LossLog:
    """A log that nobody named: what cannot be read of it is said, and stops nothing."""
    try:
        return _read(path)
    except FarcastError as error:
        return LossLog(path, unread=f"{error}; {error.hint}" if error.hint else str(error))


def _logs_near(directory: Path) -> Iterator[Path]:
    """Files that may be the run's log: in its folder, and above a folder of checkpoints alone."""
    where = directory.absolute()
    with reading(directory):
        for folder in (where, where.parent) if where.name in _CHECKPOINTS else (where,):
            yield from (folder / name for name in _LOG_NAMES if (folder / name).is_file())
            events = sorted(folder.glob(_EVENTS))
            if events:
                yield folder


def _read(path: Path) -> LossLog:
    with reading(path):
        is_folder, name = path.is_dir(), path.name
    if is_folder or "tfevents" in name:
        found = _scalars(path)
    else:
        found = _columns(_json_lines(path) if path.suffix in {".jsonl", ".ndjson", ".json"} else _csv_rows(path), path)
    training, evaluation = (_in_order(_best(found, rows)) for rows in LOSS_KINDS)
    return LossLog(path, training, evaluation)


# --- columns ---------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from csv.DictReader(_csv_lines(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{path}: expected a CSV file with a line of names, found: {error}") from error


def _csv_lines(path: Path) -> Iterator[str]:
    for line in _lines(path):
        if line is None:
            raise csv.Error(f"a line of more than {_LONGEST_LINE} bytes")
        yield line.decode("utf-8-sig")


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of the lines; the last line may be half-written, since the trainer appends to it.

    A line that is too long holds more than losses, and is left out as a whole.
    """
    for line in _lines(path):
        try:
            row = json.loads(line or b"")
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _lines(path: Path) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, of which a piece is in memory at a time."""
    with open_input(path) as raw:
        while line := raw.readline(_LONGEST_LINE):
            is_whole = len(line) < _LONGEST_LINE or line.endswith(b"\n")
            yield line if is_whole else None
            while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                line = raw.readline(_LONGEST_LINE)


def _columns(rows: Iterable[Mapping[str, Any]], path: Path) -> dict[str, Logged]:
    """By its name, each column of losses."""
    found: dict[str, Logged] = {}
    for row in rows:
        step = next((number for name in _STEPS if (number := _number(row.get(name))) is not None), math.nan)
        for name, text in row.items() if step.is_integer() and 0 <= step <= _LAST_STEP else ():
            if isinstance(name, str) and _LOSS.search(name) and (value := _number(text)) is not None:
                steps, values = found.setdefault(name, _column(()))
                steps.append(int(step))
                values.append(value)
        if len(found) > _MOST_COLUMNS:
            raise FileFormatError(f"{path}: expected at most {_MOST_COLUMNS} columns of losses, found more")
    return found


def _column(points: Iterable[tuple[int, float]]) -> Logged:
    steps, values = array("q"), array("d")
    for step, value in points:
        steps.append(step)
        values.append(value)
    return steps, values


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None


def _best(columns: Mapping[str, Logged], kind: LossKind) -> Iterable[tuple[int, float]]:
    """Of several columns the one with the most values; of those the one with the shortest name: `loss` before `loss_aux`."""
    ours = {name: values for name, (_, values) in columns.items() if bool(_EVALUATION.search(name)) == (kind == "evaluation")}
    best = max(ours, key=lambda name: (len(ours[name]), -len(name), name), default=None)
    return zip(*columns[best], strict=True) if best is not None else ()


def _in_order(points: Iterable[tuple[int, float]]) -> Points:
    """By step; of a step that was logged twice, because the run went back to it, the last."""
    return tuple(sorted({step: value for step, value in points if step >= 0 and abs(value) <= _LARGEST}.items()))


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def _scalars(path: Path) -> dict[str, Logged]:
    """By tag, the scalars of losses in an event file, or in all of a folder."""
    need("tensorboard", f"the losses in {shell_word(path)}")
    with reading(path):
        files = sorted(file for file in path.iterdir() if "tfevents" in file.name) if path.is_dir() else [path]
    for file in files:
        os.close(open_read_only(file))  # TensorBoard opens whatever it is, and waits for the writer of a FIFO
    fetch((file, 0, file_size(file)) for file in files)
    try:
        return _by_tensorboard(path)
    except Exception as error:  # an event file that was cut or forged fails in its library in many ways
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise FileFormatError(f"{path}: expected TensorBoard's event files, found: {reason}") from error


def _by_tensorboard(path: Path) -> dict[str, Logged]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()[SCALARS] if _LOSS.search(tag)]
    return {tag: _column((event.step, event.value) for event in accumulator.Scalars(tag)) for tag in tags}
