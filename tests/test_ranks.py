"""A forecast that several processes write together has the bytes of one process's, or is not published at all."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli import system
from farcast_cli.engine import native, room
from farcast_cli.engine.ranks import Seat, Team, seat_in
from farcast_cli.engine.room import Room
from farcast_cli.errors import UsageError
from farcast_cli.forecast import accumulate
from tests.conftest import (
    Done,
    clean_environment,
    edit_loose,
    loose_name,
    make_loose_run,
    make_torch_run,
    tree_digest,
    wait_until,
    weights_at,
)
from tests.small_ranges import run as run_in_small_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.context import ForkProcess

    from tests.conftest import CallCli

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")
SHAPES = {"first.weight": (60, 100), "second.weight": (100, 50), "bias": (7,)}
WIDE = {"first.weight": (200, 300), "second.weight": (100, 50), "third.weight": (300, 97), "bias": (7,)}
"""Tensors larger than a sample, and smaller ones."""
OUTPUT_ERROR = 5


def _life(folder: Path, rank: int, count: int, arguments: Sequence[object], before: Callable[[], None]) -> None:
    """The command as one rank, in this process, its streams in files."""
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115 - pytest's own are elsewhere
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    os.chdir(folder)
    sys.argv = ["farcast", *map(str, arguments)]
    before()
    run_in_small_ranges()


class Launched:
    """Ranks that run the same command, each in a process that is forked here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, ForkProcess] = {}

    def start(self, rank: int, count: int, *arguments: object, before: Callable[[], None] = lambda: None) -> None:
        asked = ("predict", *arguments, "--horizon", 100, "--even-if-worse", "-o", "out/")
        self._start(rank, count, asked, before)

    def fit(self, rank: int, count: int, *arguments: object, before: Callable[[], None] = lambda: None) -> None:
        self._start(rank, count, ("fit", *arguments, "-o", "out/fitted.safetensors"), before)

    def _start(self, rank: int, count: int, asked: Sequence[object], before: Callable[[], None]) -> None:
        arguments = (self.folder, rank, count, (*asked, "--ranks", "env"), before)
        self.processes[rank] = FORK.Process(target=_life, args=arguments)
        self.processes[rank].start()

    def ended(self) -> list[Done]:
        for process in self.processes.values():
            process.join()
        return [
            Done((self.folder / f"out-{rank}").read_text(), (self.folder / f"err-{rank}").read_text(), process.exitcode or 0)
            for rank, process in sorted(self.processes.items())
        ]


@pytest.fixture
def launched(tmp_path: Path) -> Launched:
    return Launched(tmp_path)


def holding(folder: Path) -> Callable[[], None]:
    """What makes a rank wait, once it has joined, until it may go on."""

    def hold() -> None:
        takes = Team.takes

        def wait(team: Team, number: int) -> bool:
            (folder / f"held-{team.seat.rank}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
            return takes(team, number)

        Team.takes = wait  # type: ignore[assignment, method-assign]

    return hold


def holding_fit(folder: Path) -> Callable[[], None]:
    """The same of a rank that is about to read its share for a fit."""

    def hold() -> None:
        own = accumulate._own

        def wait(reading: Any, team: Team) -> Iterator[accumulate.Sums]:
            (folder / f"held-{team.seat.rank}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
            yield from own(reading, team)

        accumulate._own = wait

    return hold


def impatient() -> None:
    """A rank that waits little, once all have come."""
    begin = Team.begin

    def after(team: Team, step: str) -> None:
        team._patience_s, team._every_s, room.LEAVING_S = 0.2, 0.02, 0.1
        begin(team, step)

    Team.begin = after  # type: ignore[assignment, method-assign]


def soon_impatient(folder: Path) -> Callable[[], None]:
    """A rank that waits little for others' shares of a fit."""

    def change() -> None:
        of_others = accumulate._of_others

        def after(reading: Any, team: Team) -> Iterator[accumulate.Sums]:
            wait_until((folder / "held-1").exists, "rank 1 reads")
            team._patience_s, team._every_s, room.LEAVING_S = 0.2, 0.02, 0.1
            yield from of_others(reading, team)

        accumulate._of_others = after

    return change


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


@pytest.mark.parametrize(("kind", "count"), [("safetensors", 3), ("torch", 2)])
def test_ranks_write_the_bytes_of_one_process(
    kind: str, count: int, tmp_path: Path, launched: Launched, call_cli: CallCli
) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES) if kind == "safetensors" else make_torch_run(tmp_path / "run")
    for rank in range(count):
        launched.start(rank, count, run)
    first, *others = launched.ended()
    assert (first.returncode, first.stderr.count("wrote")) == (0, 1)
    assert others == [Done("", "", 0)] * (count - 1)
    assert first.stdout.startswith("out/")
    alone = call_cli("predict", run, "--horizon", 100, "--even-if-worse", "-o", "alone/", cwd=tmp_path)
    assert alone.returncode == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "alone")


