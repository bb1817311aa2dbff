"""How many snapshots a forecast needs: each is a file to read in full.

A method with a `max_context` takes that many snapshots, spread evenly over the history. Here each number is compared with
ten on the same forecasts: by the run's own later weights, and by the steps that resuming from `blend` saves.

    python bench/context.py weights DIR...        error and cosine against later snapshots of runs' folders; seconds each
    python bench/context.py resume 5 6 9 10       on the runs of bench/quality.py; ten minutes a number on one core
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cells
import numpy as np
import quality
import training
from figures import HARMFUL, steps_ahead
from rich.console import Console
from store import Cell
from tables import number, table

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.engine.linear import LinearMap
from farcast_cli.forecast.backtest import decide
from farcast_cli.forecast.fitting import fit as fit_run
from farcast_cli.forecast.forecaster import Task, forecast
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.run.trajectory import discover

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.forecast.gram import Gram, Sample

NUMBERS = (4, 5, 6, 7, 8, 9, 10)
BASELINE = 10  # what the others are compared with
KEPT = (1, 2, 4)  # every so manieth snapshot: a run that saves less often
SHORTEST = 8  # snapshots of a history, on which more than one number can be tried


@contextmanager
def context(name: str, count: int) -> Iterator[None]:
    """A method that takes another number of snapshots."""
    before = METHODS[name]
    METHODS[name] = replace(before, max_context=count)
    try:
        yield
    finally:
        METHODS[name] = before


# --- against later weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """One forecast from so many snapshots at most."""

    files: int
    error: float
    cosine: float
    verdict: str


def weights(folders: Sequence[Path]) -> str:
    """A table of methods and numbers, each against ten on the forecasts that it changes."""
    found: dict[tuple[str, int], dict[Any, Found]] = {}
    for folder in folders:
        gram, sample = fit_run(discover(folder), num_samples=DEFAULT_SAMPLE).judged()
        for place, task in _tasks(gram, sample):
            for name in ("blend", "drift", "rank-1"):
                for count in NUMBERS:
                    if count < task.timeline.num_snapshots:
                        found.setdefault((name, count), {})[folder, place] = _found(name, count, task)
                found.setdefault((name, BASELINE), {}).setdefault((folder, place), _found(name, BASELINE, task))
    rows = []
    for (name, count), own in sorted(found.items()):
        if count == BASELINE:
            continue
        pairs = [(one, found[name, BASELINE][place]) for place, one in own.items()]
        change = [mine.error - its.error for mine, its in pairs]
        means = [
            [np.mean([getattr(one, key) for one in side]) for side in zip(*pairs, strict=True)]
            for key in ("files", "error", "cosine")
        ]
        verdicts = sum(mine.verdict != its.verdict for mine, its in pairs)
        low, middle, high = np.quantile(change, (0.1, 0.5, 0.9))
        rows.append([
            name, str(count), str(len(pairs)), *(f"{a:.3g}, {b:.3g}" for a, b in means),
            f"{middle:+.3f} ({low:+.3f}..{high:+.3f})", str(verdicts),
        ])  # fmt: skip
    header = ("method", "snapshots", "pairs", f"files read, at {BASELINE}", f"error, at {BASELINE}", f"cosine, at {BASELINE}")
    return table((*header, "change of the error, median (10..90 %)", "other verdicts"), rows)


def _tasks(gram: Gram, sample: Sample) -> Iterator[tuple[tuple[int, float, float], Task]]:
    """The origins and leads of a run at which there is a later snapshot to compare with."""
    for every in KEPT:
        kept = range(0, gram.num_snapshots, every)
        thin, its_sample = gram.restrict(kept), sample.restrict(kept)
        for origin in cells.RATIO_ORIGINS:
            place = round(origin * (len(kept) - 1))
            for lead in cells.RATIO_LEADS:
                end = place + max(1, round(lead * place))
                if place + 1 >= SHORTEST and end < len(kept):
                    timeline = Timeline(thin.steps, float(thin.steps[place]))
                    yield (every, origin, lead), Task(thin, its_sample, timeline, float(thin.steps[end]) - timeline.origin)


def _found(name: str, count: int, task: Task) -> Found:
    with context(name, count):
        step, decision = forecast(METHODS[name], task), decide(METHODS[name], task, "resume")
    timeline, gram = task.timeline, task.gram
    later = Timeline(timeline.steps, timeline.origin + task.horizon)
    truth = later.at(later.origin) - later.at(timeline.origin)
    inner = float(np.einsum("kr,krq,q->", step, gram.matrix, truth))
    size = gram.total_norm(truth)
    files = len(LinearMap.from_updates([step], timeline.num_snapshots - 1).used)
    return Found(files, gram.total_norm(step - truth) / size, inner / (gram.total_norm(step) * size), decision.verdict)


# --- by resuming -----------------------------------------------------------------------------------------------------


def resume(cell: Cell) -> dict[str, Any]:
    """As bench/quality.py resumes from `blend`, with another number of snapshots."""
    with context("blend", int(cell.method)):
        return cells.resume(replace(cell, method="blend"))


def chosen(counts: Sequence[int]) -> list[Cell]:
    """What is resumed: on digits from three origins at three leads, on text from two at one."""
    found = []
    for spec in (*quality.digits(), *quality.text()):
        small = spec.task in {"mlp", "conv"}
        if spec.steps > 2_000:
            continue
        found += [Cell("plain", spec), Cell("fit", spec)]
        for origin in training.ORIGINS if small else training.ORIGINS[1:]:
            found.append(Cell("resume", spec, origin, quality.METHOD_LEAD, "persistence"))
            for lead in cells.RATIO_LEADS if small else (quality.METHOD_LEAD,):
                found += [Cell("context", spec, origin, lead, str(count)) for count in counts]
    return found


@dataclass(frozen=True)
class Saved:
    """What resuming from one forecast saved: steps as a share of the horizon, and loss of the average as a share of it."""

    ahead: float
    gain: float
    verdict: str


def report(done: Sequence[Cell]) -> str:
    """Each number against ten on the same forecasts: means, and the change by run with its standard error."""
    results = {cell: record["result"] for cell in done if (record := cell.read())}
    saved = {cell: _saved(cell, results) for cell in results if cell.kind == "context"}
    rows = []
    for count in sorted({int(cell.method) for cell in saved} - {BASELINE}):
        pairs = {
            cell: (one, saved[its])
            for cell, one in saved.items()
            if cell.method == str(count) and (its := replace(cell, method=str(BASELINE))) in saved and math.isfinite(one.ahead)
        }
        by_run: dict[Any, list[float]] = {}
        for cell, (mine, its) in pairs.items():
            by_run.setdefault(cell.spec, []).append(mine.ahead - its.ahead)
        runs = [float(np.mean(changes)) for changes in by_run.values()]
        means = [
            [np.mean([getattr(one, key) for one in side]) for side in zip(*pairs.values(), strict=True)]
            for key in ("ahead", "gain")
        ]
        verdicts = Counter(mine.verdict != its.verdict for mine, its in pairs.values())
        harmful = [
            sum(one.verdict == "forecast" and one.gain < HARMFUL for one in side) for side in zip(*pairs.values(), strict=True)
        ]
        rows.append([
            str(count), f"{len(pairs)}, {len(runs)}", *(f"{a:.3f}, {b:.3f}" for a, b in means),
            number(float(np.median([mine.ahead - its.ahead for mine, its in pairs.values()])), 3),
            f"{np.mean(runs):+.3f} +- {np.std(runs, ddof=1) / math.sqrt(len(runs)):.3f}",
            str(verdicts[True]), "{}, {}".format(*harmful),
        ])  # fmt: skip
    header = (
        "snapshots",
        "pairs, runs",
        f"steps saved / h, at {BASELINE}",
        f"gain of loss, at {BASELINE}",
        "change of the steps, median",
    )
    return table((*header, "mean over runs +- its error", "other verdicts", f"harmful and kept, at {BASELINE}"), rows)


def _saved(cell: Cell, results: dict[Cell, dict[str, Any]]) -> Saved:
    result = results[cell]
    control = results[Cell("resume", cell.spec, cell.origin, quality.METHOD_LEAD, "persistence")]
    gram, sample = training.fitted(cell.spec).judged()
    task = Task(gram, sample, Timeline(gram.steps, float(result["origin"])), float(result["horizon"]))
    with context("blend", int(cell.method)):
        verdict = decide(METHODS["blend"], task, "resume").verdict
    curve = results[Cell("plain", cell.spec)]["curve"]
    return Saved(steps_ahead(curve, result, control), 1 - result["averaged"] / control["averaged"], verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("weights").add_argument("folders", nargs="+", type=Path)
    resuming = commands.add_parser("resume")
    resuming.add_argument("counts", nargs="+", type=int)
    resuming.add_argument("--report-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.command == "weights":
        print(weights(options.folders))
        return
    wanted = chosen(options.counts)
    if not options.report_only:
        quality.run(wanted, 1, Console())
    print(report(wanted))


if __name__ == "__main__":
    main()
