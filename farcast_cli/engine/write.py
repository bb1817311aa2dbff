"""The one full pass over the files: ranges of the output are read, computed and written by workers, and then finished.

The same bytes come out whatever the number of workers, the size of ranges and batches, and the way files are read.

Shapes: K tensors, T snapshots read, H horizons forecast in the same pass.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from farcast_cli import system
from farcast_cli.checkpoint.pieces import Copy, Fixed, Values
from farcast_cli.engine import native, workers
from farcast_cli.engine.arithmetic import HostArithmetic
from farcast_cli.engine.batch import Counts
from farcast_cli.engine.checksums import combine
from farcast_cli.engine.output_files import create, finish_file, write_rate
from farcast_cli.engine.ranges import Placed, ranges
from farcast_cli.engine.ranks import Team
from farcast_cli.engine.reader import Resources
from farcast_cli.engine.worker import Filled, Work, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.checkpoint.pieces import Joined, OutputFile
    from farcast_cli.engine.batch import Inputs
    from farcast_cli.engine.worker import Checksum

RANGE_BYTES = 8 << 20  # of output that a worker fills at once, at all horizons together
MIN_RANGE_BYTES = 1 << 20
BLOCK = (
    1 << 18
)  # elements of a batch: in float32 1 MiB; smaller ones stay in a nearer cache, but Python between them costs more
FORK_BYTES = 32 << 20  # of output, from which on processes pay for their start
FORKED_BYTES = 8 << 20  # of its own that a worker has besides its ranges and blocks
REHEARSED = 8  # ranges that a dry run makes
DEVICE_RANGE_BYTES = 32 << 20  # launches and transfers have a cost of their own
DEVICE_WORKERS = 4  # read, copy there, compute, copy back and write


@dataclass(frozen=True, slots=True)
class Engine:
    """What a pass reads from, and what it may use."""

    inputs: Inputs
    resources: Resources = field(default_factory=Resources)
    team: Team = field(default_factory=Team)


def total_bytes(outputs: Iterable[OutputFile]) -> int:
    return sum(output.num_bytes for output in outputs)


def bytes_to_read(outputs: Iterable[OutputFile], inputs: Inputs) -> int:
    """What a pass over one horizon's plan reads: a forecast tensor at all its snapshots, everything else once."""
    total = 0
    for piece in (piece for output in outputs for section in output.sections for piece in section.pieces):
        if isinstance(piece, Values):
            count = piece.entry.num_elements
            total += piece.entry.num_bytes
            total += sum(inputs.entry(piece, t).dtype.bytes_of(count) for t in inputs.others(piece))
        elif isinstance(piece, Copy):
            total += piece.num_bytes
    return total


