"""What forecasts are worth: trains small runs, leaps, goes on training, and writes docs/results.md.

Every result is a file below bench/out/quality. A second start measures only what is missing, so that it may be stopped
at any time.

    python bench/quality.py                 all runs, a bit over an hour on two cores
    python bench/quality.py --only memory   only cells whose label contains this; `anneal`, `memory-gpt`, `s11` likewise
    python bench/quality.py --large         also a GPT of 7.5 million parameters, some three hours on one core
    python bench/quality.py --quick         MLP and convolutional net, one seed; a few minutes, report in bench/out
    python bench/quality.py --report-only   write the report from the results that are there
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import anneal
import memory
import report
import report_pretrained
from cells import GATE_LEADS, RESUME_METHODS
from paper import other_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from store import HERE, OUT, Cell, fill
from tasks import Spec
from training import ORIGINS, fit_file, run_folder, start_file
from trials import trials
from whole import DOUBLED, GATED, MODES, RANDOM

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = HERE.parent / "docs" / "results.md"
METHOD_LEAD = 0.25  # at which the methods are compared
SCHEDULES = ("cosine", "linear", "wsd")
UNSEEN = (11, 12)  # seeds
STEP_S = {"mlp": 0.0012, "conv": 0.0035, "gpt": 0.031, "bert": 0.02, "lora": 0.034, "reinforce": 0.033, "gpt-m": 1.5}
VALIDATION_S = {"mlp": 0.004, "conv": 0.03, "gpt": 0.08, "bert": 0.11, "lora": 0.09, "reinforce": 0.08, "gpt-m": 3.5}
LEAP_S = {"gpt-m": 1.0}  # a tenth of a second elsewhere
PAPER_S = {"regression": 150.0, "distilbert": 280.0}
"""Measured on one core of a two-core machine; they only order the work and drive the progress bar."""


# --- the runs --------------------------------------------------------------------------------------------------------


def digits() -> list[Spec]:
    sgd = Spec("mlp-sgd", "mlp", "sgd", 0.4, 1500, 64)
    conv = Spec("conv", "conv", "adamw", 4e-3, 1500, 64)
    return [
        *_seeds(sgd, 3),
        *_seeds(replace(sgd, name="mlp-sgd-small", rate_factor=0.25), 3),
        Spec("mlp-adamw", "mlp", "adamw", 2e-3, 1500, 64),
        replace(sgd, name="mlp-sgd-long", rate_factor=0.25, steps=10_000),
        *_seeds(conv, 2),
        *_seeds(replace(conv, name="conv-small", rate_factor=0.25), 2),
    ]


def text() -> list[Spec]:
    gpt = Spec("gpt", "gpt", "adamw", 4e-3, 1200, 16, warmup=60, clip=1.0, weight_decay=0.01)
    bert = Spec("bert", "bert", "adamw", 7e-4, 1200, 32, warmup=60, clip=1.0, weight_decay=0.01)
    return [*_seeds(gpt, 2), *_seeds(replace(gpt, name="gpt-small", rate_factor=0.05), 2), *_seeds(bert, 2)]


def fine_tuning() -> list[Spec]:
    base = Spec("pre-trained", "gpt", "adamw", 2e-3, 1500, 16, warmup=60, clip=1.0, weight_decay=0.01)
    full = Spec("full", "gpt", "adamw", 1e-4, 600, 16, clip=1.0, weight_decay=0.01, start=base)
    lora = replace(full, name="lora", task="lora", lr=1e-3)
    reinforce = replace(full, name="reinforce", task="reinforce", lr=1e-5)
    return [spec for each in (full, lora, reinforce) for spec in _seeds(each, 2)]


def _seeds(spec: Spec, count: int) -> list[Spec]:
    return [replace(spec, seed=seed) for seed in range(count)]


def _first(specs: Sequence[Spec], *names: str) -> list[Spec]:
    """One run of each of these names."""
    return [next(spec for spec in specs if spec.name == name) for name in names]


def scheduled() -> list[Spec]:
    """Runs whose rate falls to zero; `anneal` leaps on them."""
    short = _first(digits(), "mlp-sgd", "mlp-sgd-small", "conv", "conv-small")
    runs = [*(seeded for spec in short for seeded in _seeds(spec, 2)), *_first(text(), "gpt")]
    return [replace(spec, name=f"{spec.name}-{how}", schedule=how) for how in SCHEDULES for spec in runs]


def remembered() -> list[tuple[Spec, tuple[int, ...]]]:
    """Runs that leap with memory, each with the numbers of its stretches; on seeds that no choice was made by."""
    short = _first([*digits(), *text()], "mlp-sgd", "mlp-sgd-small", "conv", "conv-small", "gpt", "gpt-small")
    long = replace(_first(digits(), "mlp-sgd-small")[0], name="mlp-sgd-long", steps=8_000)
    tuned = _first(fine_tuning(), "full", "lora", "reinforce")
    runs = [*((spec, (50,)) for spec in short), *((spec, (30,)) for spec in tuned), (long, (50, 20))]
    return [(replace(spec, seed=seed), counts) for spec, counts in runs for seed in UNSEEN]


def large() -> list[Cell]:
    """A GPT of 7.5 million parameters, for a night; only with --large."""
    spec = Spec("gpt-m", "gpt-m", "adamw", 1e-3, 600, 16, seed=11, warmup=60, clip=1.0, weight_decay=0.1, schedule="cosine")
    return [Cell("memory", spec, method=method) for method in memory.methods(50)]


def standard() -> list[Cell]:
    return [*at_constant_rates(), *on_schedules(), *with_memory()]


def on_schedules() -> list[Cell]:
    found = []
    for spec in scheduled():
        found.append(Cell("plain", spec))
        found += [Cell("anneal", spec, *place, method) for place in anneal.PLACES for method in anneal.METHODS]
    return found


def with_memory() -> list[Cell]:
    return [Cell("memory", spec, method=method) for spec, counts in remembered() for method in memory.methods(*counts)]


def at_constant_rates() -> list[Cell]:
    slow = [*text(), *fine_tuning()]  # two origins do for these, or it would take twice as long
    return [
        *(cell for spec in digits() for cell in cells_of(spec, ORIGINS)),
        *(cell for spec in slow for cell in cells_of(spec, ORIGINS[1:])),
        *paper(),
    ]


def quick() -> list[Cell]:
    names = {"mlp-sgd", "mlp-sgd-small", "conv", "conv-small"}
    specs = [spec for spec in digits() if spec.name in names and spec.seed == 0]
    return [cell for spec in specs for cell in cells_of(spec, ORIGINS[1:2])]


def cells_of(spec: Spec, origins: Sequence[float]) -> list[Cell]:
    """All that is measured on one run."""
    found = [Cell("plain", spec), Cell("ratio", spec)]
    for origin in origins:
        found.append(Cell("evaluation", spec, origin))
        found += [Cell("resume", spec, origin, METHOD_LEAD, method) for method in RESUME_METHODS]
        found += [Cell("resume", spec, origin, lead, "blend") for lead in GATE_LEADS if lead != METHOD_LEAD]
    if spec.start is None and spec.task != "bert":
        found += [Cell("whole", spec, method=mode) for mode in MODES]
    return found


def paper() -> list[Cell]:
    """The paper's method in its own setting."""
    regression = Spec("regression", "regression", "sgd", 0.01, 400, 10)
    regressions = [Cell("regression", spec) for spec in _seeds(regression, 2)]
    return [*regressions, *(Cell("distilbert", spec) for spec in text() if spec.name == "bert")]


