"""Workers that take tasks by number: threads where most of the work needs no interpreter lock, else processes, or none.

The compiled kernel and a GPU work without Python's interpreter lock. numpy gives it up for single operations only: two threads
on two cores then get little more done than one. Processes are forked, so that they share what was planned, and die with the
process that made them. A system that cannot fork has threads.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from farcast_cli import system
from farcast_cli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future
    from multiprocessing.context import ForkContext, ForkProcess
    from multiprocessing.sharedctypes import Synchronized

MAX_THREADS = 4
"""With the kernel a worker holds the lock for a fifth of its time, so that more of them would wait for one another."""
Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class _Numbered(Protocol):
    """What came of a task, with its number."""

    @property
    def number(self) -> int: ...


Numbered = TypeVar("Numbered", bound=_Numbered)


class TaskWorker(Protocol[Result_co]):
    """Does tasks, one after another."""

    def fill(self, number: int, /) -> Result_co: ...

    def close(self) -> None: ...


def on_cores(
    num_tasks: int, make: Callable[[], TaskWorker[Result]], num_workers: int, *, by_kernel: bool = False
) -> Iterator[Result]:
    """In so many threads or processes, as far as there are tasks for them; in this thread, where one is enough."""
    needed = min(num_workers, num_tasks)
    if needed <= 1:
        return alone(num_tasks, make)
    context = None if are_threads(needed, by_kernel=by_kernel) else system.fork_context()
    return in_processes(num_tasks, make, needed, context) if context else in_threads(num_tasks, make, needed)


def are_threads(num_workers: int, *, by_kernel: bool) -> bool:
    """Whether threads do as much as processes, which take more memory."""
    return by_kernel and num_workers <= MAX_THREADS


def alone(num_tasks: int, make: Callable[[], TaskWorker[Result]]) -> Iterator[Result]:
    """In this process, in order."""
    worker = make()
    try:
        for number in range(num_tasks):
            yield worker.fill(number)
    finally:
        worker.close()


def in_threads(num_tasks: int, make: Callable[[], TaskWorker[Result]], num_workers: int) -> Iterator[Result]:
    """In threads with a worker each, in any order; few results wait at a time."""
    local, made = threading.local(), list[TaskWorker[Result]]()

    def begin() -> None:
        local.worker = make()
        made.append(local.worker)

    def fill(number: int) -> Result:
        result: Result = local.worker.fill(number)
        return result

    pool = ThreadPoolExecutor(num_workers, initializer=begin)
    running: set[Future[Result]] = set()
    try:
        for number in range(num_tasks):
            running.add(pool.submit(fill, number))
            if len(running) > num_workers or number == num_tasks - 1:
                done, running = futures_wait(running, return_when=FIRST_COMPLETED if number < num_tasks - 1 else ALL_COMPLETED)
                yield from (future.result() for future in done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        with ExitStack() as stack:  # each is closed, also if another one fails
            for worker in made:
                stack.callback(worker.close)


def in_order(results: Iterator[Numbered]) -> Iterator[Numbered]:
    """The same by their numbers, 0 first; those that are early wait."""
    early: dict[int, Numbered] = {}
    due = 0
    for result in results:
        early[result.number] = result
        while due in early:
            yield early.pop(due)
            due += 1


def in_processes(
    num_tasks: int, make: Callable[[], TaskWorker[Result]], num_workers: int, context: ForkContext
) -> Iterator[Result]:
    """In forked processes with a worker each, in any order.

    Raises:
        OutputError: a worker was killed.
        whatever a worker raised.
    """
    taken = context.Value("q", 0)
    processes: dict[Connection, ForkProcess] = {}
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(num_tasks, taken, make, theirs, os.getpid()), daemon=True)
            _start(process)
            theirs.close()
            processes[ours] = process
        yield from _collect(processes)
    finally:
        for pipe, process in processes.items():
            process.kill()
            process.join()
            pipe.close()


def _start(process: ForkProcess) -> None:
    try:
        process.start()
    except OSError as error:
        raise OutputError(f"a worker process cannot be started: {error.strerror}", hint="--threads 1 needs none") from error


def _collect(processes: Mapping[Connection, ForkProcess]) -> Iterator[Any]:
    """What the workers send, until each has said that it is done."""
    waiting = dict(processes)
    while waiting:
        for pipe in [pipe for pipe in wait(list(waiting)) if isinstance(pipe, Connection)]:
            try:
                result, error = pipe.recv()
            except EOFError:
                raise _killed(waiting[pipe]) from None
            if error is not None:
                raise error
            if result is None:
                del waiting[pipe]
            else:
                yield result


def _killed(process: ForkProcess) -> OutputError:
    process.join()
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return OutputError(f"a worker process {how}", hint="check the free memory; --threads 1 needs the least")


def _serve(
    num_tasks: int, taken: Synchronized[int], make: Callable[[], TaskWorker[Any]], pipe: Connection, parent: int
) -> None:
    """A worker's life: take the next number, do it, send what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    system.die_with(parent)
    try:
        worker = make()
        while (number := _next(taken)) < num_tasks:
            pipe.send((worker.fill(number), None))
        worker.close()
        pipe.send((None, None))
    except Exception as error:  # noqa: BLE001 - raised again by the parent
        with suppress(OSError):  # the parent is gone
            pipe.send((None, error))


def _next(taken: Synchronized[int]) -> int:
    with taken.get_lock():
        number = taken.value
        taken.value = number + 1
        return number