def write_forecasts(
    plans: Sequence[Sequence[OutputFile]],
    paths: Sequence[Path],
    engine: Engine,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Counts:
    """Write one checkpoint per horizon, in a single pass over the snapshots where their bytes lie alike.

    Peak memory: for each worker two ranges and a few blocks, whatever the model's size.

    Args:
        plans: H plans that differ in counters alone.
        paths: H paths that do not exist yet, files or folders.
        progress: called with bytes written.
    """
    started = time.monotonic()
    counts = Counts()
    placed = [[Placed.of(output) for output in outputs] for outputs in plans]
    for horizons in _alike(placed):
        files = [placed[index] for index in horizons]
        of_files = [[_path(paths[index], file.output) for file in placed[index]] for index in horizons]
        for filled in _pass(files, of_files, engine, horizons):
            counts += filled.counts.of_horizons(horizons, len(plans))
            progress(filled.counts.bytes_written)
    return replace(counts, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a pass will take: seconds, and bytes of memory of all its processes at their peak, if the system tells."""

    seconds: float
    peak_bytes: int | None


def rehearse(outputs: Sequence[OutputFile], engine: Engine, folder: Path) -> Rehearsal:
    """Estimate a pass over one horizon's plan: make some of its ranges, and throw them away.

    Workers compute ranges side by side while the disk writes others: the slower of the two is the time.

    Args:
        folder: an existing one, on the disk that will be written to; its speed is measured with a file without a name.
    """
    work = _work([[Placed.of(output) for output in outputs]], [[]], engine, [0])
    chosen = sorted({round(i) for i in np.linspace(0, len(work.ranges) - 1, REHEARSED)}) if work.ranges else []
    worker = _host_worker(replace(work, ahead=0))
    started = time.monotonic()
    made = sum(worker.make(number).counts.bytes_written for number in chosen)
    elapsed = time.monotonic() - started
    total, num_workers = total_bytes(outputs), _num_workers(work, engine)
    making = elapsed * total / max(made, 1) / min(num_workers, system.num_cores())
    rate = write_rate(folder)
    own = system.peak_bytes()  # with one worker's memory
    others = num_workers * (FORKED_BYTES + worker.num_bytes) if num_workers > 1 else 0
    if workers.are_threads(num_workers, by_kernel=_is_for_kernel(work.inputs)):
        others = (num_workers - 1) * worker.num_bytes
    return Rehearsal(max(making, total / rate if rate else 0.0), None if own is None else own + others)


def _path(checkpoint: Path, output: OutputFile) -> Path:
    return checkpoint / output.name if output.name else checkpoint


def _alike(placed: Sequence[Sequence[Placed]]) -> list[list[int]]:
    """Horizons whose files have their pieces at the same places; a counter of more digits may move what follows it."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, files in enumerate(placed):
        groups.setdefault(tuple(file.starts for file in files), []).append(index)
    return list(groups.values())


def _pass(
    files: Sequence[Sequence[Placed]], paths: Sequence[Sequence[Path]], engine: Engine, horizons: Sequence[int]
) -> Iterator[Filled]:
    """Write some horizons' files at once."""
    team, step = engine.team, str(horizons[0])
    if team.leads:
        for its_paths, its_files in zip(paths, files, strict=True):
            for path, file in zip(its_paths, its_files, strict=True):
                create(path, file.num_bytes, mode=file.output.mode, folder_mode=file.output.folder_mode)
    team.begin(step)
    work = _work(files, paths, engine, horizons)
    work = replace(work, ranges=[one for number, one in enumerate(work.ranges) if team.takes(number)])
    mine = Filled(0, Counts())
    for filled in _run(work, engine):
        mine.checksums += filled.checksums
        mine.counts += filled.counts
        team.beat()
        yield filled
    if not team.leads:
        for number in {one.file for one in work.ranges}:
            for its_paths in paths:
                system.sync(its_paths[number])
    others = [_part_of(told) for told in team.merge(step, _told(mine))]
    yield from others
    if team.leads:
        _finish(files, paths, [mine, *others])


def _finish(files: Sequence[Sequence[Placed]], paths: Sequence[Sequence[Path]], parts: Iterable[Filled]) -> None:
    """Fill in the checksums of files whose ranges are all written."""
    checksums: dict[tuple[int, int], dict[int, list[Checksum]]] = defaultdict(lambda: defaultdict(list))
    for horizon, number, section, checksum in (one for part in parts for one in part.checksums):
        checksums[horizon, number][section].append(checksum)
    for horizon, (its_files, its_paths) in enumerate(zip(files, paths, strict=True)):
        for number, (file, path) in enumerate(zip(its_files, its_paths, strict=True)):
            finish_file(path, file.num_bytes, _filled_in(file, checksums[horizon, number]))


def _told(part: Filled) -> dict[str, Any]:
    """What a rank tells of its share."""
    counts = part.counts
    return {
        "counts": [counts.bytes_read, counts.bytes_written, counts.forecast, counts.unchanged],
        "checksums": [(*where, *checksum) for *where, checksum in part.checksums],
    }


def _part_of(told: dict[str, Any]) -> Filled:
    """The share of another rank."""
    bytes_read, bytes_written, forecast, unchanged = told["counts"]
    checksums = [(one[0], one[1], one[2], (one[3], one[4], one[5])) for one in told["checksums"]]
    return Filled(0, Counts(bytes_read, bytes_written, tuple(forecast), tuple(unchanged)), checksums)


def _filled_in(file: Placed, checksums: Mapping[int, Sequence[Checksum]]) -> Iterator[tuple[int, bytes]]:
    """The CRC-32 of sections, and of those that are one record together, at their positions."""
    known: dict[int, bytes] = {}
    for number, section in enumerate(file.output.sections):
        whole = 0
        for _, num_bytes, checksum in sorted(checksums.get(number, ())):
            whole = combine(whole, checksum, num_bytes)
        known |= dict.fromkeys(section.checksums_at, whole.to_bytes(4, "little"))
        yield from ((position, known[position]) for position in section.checksums_at)
    for joined in file.output.joined:
        whole = _joined_checksum(file.output, joined, known)
        yield from ((position, whole.to_bytes(4, "little")) for position in joined.checksums_at)


def _joined_checksum(output: OutputFile, joined: Joined, known: Mapping[int, bytes]) -> int:
    """The CRC-32 of sections as one, with the checksums that are filled in between them."""
    places = sorted(known)
    whole, position = 0, sum(section.num_bytes for section in output.sections[: joined.first])
    for section in output.sections[joined.first : joined.end]:
        if section.checksums_at:
            checksum = int.from_bytes(known[section.checksums_at[0]], "little")
        else:
            data = bytearray(b"".join(piece.data for piece in section.pieces if isinstance(piece, Fixed)))
            for place in places[bisect_left(places, position) : bisect_left(places, position + len(data))]:
                filled = known[place]
                data[place - position : place - position + len(filled)] = filled
            checksum = crc32(data)
        whole = combine(whole, checksum, section.num_bytes)
        position += section.num_bytes
    return whole


def _work(files: Sequence[Sequence[Placed]], paths: Sequence[Sequence[Path]], engine: Engine, horizons: Sequence[int]) -> Work:
    is_host = engine.resources.device == "cpu"
    most = RANGE_BYTES if is_host else DEVICE_RANGE_BYTES
    range_bytes = max(MIN_RANGE_BYTES, most // len(horizons) // MIN_RANGE_BYTES * MIN_RANGE_BYTES)
    picked = replace(engine.inputs, linear=engine.inputs.linear.pick(horizons))
    ahead = engine.resources.num_workers if is_host else DEVICE_WORKERS
    block = _block(picked) if is_host else range_bytes
    return Work(picked, files, paths, ranges(files[0], range_bytes), engine.resources.io, block, ahead)


def _is_for_kernel(inputs: Inputs) -> bool:
    """Whether the compiled kernel does most of the work: there are forecasts to compute, and not only bytes to copy."""
    return native.KERNEL is not None and any(inputs.linear.others)


def _block(inputs: Inputs) -> int:
    """Elements of a batch on the CPU. The kernel has a block at all snapshots at once, and little Python between two blocks."""
    return min(BLOCK, native.block(1 + max(map(len, inputs.linear.others)))) if _is_for_kernel(inputs) else BLOCK


def _run(work: Work, engine: Engine) -> Iterator[Filled]:
    num_tasks = len(work.ranges)
    if engine.resources.device != "cpu":
        import torch

        from farcast_cli.engine.device import DeviceArithmetic

        device = torch.device(engine.resources.device)
        return workers.in_threads(num_tasks, lambda: Worker(work, DeviceArithmetic(device)), min(DEVICE_WORKERS, num_tasks))
    by_kernel = _is_for_kernel(work.inputs)
    return workers.on_cores(num_tasks, partial(_host_worker, work), _num_workers(work, engine), by_kernel=by_kernel)


def _num_workers(work: Work, engine: Engine) -> int:
    """On the CPU; a small output is not worth the start of processes."""
    num_bytes = sum(one.num_bytes for one in work.ranges) * work.num_horizons
    return min(engine.resources.num_workers, len(work.ranges)) if num_bytes >= FORK_BYTES and work.ranges else 1


def _host_worker(work: Work) -> Worker:
    return Worker(work, HostArithmetic())