# --- order -----------------------------------------------------------------------------------------------------------


def needs(cell: Cell) -> list[Cell]:
    """The cells whose files this one reads."""
    spec, start = cell.spec, [Cell("pretrain", cell.spec.start)] if cell.spec.start else []
    copied = memory.control_of(cell) if cell.kind == "memory" else None
    found: dict[str, list[Cell]] = {
        "pretrain": [],
        "plain": start,
        "fit": [Cell("plain", spec)],
        "regression": [],
        "whole": [Cell("whole", spec, method=GATED)] if cell.method == RANDOM else [],
        "memory": [*start, *([copied] if copied else [])],
    }
    if cell.kind == "distilbert":
        return [Cell("fit", spec), Cell("fit", other_seed(spec))]
    return found.get(cell.kind, [Cell("fit", spec)])


def is_done(cell: Cell) -> bool:
    """Whether a cell's result is there, and the files that others read."""
    files = {"pretrain": start_file, "plain": run_folder, "fit": fit_file}
    return cell.path.exists() and (cell.kind not in files or files[cell.kind](cell.spec).exists())


def to_do(cells: Sequence[Cell]) -> list[Cell]:
    """What is missing of some cells and of what they need."""
    found: dict[Cell, None] = {}
    waiting = [cell for cell in cells if not is_done(cell)]
    while waiting:
        cell = waiting.pop()
        found[cell] = None
        waiting += [other for other in needs(cell) if other not in found and not is_done(other)]
    return list(found)


