"""Time and memory of every command against copying the same files, and against other tools, side by side.

Makes runs of generated snapshots, checks one forecast of each against an oracle, then times each command in turns with its
rival, pair by pair. Prints and saves the ratios (median, least, most) with the targets beside them, and peak memory.

    python bench/speed.py            up to 2 billion parameters; 40 GB of disk, half an hour
    python bench/speed.py --quick    up to 100 million parameters; under five minutes
    python bench/speed.py --engines  both engines in turns, the compiled kernel and numpy, on 0.3 and 1.2 billion parameters

mergekit is measured where `--mergekit` names its command; it wants other versions of its libraries than the tests do, so
`make bench` puts it into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fixture import steps_of

HERE = Path(__file__).parent
FARCAST = [sys.executable, "-m", "farcast_cli"]
HORIZON = 1000
NUM_SNAPSHOTS = 7
LINE = ["predict", "--horizon", str(HORIZON), "--method", "line", "--even-if-worse", "-o", "out", "-q"]


@dataclass(frozen=True)
class Usage:
    """One command: wall and CPU seconds of it and its children, and the peak resident memory of all its processes in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


@dataclass
class Row:
    """A comparison: what, against what, the ratios pair by pair, and the target."""

    what: str
    against: str
    target: str
    ours: list[Usage] = field(default_factory=list)
    theirs: list[Usage] = field(default_factory=list)

    def ratios(self, name: str) -> list[float]:
        return [getattr(a, name) / max(getattr(b, name), 1e-9) for a, b in zip(self.ours, self.theirs, strict=True)]

    def text(self) -> str:
        wall = ""
        if self.theirs:
            found = self.ratios("wall_s")
            cpu = self.ratios("cpu_s")
            wall = f"wall {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"
            wall += f" cpu {statistics.median(cpu):.2f} ({min(cpu):.2f}-{max(cpu):.2f})"
            wall += f" memory {statistics.median(self.ratios('peak_mib')):.2f};"
        mine = (
            f"{statistics.median(u.wall_s for u in self.ours):.2f} s, cpu {statistics.median(u.cpu_s for u in self.ours):.2f} s"
        )
        peak = max(usage.peak_mib for usage in self.ours)
        return f"{self.what:<42} {self.against:<30} {wall:<52} {mine}, {peak:.0f} MiB   [{self.target}]"


def resident_mib(pid: int) -> float:
    """Memory that a process and its children hold now; what they share is counted once, by halves and thirds."""
    total = 0
    for process in (pid, *children(pid)):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total / 1024


def children(pid: int) -> list[int]:
    try:
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [below for child in found for below in children(child)]


