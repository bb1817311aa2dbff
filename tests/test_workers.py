"""Workers do every task once, their errors arrive whole, and none outlives what made it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.checkpoint.pieces import Fixed, OutputFile, Section
from farcast_cli.engine.arithmetic import HostArithmetic
from farcast_cli.engine.batch import Inputs
from farcast_cli.engine.linear import LinearMap
from farcast_cli.engine.ranges import Placed, ranges
from farcast_cli.engine.worker import Work, Worker
from farcast_cli.engine.workers import MAX_THREADS, alone, in_order, in_processes, in_threads, on_cores
from farcast_cli.errors import OutputError, SnapshotError
from farcast_cli.run.alignment import Alignment
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


FORK = multiprocessing.get_context("fork")


@dataclass
class _Done:
    number: int
    process: int


class _Worker:
    """Does tasks by number, but for one that it may be asked to fail in."""

    def __init__(self, fails: Callable[[int], None]) -> None:
        self._fails = fails

    def fill(self, number: int) -> _Done:
        self._fails(number)
        return _Done(number, os.getpid())

    def close(self) -> None:
        pass


def _well(_: int) -> None:
    pass


def _slow(_: int) -> None:
    time.sleep(0.001)


def _interrupted(number: int) -> None:
    _slow(number)
    if number == 20:
        os.kill(os.getpid(), signal.SIGINT)


def _killed(number: int) -> None:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _refused(number: int) -> None:
    if number == 3:
        raise SnapshotError("tensor 3 is odd", hint="leave it out")


WAYS: dict[str, Callable[[Callable[[int], None]], Iterator[_Done]]] = {
    "alone": lambda fails: alone(20, partial(_Worker, fails)),
    "threads": lambda fails: in_threads(20, partial(_Worker, fails), 3),
    "processes": lambda fails: in_processes(20, partial(_Worker, fails), 3, FORK),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_task_is_done_once_and_can_be_had_in_order(way: str) -> None:
    assert [done.number for done in in_order(WAYS[way](_well))] == list(range(20))


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_a_worker_arrives_with_its_hint(way: str) -> None:
    with pytest.raises(SnapshotError, match="tensor 3 is odd") as caught:
        list(WAYS[way](_refused))
    assert caught.value.hint == "leave it out"


def test_the_kernels_workers_are_few_threads_and_all_others_processes() -> None:
    def processes(num_workers: int, *, by_kernel: bool) -> set[int]:
        return {done.process for done in on_cores(40, partial(_Worker, _slow), num_workers, by_kernel=by_kernel)}

    assert processes(MAX_THREADS, by_kernel=True) == {os.getpid()}
    assert os.getpid() not in processes(MAX_THREADS + 1, by_kernel=True) | processes(2, by_kernel=False)


def test_an_interrupt_ends_threads_and_closes_each_of_their_workers() -> None:
    closed: list[int] = []

    class Closing(_Worker):
        def close(self) -> None:
            closed.append(1)

    before = threading.active_count()
    results = in_threads(1000, partial(Closing, _interrupted), 3)
    with pytest.raises(KeyboardInterrupt):
        list(results)
    assert 1 <= len(closed) <= 3
    assert threading.active_count() == before


def test_a_killed_worker_is_an_output_error_that_says_so() -> None:
    with pytest.raises(OutputError, match="a worker process was killed by SIGKILL") as caught:
        list(in_processes(20, partial(_Worker, _killed), 3, FORK))
    assert "--threads 1" in caught.value.hint


def _filled_in(path: Path, content: bytes) -> None:
    """A file whose bytes are all known in advance, written in ranges of a page."""
    file = Placed.of(OutputFile("", (Section((Fixed(content),)),)))
    nothing = np.zeros((1, 0))
    inputs = Inputs(Alignment((), ()), LinearMap(np.zeros((1, 0, 1)), nothing, nothing, 0))
    work = Work(inputs, [[file]], [[path]], ranges([file], 4096), "pread", block=8)
    worker = Worker(work, HostArithmetic())
    for number in range(len(work.ranges)):
        worker.fill(number)
    worker.close()


def test_known_bytes_that_a_range_cuts_are_whole_in_the_file(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "file").touch()
    _filled_in(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


def test_a_range_that_cannot_be_written_is_an_error_also_if_it_is_the_last_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _filled_in(tmp_path / "removed", b"ten bytes.")


def test_workers_are_gone_when_their_results_are_not_wanted_any_more() -> None:
    results = in_processes(1000, partial(_Worker, _well), 2, FORK)
    process = next(results).process
    results.close()  # type: ignore[attr-defined]
    assert not Path(f"/proc/{process}").exists()


def test_workers_die_with_a_parent_that_is_killed() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:  # it is killed while its worker sleeps

        def sleep(_: int) -> None:
            os.write(writing, os.getpid().to_bytes(4, "little"))
            time.sleep(1000)

        list(in_processes(1, partial(_Worker, sleep), 1, FORK))
        os._exit(0)
    worker = int.from_bytes(os.read(reading, 4), "little")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: not _runs(worker), "the worker lives on")
    os.close(reading)
    os.close(writing)


def _runs(process: int) -> bool:
    """Whether a process is there and no zombie, which some containers never wait for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