def expected_s(cell: Cell) -> float:
    """About how long a cell takes."""
    if cell.kind in PAPER_S:
        return PAPER_S[cell.kind]
    step, validation, steps = STEP_S[cell.spec.task], VALIDATION_S[cell.spec.task], cell.spec.steps
    if cell.kind in {"plain", "whole", "pretrain"}:
        evaluations = 0 if cell.kind == "pretrain" else 200
        leaps = 2 if cell.kind == "whole" and cell.method not in {RANDOM, DOUBLED} else 0
        return steps * step + evaluations * validation + leaps
    if cell.kind == "memory":
        num_leaps = 50 * cell.method.startswith((memory.LEAPS, memory.JUDGED, memory.RANDOM))
        return steps * step + 100 * validation + num_leaps * (2 * validation + LEAP_S.get(cell.spec.task, 0.1))
    if cell.kind == "anneal":
        return (1 - cell.origin * (1 + cell.lead)) * steps * step + 2 * validation + 0.3
    if cell.kind in {"resume", "context"}:
        return steps / 10 * step + 8 * validation + 0.3
    return {"fit": 0.3, "ratio": 10.0 if cell.spec.task in {"mlp", "conv"} else 28.0, "evaluation": 0.5 + 7 * validation}[
        cell.kind
    ]


def priority(cell: Cell) -> tuple[bool, float]:
    """What others wait for comes first, then what takes long."""
    first = cell.kind in {"pretrain", "plain", "fit"} or cell.method == GATED or cell.method.startswith(memory.LEAPS)
    return not first, -expected_s(cell)


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, and why."""

    cell: Cell
    error: str


def prepare_worker() -> None:
    """One thread for each process: no result depends on how many there are."""
    import torch

    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)


def work(cell: Cell) -> None:
    """Measure one cell in this process."""
    import cells
    import context
    import paper
    import training
    import whole

    measures = {
        "pretrain": training.pretrain,
        "plain": training.plain,
        "fit": training.fit,
        "ratio": cells.ratio,
        "resume": cells.resume,
        "context": context.resume,
        "evaluation": cells.evaluation,
        "whole": whole.whole,
        "anneal": anneal.anneal,
        "memory": memory.memory,
        "regression": paper.regression,
        "distilbert": paper.distilbert,
    }
    fill(cell, measures[cell.kind])


def run(cells: Sequence[Cell], jobs: int, console: Console) -> list[Failure]:
    """Measure what is missing, in parallel; what needs a failed cell is left out."""
    waiting = sorted(to_do(cells), key=priority)
    failures: list[Failure] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_worker) as pool,
    ):
        bar = progress.add_task("cells", total=len(waiting), left="")
        running: dict[Future[None], Cell] = {}
        while waiting or running:
            for cell in _ready(waiting, jobs - len(running)):
                waiting.remove(cell)
                running[pool.submit(work, cell)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                error = future.exception()
                if error or not is_done(cell):
                    reason = f"{type(error).__name__}: {error}" if error else "the code changed while it was measured"
                    failures.append(Failure(cell, reason))
                    console.print(f"[red]failed[/] {cell.label}: {failures[-1].error}", highlight=False)
                left = sum(map(expected_s, [*waiting, *running.values()])) / jobs
                progress.update(bar, advance=1, description=cell.label, left=f"about {left / 60:.0f} min left")
    return failures + [Failure(cell, "what it needs is missing") for cell in waiting]


def _ready(waiting: Sequence[Cell], count: int) -> list[Cell]:
    found: list[Cell] = []
    for cell in waiting:
        if len(found) == count:
            break
        if all(map(is_done, needs(cell))):
            found.append(cell)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MLP and convolutional net, one seed, one origin")
    parser.add_argument("--large", action="store_true", help="also the GPT of 7.5 million parameters, some hours")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; one per core by default")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only cells whose label contains this")
    parser.add_argument("--list", action="store_true", help="say what is missing and how long it would take")
    parser.add_argument("--output", type=Path, help="where the report goes")
    options = parser.parse_args()
    console = Console()
    cells = quick() if options.quick else standard()
    if not options.quick:
        cells += [cell for cell in large() if options.large or cell.path.exists()]
    chosen = [cell for cell in cells if options.only in cell.label]
    if options.list:
        missing = to_do(chosen)
        console.print(*(cell.label for cell in missing), sep="\n", highlight=False)
        console.print(f"{len(missing)} cells, about {sum(map(expected_s, missing)) / options.jobs / 60:.0f} minutes")
        return
    failures = [] if options.report_only else run(chosen, options.jobs, console)
    target = options.output or (OUT / "results-quick.md" if options.quick else RESULTS)
    content = report.compose(cells, "" if options.quick else report_pretrained.compose(trials()))
    target.write_text(content)
    console.print(content, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {os.path.relpath(target)}", highlight=False)
    sys.exit(f"{len(failures)} cells failed" if failures else 0)


if __name__ == "__main__":
    main()