def test_torchrun_starts_the_ranks(tmp_path: Path, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    asked = ("predict", run, "--horizon", "100", "--even-if-worse")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.small_ranges"]
    done = subprocess.run(
        [*launcher, *asked, "-o", "out/", "--ranks", "env"],
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"out/{loose_name(900)}\n"), done.stderr
    assert call_cli(*asked, "-o", "alone/", cwd=tmp_path).returncode == 0
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "alone")


def test_a_rank_that_never_comes_is_named_and_nothing_is_left(work: Path, call_cli: CallCli) -> None:
    done = call_cli(
        *("predict", "--horizon", 100, "-o", "out/", "--ranks", "env", "--ranks-timeout", 0.1),
        cwd=work,
        env={"SLURM_PROCID": "0", "SLURM_NTASKS": "3"},
    )
    assert done.returncode == OUTPUT_ERROR
    assert done.errors == [f"error: out/{loose_name(900)}: ranks 1, 2 of 3 did not come within 0.1 s"]
    assert "out" not in left_in(work)


def test_a_rank_without_rank_0_says_so(work: Path, call_cli: CallCli) -> None:
    done = call_cli(
        *("predict", "--horizon", 100, "-o", "out/", "--ranks", "env", "--ranks-timeout", 0.1),
        cwd=work,
        env={"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    )
    assert (done.returncode, done.stdout) == (OUTPUT_ERROR, "")
    assert done.errors == [f"error: rank 1: out/{loose_name(900)}: rank 0 of 2 did not come within 0.1 s"]
    assert "out" not in left_in(work)


@pytest.mark.parametrize("is_stale", [pytest.param(True, id="stale"), pytest.param(False, id="alike")])
def test_ranks_may_read_copies_but_no_other_files(*, is_stale: bool, tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    copied = shutil.copytree(run, tmp_path / "node" / "run")
    if is_stale:
        edit_loose(copied / loose_name(800), {"bias": weights_at(700, shapes=SHAPES)["bias"]})
    launched.start(0, 2, run)
    launched.start(1, 2, copied)
    first, second = launched.ended()
    assert second == Done("", "", first.returncode)
    if not is_stale:
        assert first.returncode == 0
        return
    assert first.errors == [f"error: out/{loose_name(900)}: rank 1 has other files than rank 0; nothing was written"]
    assert first.returncode == OUTPUT_ERROR
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("killed", [0, 1])
def test_nothing_is_published_if_a_rank_is_killed(killed: int, tmp_path: Path, launched: Launched, call_cli: CallCli) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    for rank in range(2):
        launched.start(rank, 2, run, before=holding(tmp_path))
    for rank in range(2):
        wait_until((tmp_path / f"held-{rank}").exists, "both write")
    launched.processes[killed].kill()
    launched.processes[killed].join()
    (tmp_path / "go").touch()
    done = launched.ended()[1 - killed]
    assert (done.returncode, done.stdout, len(done.errors)) == (OUTPUT_ERROR, "", 1)
    assert f"rank {killed} of 2 ended before the output was whole; nothing was published" in done.errors[0]
    assert not (tmp_path / "out" / loose_name(900)).exists()
    again = call_cli("predict", run, "--horizon", 100, "--even-if-worse", "-o", "out/", cwd=tmp_path)
    assert again.returncode == 0
    assert sorted(left_in(tmp_path / "out")) == [loose_name(900), f"{loose_name(900)}.farcast.json"]


def test_a_rank_that_comes_back_after_the_others_gave_up_writes_nothing(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    launched.start(0, 2, run, before=impatient)
    launched.start(1, 2, run, before=holding(tmp_path))
    launched.processes[0].join()
    assert (tmp_path / "held-1").exists()
    (tmp_path / "go").touch()
    first, straggler = launched.ended()
    assert "rank 1 of 2 has said nothing for 0.2 s and was given up" in first.errors[0]
    assert (first.returncode, straggler.returncode, straggler.stdout) == (OUTPUT_ERROR, OUTPUT_ERROR, "")
    assert left_in(tmp_path / "out") == []


def test_the_error_of_a_rank_is_told_once_by_rank_0_with_its_code(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)

    def change() -> None:
        begin = Team.begin

        def after(team: Team, step: str) -> None:
            begin(team, step)
            os.utime(run / loose_name(800))

        Team.begin = after  # type: ignore[assignment, method-assign]

    for rank in range(3):
        launched.start(rank, 3, run, before=change if rank == 2 else holding(tmp_path) if rank == 0 else lambda: None)
    wait_until(lambda: not launched.processes[2].is_alive() or (tmp_path / "held-0").exists(), "rank 0 writes")
    (tmp_path / "go").touch()
    first, *others = launched.ended()
    assert first.returncode == 3
    assert len(first.errors) == 1
    assert "changed while it was read" in first.errors[0]
    assert others == [Done("", "", 3)] * 2
    assert left_in(tmp_path / "out") == []


def test_an_interrupt_of_one_rank_ends_all(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    for rank in range(2):
        launched.start(rank, 2, run, before=holding(tmp_path))
    for rank in range(2):
        wait_until((tmp_path / f"held-{rank}").exists, "both write")
    launched.processes[1].terminate()
    launched.processes[1].join()
    (tmp_path / "go").touch()
    first, second = launched.ended()
    assert (first.returncode, first.errors) == (OUTPUT_ERROR, ["error: rank 1: interrupted"])
    assert second == Done("", "", 130)
    assert left_in(tmp_path / "out") == []


def test_a_launchers_variables_mean_nothing_unless_ranks_are_asked_for(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "--horizon", 100, "-o", "out/", cwd=work, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert (done.returncode, done.stdout) == (0, f"out/{loose_name(900)}\n")


def test_ranks_that_write_each_for_itself_are_told_how_to_share(work: Path, call_cli: CallCli) -> None:
    (work / "out").mkdir()
    (work / "out" / loose_name(900)).touch()
    done = call_cli("predict", "--horizon", 100, "-o", "out/", cwd=work, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == OUTPUT_ERROR
    assert done.hints[0].endswith("; --ranks env lets the 2 processes of this launcher write it together")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "found no launcher's variables: RANK and WORLD_SIZE, "),
        ({"RANK": "0"}, "found no launcher's variables: RANK and WORLD_SIZE, "),
        ({"RANK": "0", "WORLD_SIZE": "99999999"}, "RANK=0, WORLD_SIZE=99999999"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
    ],
)
def test_ranks_that_no_launcher_numbers_are_a_usage_error(
    given: dict[str, str], words: str, work: Path, call_cli: CallCli
) -> None:
    done = call_cli("predict", "--ranks", "env", cwd=work, env=given)
    assert done.returncode == 2
    assert words in done.errors[0]


def test_the_innermost_launcher_counts() -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "2"}
    assert seat_in(slurm) == Seat(1, 2)
    assert seat_in(slurm | {"RANK": "9", "WORLD_SIZE": "16"}) == Seat(9, 16)
    assert seat_in({}) is None
    with pytest.raises(UsageError):
        seat_in({"RANK": "-1", "WORLD_SIZE": "2"})


def test_one_process_alone_judges_by_a_command(work: Path, call_cli: CallCli) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2"}
    done = call_cli("predict", "--ranks", "env", "--eval-cmd", "echo 1 {ckpt}", cwd=work, env=variables)
    assert done.returncode == 2
    assert "--eval-cmd" in done.errors[0]


# --- a fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "read"), [(4, ("--full",)), (2, ("--sample", "2000"))])
def test_ranks_fit_the_bytes_of_one_process(count: int, read: tuple[str, ...], tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    for rank in range(count):
        launched.fit(rank, count, run, *read, *(("--threads", 2) if rank else ()))
    first, *others = launched.ended()
    assert (first.returncode, first.stdout) == (0, "out/fitted.safetensors\n"), first.stderr
    assert others == [Done("", "", 0)] * (count - 1)
    (tmp_path / "alone").mkdir()
    alone = [sys.executable, "-m", "tests.small_ranges", "fit", str(run), *read, "-q", "-o", "alone/fitted.safetensors"]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "alone")


def test_every_rank_has_a_part_of_a_fit(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)

    def note() -> None:
        sums = accumulate._sums

        def noted(reading: Any) -> Iterator[accumulate.Sums]:
            num_bytes = sum(task.num_bytes for task in reading.tasks)
            (tmp_path / f"read-{os.environ['RANK']}").write_text(str(num_bytes))
            return sums(reading)

        accumulate._sums = noted

    for rank in range(3):
        launched.fit(rank, 3, run, "--full", before=note)
    assert [done.returncode for done in launched.ended()] == [0, 0, 0]
    shares = [int((tmp_path / f"read-{rank}").read_text()) for rank in range(3)]
    assert max(shares) < 1.3 * min(shares)


@pytest.mark.parametrize("killed", [0, 1])
def test_no_forecaster_is_published_if_a_rank_is_killed(
    killed: int, tmp_path: Path, launched: Launched, call_cli: CallCli
) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    for rank in range(2):
        launched.fit(rank, 2, run, "--full", before=holding_fit(tmp_path))
    for rank in range(2):
        wait_until((tmp_path / f"held-{rank}").exists, "both read")
    launched.processes[killed].kill()
    launched.processes[killed].join()
    (tmp_path / "go").touch()
    done = launched.ended()[1 - killed]
    assert (done.returncode, done.stdout, len(done.errors)) == (OUTPUT_ERROR, "", 1)
    assert f"rank {killed} of 2 ended before the output was whole; nothing was published" in done.errors[0]
    assert not (tmp_path / "out" / "fitted.safetensors").exists()
    (tmp_path / "out").mkdir(exist_ok=True)
    assert call_cli("fit", run, "-o", "out/fitted.safetensors", cwd=tmp_path).returncode == 0
    assert left_in(tmp_path / "out") == ["fitted.safetensors"]


def test_a_rank_that_comes_back_to_a_fit_after_the_others_gave_up_changes_nothing(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    launched.fit(0, 2, run, "--full", before=soon_impatient(tmp_path))
    launched.fit(1, 2, run, "--full", before=holding_fit(tmp_path))
    launched.processes[0].join()
    (tmp_path / "go").touch()
    first, straggler = launched.ended()
    assert "rank 1 of 2 has said nothing for 0.2 s and was given up" in first.errors[0]
    assert (first.returncode, straggler.returncode, straggler.stdout) == (OUTPUT_ERROR, OUTPUT_ERROR, "")
    assert left_in(tmp_path / "out") == []


def test_a_fit_refuses_ranks_that_read_other_files(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    copied = shutil.copytree(run, tmp_path / "node" / "run")
    edit_loose(copied / loose_name(800), {"bias": weights_at(700, shapes=WIDE)["bias"]})
    launched.fit(0, 2, run, "--full")
    launched.fit(1, 2, copied, "--full")
    first, second = launched.ended()
    assert first.errors == ["error: out/fitted.safetensors: rank 1 has other files than rank 0; nothing was written"]
    assert (first.returncode, second) == (OUTPUT_ERROR, Done("", "", OUTPUT_ERROR))
    assert left_in(tmp_path / "out") == []


def test_ranks_of_which_one_reads_a_sample_and_one_all_are_refused(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    launched.fit(0, 2, run, "--full")
    launched.fit(1, 2, run)
    first, _ = launched.ended()
    assert first.errors == ["error: out/fitted.safetensors: rank 1 has other plan than rank 0; nothing was written"]


def test_a_fit_refuses_ranks_that_round_in_different_ways(tmp_path: Path, launched: Launched) -> None:
    if native.KERNEL is None:
        pytest.skip("no kernel here")
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    launched.fit(0, 2, run, "--full")
    launched.fit(1, 2, run, "--full", before=lambda: setattr(native, "KERNEL", None))
    first, second = launched.ended()
    assert first.errors == ["error: out/fitted.safetensors: rank 1 has other engine than rank 0; nothing was written"]
    assert (first.returncode, second) == (OUTPUT_ERROR, Done("", "", OUTPUT_ERROR))


def test_a_rank_that_came_early_leaves_it_to_rank_0_to_name_who_is_missing(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)

    def knocks() -> None:
        let_in = Team._let_in

        def noted(team: Team, *arguments: Any) -> Any:
            (tmp_path / "knocks").touch()
            return let_in(team, *arguments)

        Team._let_in = noted  # type: ignore[assignment, method-assign]

    launched.fit(1, 3, run, "--ranks-timeout", 1, before=knocks)
    wait_until((tmp_path / "knocks").exists, "rank 1 waits")
    launched.fit(0, 3, run, "--ranks-timeout", 1, before=lambda: time.sleep(0.3))
    first, second = launched.ended()
    assert first.errors == ["error: out/fitted.safetensors: rank 2 of 3 did not come within 1 s"]
    assert second == Done("", "", OUTPUT_ERROR)
    assert left_in(tmp_path / "out") == []


def meeting(folder: Path) -> Callable[[], None]:
    """A rank that tells when it has met another."""

    def change() -> None:
        meet = Room.meet

        def after(one: Room, rank: int) -> None:
            meet(one, rank)
            (folder / f"met-{os.environ['RANK']}").touch()

        Room.meet = after  # type: ignore[assignment, method-assign]

    return change


def test_a_rank_0_that_is_killed_while_others_come_is_missed_at_once(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    launched.fit(0, 3, run)
    launched.fit(1, 3, run, before=meeting(tmp_path))
    wait_until((tmp_path / "met-1").exists, "rank 1 has come")
    launched.processes[0].kill()
    _, second = launched.ended()
    assert second.errors == [
        "error: rank 1: out/fitted.safetensors: rank 0 of 3 ended before the output was whole; nothing was published"
    ]


def test_a_rank_that_is_killed_while_others_come_is_missed_at_once(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    launched.fit(0, 3, run, before=meeting(tmp_path))
    launched.fit(1, 3, run)
    wait_until((tmp_path / "met-0").exists, "rank 0 has taken up rank 1")
    launched.processes[1].kill()
    first, _ = launched.ended()
    assert first.errors == [
        "error: out/fitted.safetensors: rank 1 of 3 ended before the output was whole; nothing was published"
    ]
    assert left_in(tmp_path / "out") == []


def test_rank_0_tells_its_end_also_to_who_has_just_come(tmp_path: Path) -> None:
    team, ours, other = Team(Seat(0, 2)), Room.made(tmp_path), Room.within(tmp_path, 1)
    team._room = ours
    other.post("hello", {"word": "its own"})
    other.post("left", {})
    team.close(UsageError("wrong"))
    assert other.read(0, "end") == {"code": 2, "words": {"1": "its own"}}
    ours.close()
    other.close()


@pytest.mark.skipif(os.name == "nt", reason="no limit of a file's size there")
def test_a_rank_whose_disk_is_full_when_it_comes_says_so(tmp_path: Path, launched: Launched) -> None:
    import resource

    run = make_loose_run(tmp_path / "run", shapes=SHAPES)
    launched.fit(0, 2, run, "--ranks-timeout", 1)
    limit = 200  # its own error is a shorter file, a hello a longer one
    launched.fit(1, 2, run, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    first, second = launched.ended()
    assert second.errors == ["error: rank 1: out/fitted.safetensors: cannot be written: File too large"]
    assert first.errors == ["error: out/fitted.safetensors: rank 1 of 2 did not come within 1 s"]


def test_a_rank_that_waits_long_looks_once_a_second() -> None:
    found = list(itertools.islice(room.pauses(), 40))
    assert found[0] < 0.01
    assert found == sorted(found)
    assert found[-1] == 1.0
    assert len([pause for pause in found if pause < 1]) < 15
    assert max(itertools.islice(room.pauses(0.1), 40)) == 0.1


def test_a_rank_that_never_comes_to_a_fit_is_named(work: Path, call_cli: CallCli) -> None:
    variables = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    done = call_cli("fit", "run", "-o", "f.safetensors", "--ranks", "env", "--ranks-timeout", 0.1, cwd=work, env=variables)
    assert done.returncode == OUTPUT_ERROR
    assert done.errors == ["error: f.safetensors: rank 1 of 2 did not come within 0.1 s"]
    assert [name for name in left_in(work) if "f.safetensors" in name] == []


def test_what_another_rank_finds_in_its_share_is_told_once(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    bad = weights_at(800, shapes=WIDE)["third.weight"]
    bad.view(-1)[-1] = torch.nan
    edit_loose(run / loose_name(800), {"third.weight": bad})
    for rank in range(2):
        launched.fit(rank, 2, run, "--full")
    first, second = launched.ended()
    assert len(first.errors) == 1
    assert first.errors[0].startswith("error: rank 1: ")
    assert "third.weight" in first.errors[0]
    assert second == Done("", "", first.returncode)
    assert left_in(tmp_path / "out") == []


def test_all_ranks_end_with_the_verdict_that_two_runs_were_mixed(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", range(100, 900, 200), shapes=WIDE)
    make_loose_run(run, range(200, 1000, 200), seed=1, shapes=WIDE)
    for rank in range(2):
        launched.fit(rank, 2, run, "--full")
    first, second = launched.ended()
    assert "two runs probably alternate" in first.errors[0]
    assert first.returncode
    assert second == Done("", "", first.returncode)
    assert left_in(tmp_path / "out") == []


def test_a_prediction_by_ranks_reads_no_whole_run_on_each(work: Path, call_cli: CallCli) -> None:
    done = call_cli("predict", "run", "--full", "--ranks", "env", cwd=work, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert done.hints == ["hint: farcast fit run --full --ranks env, then farcast predict --ranks env"]


# --- machines --------------------------------------------------------------------------------------------------------


def test_a_lock_that_nobody_sees_held_tells_nothing_of_a_rank(tmp_path: Path) -> None:
    """Two machines that are copies may name themselves alike, and a filesystem may keep locks on each."""
    ours, seen, unseen = Room.made(tmp_path), Room.within(tmp_path, 1), Room.within(tmp_path, 2)
    unseen.close()  # the lock is gone, and the rank lives
    for one in (seen, unseen):
        one.post("hello", {"machine": system.machine()})
    for rank in (1, 2):
        ours.meet(rank)
    assert (ours.runs(1), ours.runs(2)) == (True, None)
    seen.close()
    assert (ours.runs(1), ours.runs(2)) == (False, None)
    assert not ours.are_gone([1, 2])
    unseen.leave()
    assert ours.are_gone([1, 2])
    ours.close()


def test_rank_0_removes_nothing_before_the_others_have_said_that_they_leave(tmp_path: Path, launched: Launched) -> None:
    run = make_loose_run(tmp_path / "run", shapes=SHAPES)

    def slow() -> None:
        post = Room.post

        def after(one: Room, step: str, content: Any) -> None:
            if step == "left":
                time.sleep(0.3)
                (tmp_path / "found").write_text(str(one.is_there()))
            post(one, step, content)

        Room.post = after  # type: ignore[assignment, method-assign]

    for rank in range(2):
        launched.start(rank, 2, run, before=slow)
    assert [done.returncode for done in launched.ended()] == [0, 0]
    assert (tmp_path / "found").read_text() == "True"


def _in_namespaces() -> list[str]:
    """What runs a command as on a host of its own: with its own processes, name and network."""
    command = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--pid", "--fork", "--kill-child"]
    tried = subprocess.run([*command, "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    return command if tried and not tried.returncode else []


HOST = _in_namespaces()
FIT = ("-m", "farcast_cli", "fit", "--full", "-q", "-o", "f.safetensors", "--ranks", "env")


@pytest.mark.skipif(not HOST, reason="this system makes no namespaces for this user")
def test_ranks_on_hosts_of_one_name_without_a_network_share_a_fit(tmp_path: Path) -> None:
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [*HOST, sys.executable, *FIT, str(run)]
    started = [
        subprocess.Popen(command, cwd=tmp_path, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert sorted(left_in(tmp_path)) == ["f.safetensors", "run"]


def test_mpirun_starts_the_ranks(tmp_path: Path, call_cli: CallCli) -> None:
    launcher = shutil.which("mpirun")
    if launcher is None:
        pytest.skip("no mpirun here")
    run = make_loose_run(tmp_path / "run", shapes=WIDE)
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    done = subprocess.run(
        [launcher, "-n", "3", sys.executable, *FIT, str(run)],
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | allowed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "f.safetensors\n"), done.stderr
    assert call_cli("fit", run, "--full", "-o", "alone.safetensors", cwd=tmp_path).returncode == 0
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
