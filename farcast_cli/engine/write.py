"""The one full pass over the files: ranges of the output are read, computed and written by workers, and then finished.

The same bytes come out whatever the number of workers, the size of ranges and batches, and the way files are read.

Shapes: K tensors, T snapshots read, H horizons forecast in the same pass.
"""

from __future__ import annotations

import os
import resource
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.checkpoint.pieces import Copy, Values
from farcast_cli.engine import workers
from farcast_cli.engine.arithmetic import HostArithmetic
from farcast_cli.engine.checksums import combine
from farcast_cli.engine.output_files import create, finish_file, write_rate
from farcast_cli.engine.ranges import Placed, ranges
from farcast_cli.engine.reader import Resources
from farcast_cli.engine.worker import Work, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.checkpoint.pieces import OutputFile
    from farcast_cli.engine.batch import Inputs
    from farcast_cli.engine.worker import Checksum, Report

RANGE_BYTES = 8 << 20  # of output that a worker fills at once, at all horizons together
MIN_RANGE_BYTES = 1 << 20
BLOCK = (
    1 << 18
)  # elements of a batch: in float32 1 MiB; smaller ones stay in a nearer cache, but Python between them costs more
FORK_BYTES = 32 << 20  # of output, from which on processes pay for their start
FORKED_BYTES = 8 << 20  # of its own that a worker has beside its ranges and blocks
REHEARSED = 8  # ranges that a dry run makes
DEVICE_RANGE_BYTES = 32 << 20  # launches and transfers have a cost of their own
DEVICE_LANES = 4  # read, copy there, compute, copy back and write


@dataclass(slots=True)
class Tally:
    """What a pass did."""

    bytes_read: int = 0
    bytes_written: int = 0
    unchanged: list[int] = field(default_factory=list)
    num_forecast: int = 0
    seconds: float = 0.0

    def unchanged_share(self, index: int) -> float:
        return self.unchanged[index] / self.num_forecast if self.num_forecast else 1.0

    def add(self, report: Report, horizons: Sequence[int]) -> None:
        self.bytes_read += report.bytes_read
        self.bytes_written += report.num_bytes
        self.num_forecast += report.num_forecast
        for index, unchanged in zip(horizons, report.unchanged, strict=True):
            self.unchanged[index] += unchanged


@dataclass(frozen=True, slots=True)
class Engine:
    """What a pass reads from, and what it may use."""

    source: Inputs
    resources: Resources = field(default_factory=Resources)


def total_bytes(outputs: Iterable[OutputFile]) -> int:
    return sum(output.num_bytes for output in outputs)


def bytes_to_read(outputs: Iterable[OutputFile], source: Inputs) -> int:
    """What a pass over one horizon's plan reads: a forecast tensor at all its snapshots, everything else once."""
    total = 0
    for piece in (piece for output in outputs for record in output.records for piece in record.pieces):
        if isinstance(piece, Values):
            count = piece.entry.num_elements
            total += piece.entry.num_bytes
            total += sum(source.entry(piece, t).dtype.bytes_of(count) for t in source.others(piece))
        elif isinstance(piece, Copy):
            total += piece.num_bytes
    return total


