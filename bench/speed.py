"""Time and memory of fit and predict against copying the same output, side by side in one run.

Makes a run of generated snapshots (weights that drift and jitter) in Hugging Face shards, checks one forecast against
an oracle, then times each command in turns with `cp` and fsync of the same bytes. Prints and saves a table of ratios.

    python bench/speed.py            about 1 GB a snapshot, bf16 and fp32; some 16 GB of disk
    python bench/speed.py --quick    50 MB a snapshot
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
from dataclasses import asdict, dataclass
from pathlib import Path

FARCAST = [sys.executable, "-m", "farcast_cli"]
STEPS = (1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000)
HORIZON = 2000
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Usage:
    """One process: wall and CPU seconds, peak resident memory in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def measure(command: list[str], cwd: Path) -> Usage:
    """Run a command to its end; fails if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        message = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{message}")
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def fixture(*arguments: object) -> None:
    """Make or check a run in a process of its own: a child's peak memory counts what its parent held at the fork."""
    subprocess.run([sys.executable, str(Path(__file__).with_name("fixture.py")), *map(str, arguments)], check=True)


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(work: Path, run: Path, rounds: int) -> list[dict[str, object]]:
    """Each command in turns with the copy; ratios pair by pair."""
    out, copy = work / "out", work / "copy"
    commands = {
        "fit (sample)": [*FARCAST, "fit", str(run), "-q"],
        "fit --full": [*FARCAST, "fit", str(run), "-q", "--full", "-o", "full.safetensors"],
        "predict line": [*FARCAST, "predict", "--horizon", str(HORIZON), "--method", "line", "-o", str(out), "-q"],
        "predict blend": [*FARCAST, "predict", "--horizon", str(HORIZON), "-o", str(out), "-q"],
    }  # fmt: skip
    last = run / f"step{STEPS[-1]}"
    copying = ["sh", "-c", f"cp -r {last} {copy} && sync {copy}/*"]
    reading = ["sh", "-c", f"cat {run}/*/*.safetensors > /dev/null"]
    measure(commands["fit (sample)"], work)
    measure(commands["predict line"], work)
    fixture("check", run, out)
    rows = []
    for name, command in commands.items():
        rival = reading if name == "fit --full" else copying
        pairs = []
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(copy, ignore_errors=True)
            pairs.append((measure(command, work), measure(rival, work)))
        ratios = [ours.wall_s / theirs.wall_s for ours, theirs in pairs]
        rows.append({
            "command": name, "against": "cat of all snapshots" if rival is reading else "cp + fsync of the output",
            "wall_ratio": statistics.median(ratios), "wall_ratio_min": min(ratios), "wall_ratio_max": max(ratios),
            "cpu_ratio": statistics.median(ours.cpu_s / theirs.cpu_s for ours, theirs in pairs),
            "peak_mib": max(ours.peak_mib for ours, _ in pairs), "last": asdict(pairs[-1][0]),
        })  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(copy, ignore_errors=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, nargs="*", help="sizes to try")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--dir", type=Path, help="where the fixtures go; a temporary folder by default")
    options = parser.parse_args()
    results = []
    for dtype in options.dtypes:
        for count in options.parameters or ([25_000_000] if options.quick else [500_000_000]):
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                work = Path(folder)
                fixture("make", work / "run", count, dtype)
                size = tree_bytes(work / "run" / f"step{STEPS[-1]}")
                print(f"\n{dtype}, {size / 1e9:.2f} GB a snapshot, {len(STEPS)} snapshots")
                print(f"{'command':<15} {'against':<26} {'wall':>6} {'min':>6} {'max':>6} {'cpu':>6} {'peak MiB':>9}")
                for row in compare(work, work / "run", options.rounds):
                    print(f"{row['command']:<15} {row['against']:<26} {row['wall_ratio']:6.2f} {row['wall_ratio_min']:6.2f}"
                          f" {row['wall_ratio_max']:6.2f} {row['cpu_ratio']:6.2f} {row['peak_mib']:9.0f}")  # fmt: skip
                    results.append({"dtype": dtype, "bytes": size, **row})
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}  # fmt: skip
    target = Path(__file__).parent / "out" / "speed.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    print(f"\nsaved {target}")


if __name__ == "__main__":
    main()