def measure(command: list[str], cwd: Path, engine: str = "") -> Usage:
    """Run a command to its end; fails if it fails."""
    started = time.perf_counter()
    environment = os.environ | {"FARCAST_ENGINE": engine}
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0.0
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, resident_mib(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    message = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{message}")
    return Usage(wall, used.ru_utime + used.ru_stime, max(peak, used.ru_maxrss / 1024 if not peak else 0))


def fixture(*arguments: object) -> None:
    subprocess.run([sys.executable, str(HERE / "fixture.py"), *map(str, arguments)], check=True)


@dataclass
class Bench:
    """The runs of one setting, and what was measured."""

    work: Path
    rounds: int
    mergekit: str | None
    rows: list[Row] = field(default_factory=list)

    def make(self, kind: str, count: int, dtype: str, num_snapshots: int = NUM_SNAPSHOTS) -> Path:
        """A run, fitted, with one forecast checked."""
        run = self.work / f"{kind}-{count}-{dtype}-{num_snapshots}"
        fixture("make", run, kind, count, dtype, num_snapshots)
        self.ours("fit", str(run), "-q")
        self.ours(*LINE)
        fixture("check", run, self.work / "out", HORIZON)
        return run

    def clear(self) -> None:
        """Remove what a command and its rival wrote."""
        for name in ("copy", "out"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def ours(self, *arguments: str, engine: str = "") -> Usage:
        self.clear()
        return measure([*FARCAST, *arguments], self.work, engine)

    def compare_engines(self, what: str, arguments: list[str], against: str, rival: list[str]) -> None:
        """The kernel, numpy and the rival in turns: each engine against the rival, and one against the other."""
        native, numpy, rivals = list[Usage](), list[Usage](), list[Usage]()
        for _ in range(self.rounds):
            native.append(self.ours(*arguments, engine="native"))
            numpy.append(self.ours(*arguments, engine="numpy"))
            rivals.append(measure(rival, self.work))
        for engine, found in (("native", native), ("numpy", numpy)):
            self.rows.append(Row(f"{what}, {engine}", against, "-", found, rivals))
        self.rows.append(Row(f"{what}, native", "numpy", "-", native, numpy))
        for row in self.rows[-3:]:
            print(row.text(), flush=True)

    def compare(
        self, what: str, arguments: list[str], against: str, rival: list[str], target: str, *, cold: bool = False
    ) -> None:
        row = Row(what, against, target)
        for _ in range(self.rounds):
            self.chill() if cold else None
            row.ours.append(self.ours(*arguments))
            self.clear()
            if rival:
                self.chill() if cold else None
                row.theirs.append(measure(rival, self.work))
        self.rows.append(row)
        print(row.text(), flush=True)

    def chill(self) -> None:
        """Drop the snapshots from the page cache."""
        os.sync()
        for path in self.work.rglob("*.safetensors"):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def copying(run: Path) -> list[str]:
    """Copy the last snapshot, and fsync the copy."""
    return ["sh", "-c", f"cp -r {last(run)} copy && sync copy/*"]


def last(run: Path, index: int = -1) -> Path:
    steps = sorted(int(path.name.removeprefix("step")) for path in run.iterdir())
    return run / f"step{steps[index]}"


def against_copying(bench: Bench, large: int) -> None:
    cp = "cp + fsync of the output"
    run = bench.make("transformer", large, "bfloat16")
    name = f"{large / 1e9:.2g} B bf16"
    bench.compare(f"predict line, {name}", LINE, cp, copying(run), "wall <= 1.5 idle, 1.8 loaded")
    bench.compare(f"predict line, {name}, one worker", [*LINE, "--threads", "1"], cp, copying(run), "-")
    bench.compare(f"predict line, {name}, mmap", [*LINE, "--io", "mmap"], cp, copying(run), "-")
    bench.compare(f"predict line, {name}, buffered", [*LINE, "--io", "pread"], cp, copying(run), "-")
    blend = ["predict", "--horizon", str(HORIZON), "--even-if-worse", "-o", "out", "-q"]
    bench.compare(f"predict blend (7 snapshots), {name}", blend, cp, copying(run), "-")
    bench.compare(f"predict line, {name}, cold cache", LINE, "the same, cold", copying(run), "-", cold=True)
    rivals(bench, run, name)
    cat = ["sh", "-c", f"cat {run}/*/*.safetensors > /dev/null"]
    bench.compare(f"fit (sample), {name}", ["fit", str(run), "-q"], "-", [], "<= 2 s at any size")
    full = ["fit", str(run), "-q", "--full", "-o", "full.safetensors"]
    bench.compare(f"fit --full, {name}", full, "cat of all snapshots", cat, "wall <= 2.0")
    shutil.rmtree(run)


def rivals(bench: Bench, run: Path, name: str) -> None:
    middle = last(run, len(steps_of(NUM_SNAPSHOTS)) // 2)
    for rival, called in (("save_file", "load_file + save_file"), ("transformers", "from_ + save_pretrained")):
        script = [sys.executable, str(HERE / "rivals.py"), rival, str(middle), str(last(run)), "copy"]
        bench.compare(f"predict line, {name}", LINE, called, script, "-")
    if bench.mergekit:
        config = bench.work / "merge.yaml"
        subprocess.run(
            [sys.executable, str(HERE / "rivals.py"), "mergekit", str(middle), str(last(run)), str(config)], check=True
        )
        merging = [bench.mergekit, str(config), "copy", "--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card"]
        target = "cpu <= .15, wall <= .25, memory <= .08"
        bench.compare(f"predict line, {name}", LINE, "mergekit linear", merging, target)


def over_sizes(bench: Bench, sizes: list[int]) -> None:
    for size in sizes:
        run = bench.make("transformer", size, "bfloat16")
        bench.compare(
            f"predict line, {size / 1e9:.2g} B bf16", LINE, "cp + fsync of the output", copying(run), "flat, <= 300 MiB"
        )
        bench.compare(f"fit (sample), {size / 1e9:.2g} B bf16", ["fit", str(run), "-q"], "-", [], "<= 2 s, <= 300 MiB")
        shutil.rmtree(run)


def over_shapes(bench: Bench, one: int, single: int, many: int) -> None:
    cp = "cp + fsync of the output"
    run = bench.make("transformer", single, "float32")
    bench.compare(f"predict line, {single / 1e9:.2g} B fp32", LINE, cp, copying(run), "wall <= 1.15")
    shutil.rmtree(run)
    run = bench.make("tiny", 20_000 * 600, "bfloat16")
    bench.compare("predict line, 20,000 tensors of 600", LINE, cp, copying(run), "-")
    bench.compare("fit (sample), 20,000 tensors of 600", ["fit", str(run), "-q"], "-", [], "-")
    shutil.rmtree(run)
    run = bench.make("one", one, "bfloat16")
    bench.compare(f"predict line, one tensor of {2 * one / 1e9:.2g} GB", LINE, cp, copying(run), "-")
    shutil.rmtree(run)
    for count in (7, 101):
        run = bench.make("transformer", many, "bfloat16", count)
        every = ["predict", "--horizon", str(HORIZON), "--method", "drift", "--even-if-worse", "-o", "out", "-q"]
        bench.compare(f"predict drift, {count} snapshots of {2 * many / 1e6:.0f} MB", every, "-", [], "<= 300 MiB")
        bench.compare(
            f"fit --full, {count} snapshots of {2 * many / 1e6:.0f} MB",
            ["fit", str(run), "-q", "--full"],
            "-",
            [],
            "<= 300 MiB",
        )
        shutil.rmtree(run)


def over_engines(bench: Bench, sizes: list[int]) -> None:
    """Each engine on each size."""
    for size in sizes:
        run, name = bench.make("transformer", size, "bfloat16"), f"{size / 1e9:.2g} B bf16"
        blend = ["predict", "--horizon", str(HORIZON), "--even-if-worse", "-o", "out", "-q"]
        for what, arguments in (("line", LINE), ("blend", blend)):
            bench.compare_engines(f"predict {what}, {name}", arguments, "cp + fsync of the output", copying(run))
        full = ["fit", str(run), "-q", "--full", "-o", "full.safetensors"]
        cat = ["sh", "-c", f"cat {run}/*/*.safetensors > /dev/null"]
        bench.compare_engines(f"fit --full, {name}", full, "cat of all snapshots", cat)
        shutil.rmtree(run)


def starting(bench: Bench) -> None:
    run = bench.work / "start"
    fixture("make", run, "transformer", 200_000_000, "bfloat16", 1)
    bench.compare("--help", ["--help"], "-", [], "cpu <= .2 s")
    bench.compare("inspect, one snapshot of 146 tensors", ["inspect", str(run)], "-", [], "cpu <= .2 s")
    shutil.rmtree(run)


def whole(bench: Bench, *, is_quick: bool) -> None:
    starting(bench)
    over_shapes(bench, *((40_000_000, 40_000_000, 10_000_000) if is_quick else (1_000_000_000, 500_000_000, 30_000_000)))
    over_sizes(bench, [30_000_000, 100_000_000] if is_quick else [100_000_000, 500_000_000, 2_000_000_000])
    against_copying(bench, 100_000_000 if is_quick else 1_236_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files")
    parser.add_argument("--engines", action="store_true", help="only the two engines in turns; 30 GB of disk")
    parser.add_argument("--size", type=float, action="append", help="billions of parameters for --engines, once or more often")
    parser.add_argument("--rounds", type=int, help="pairs of each comparison: 3, or 2 with --quick")
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml command")
    parser.add_argument("--dir", type=Path, help="where the fixtures go; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        mergekit = str(options.mergekit.absolute()) if options.mergekit else None
        bench = Bench(Path(folder), options.rounds or (2 if options.quick else 3), mergekit)
        if options.engines:
            over_engines(bench, [round(size * 1e9) for size in options.size or (0.3, 1.236)])
        else:
            whole(bench, is_quick=options.quick)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    saved = HERE / "out" / "speed.json"
    saved.parent.mkdir(exist_ok=True)
    saved.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in bench.rows]}, indent=2) + "\n")
    print(f"\n{machine}\nsaved {saved}")


if __name__ == "__main__":
    main()