def write_forecasts(
    plans: Sequence[Sequence[OutputFile]],
    targets: Sequence[Path],
    engine: Engine,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Write one checkpoint per horizon, in a single pass over the snapshots where their bytes lie alike.

    Peak memory: for each worker two ranges and a few blocks, whatever the model's size.

    Args:
        plans: H plans that differ in counters alone.
        targets: H paths that do not exist yet, files or folders.
        progress: called with bytes written.
    """
    started = time.monotonic()
    tally = Tally(unchanged=[0] * len(plans))
    placed = [[Placed.of(output) for output in outputs] for outputs in plans]
    for horizons in _alike(placed):
        files = [placed[index] for index in horizons]
        paths = [[_path(targets[index], file.output) for file in placed[index]] for index in horizons]
        for report in _pass(files, paths, engine, horizons):
            tally.add(report, horizons)
            progress(report.num_bytes)
    tally.seconds = time.monotonic() - started
    return tally


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a pass will take: seconds, and bytes of memory of all its processes at their peak."""

    seconds: float
    peak_bytes: int


def rehearse(outputs: Sequence[OutputFile], engine: Engine, folder: Path) -> Rehearsal:
    """Foretell a pass over one horizon's plan: some of its ranges are made, and thrown away.

    Workers make ranges side by side, and the disk takes them meanwhile: the slower of the two tells the time.

    Args:
        folder: an existing one, on the disk that will be written to; what it takes is tried with a file without a name.
    """
    work = _work([[Placed.of(output) for output in outputs]], [[]], engine, [0])
    chosen = sorted({round(i) for i in np.linspace(0, len(work.ranges) - 1, REHEARSED)}) if work.ranges else []
    lane = _host_lane(replace(work, ahead=0))
    started = time.monotonic()
    made = sum(lane.make(number).num_bytes for number in chosen)
    elapsed = time.monotonic() - started
    total, num_workers = total_bytes(outputs), _num_workers(work, engine)
    making = elapsed * total / max(made, 1) / min(num_workers, len(os.sched_getaffinity(0)))
    rate = write_rate(folder)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # with one worker's memory
    others = num_workers * (FORKED_BYTES + lane.num_bytes) if num_workers > 1 else 0
    return Rehearsal(max(making, total / rate if rate else 0.0), own + others)


def _path(target: Path, output: OutputFile) -> Path:
    return target / output.name if output.name else target


def _alike(placed: Sequence[Sequence[Placed]]) -> list[list[int]]:
    """Horizons whose files have their pieces at the same places; a counter of more digits may move what follows it."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, files in enumerate(placed):
        groups.setdefault(tuple(file.starts for file in files), []).append(index)
    return list(groups.values())


def _pass(
    files: Sequence[Sequence[Placed]], paths: Sequence[Sequence[Path]], engine: Engine, horizons: Sequence[int]
) -> Iterator[Report]:
    """Write some horizons' files at once."""
    for path, file in ((path, file) for pair in zip(paths, files, strict=True) for path, file in zip(*pair, strict=True)):
        create(path, file.num_bytes, mode=file.output.mode, folder_mode=file.output.folder_mode)
    parts: dict[tuple[int, int], dict[int, list[Checksum]]] = defaultdict(lambda: defaultdict(list))
    for report in _run(_work(files, paths, engine, horizons), engine):
        for horizon, number, record, part in report.checksums:
            parts[horizon, number][record].append(part)
        yield report
    for horizon, (its_files, its_paths) in enumerate(zip(files, paths, strict=True)):
        for number, (file, path) in enumerate(zip(its_files, its_paths, strict=True)):
            finish_file(path, file.num_bytes, _filled_in(file, parts[horizon, number]))


def _filled_in(file: Placed, parts: Mapping[int, Sequence[Checksum]]) -> Iterator[tuple[int, bytes]]:
    """The records' CRC-32 at their positions."""
    for number, record in enumerate(file.output.records):
        whole = 0
        for _, num_bytes, checksum in sorted(parts.get(number, ())):
            whole = combine(whole, checksum, num_bytes)
        for position in record.checksums_at:
            yield position, whole.to_bytes(4, "little")


def _work(files: Sequence[Sequence[Placed]], paths: Sequence[Sequence[Path]], engine: Engine, horizons: Sequence[int]) -> Work:
    is_host = engine.resources.device == "cpu"
    most = RANGE_BYTES if is_host else DEVICE_RANGE_BYTES
    range_bytes = max(MIN_RANGE_BYTES, most // len(horizons) // MIN_RANGE_BYTES * MIN_RANGE_BYTES)
    picked = replace(engine.source, linear=engine.source.linear.pick(horizons))
    ahead = engine.resources.num_workers if is_host else DEVICE_LANES
    return Work(
        picked, files, paths, ranges(files[0], range_bytes), engine.resources.io, BLOCK if is_host else range_bytes, ahead
    )


def _run(work: Work, engine: Engine) -> Iterator[Report]:
    num_tasks = len(work.ranges)
    if engine.resources.device != "cpu":
        import torch

        from farcast_cli.engine.device import DeviceArithmetic

        device = torch.device(engine.resources.device)
        return workers.in_threads(num_tasks, lambda: Worker(work, DeviceArithmetic(device)), min(DEVICE_LANES, num_tasks))
    return workers.on_cores(num_tasks, partial(_host_lane, work), _num_workers(work, engine))


def _num_workers(work: Work, engine: Engine) -> int:
    """On the CPU; a small output is not worth the start of processes."""
    num_bytes = sum(one.num_bytes for one in work.ranges) * work.num_horizons
    return min(engine.resources.num_workers, len(work.ranges)) if num_bytes >= FORK_BYTES and work.ranges else 1


def _host_lane(work: Work) -> Worker:
    return Worker(work, HostArithmetic())
