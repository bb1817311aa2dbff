"""The report's section on a real pretrained model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from figures import NEVER, grouped, replaced
from tables import NOTHING, number, section, spread, table
from trials import JUDGED, LEAPS, ONE, PLAIN, RANDOM, STRETCHES, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pretrained_tasks import Setting

KINDS = {"full": "all weights", "lora": "LoRA"}
TASKS = {"sections": "Debian sections", "modules": "Python modules"}
SHOWN = (PLAIN, LEAPS, JUDGED, RANDOM)
Modes = dict[str, dict[str, Any]]


def compose(trials: Sequence[Trial]) -> str:
    """The section, from the results that are there."""
    found = {setting: modes for setting, modes in _results(trials).items() if PLAIN in modes}
    single = [_single_row(setting, modes) for setting, modes in found.items() if ONE in modes]
    several = [
        _leaps_row(setting, modes) for setting, modes in found.items() if {LEAPS, JUDGED} & modes.keys() or ONE not in modes
    ]
    text = """
all-MiniLM-L6-v2 (22.7 million parameters) with a new head, fine-tuned by AdamW with batches of 32, dropout, clipping at 1 and warm-up over the
first tenth; the rate then falls to zero. Debian sections: predict the section of a package from its one-line description, some 40 classes,
400 steps. Python modules: predict which of twenty standard modules three lines of source come from, 240 steps. LoRA is PEFT's, rank 8 on all
linear layers. Losses and accuracies are of 640 held-out texts at the end of the schedule. The checkpoints are folders as the Trainer writes
them; farcast runs as its own process.
"""
    leaps = f"""
`farcast leap` after each of {STRETCHES} stretches except the last, counters kept, so that all runs train the same steps. `passes` is the first
evaluation (every {100 // STRETCHES} % of the run) with at most the plain run's final loss, as a share of the plain run's steps;
{NEVER:g} if there is none. `steered by the loss`: with `--eval-cmd`, on every other held-out text. `random` leaps when `leaps` did, by the
same norm per tensor.
"""
    one = f"""
At 60 % of the run, `predict --even-if-worse` forecasts 20 % ahead with the default method and advances the counters; training then continues to
the end. R is the share of the skipped training that the forecast replaces, compared with a control with advanced counters and unchanged
weights; `{NOTHING}` if the control lost under 1 %. `verdict` is the default's at that horizon, `own` the horizon that it would choose
itself.
"""
    header = ["run", "rate", "seed"]
    tables = []
    if several:
        lines = [
            *header,
            "plain",
            "leaps",
            "steered by the loss",
            "random",
            "leaps pass",
            "steered pass",
            "random passes",
            "made",
        ]
        tables.append(f"### Leaps after every stretch\n\n{leaps.strip()}\n\n" + table(lines, [*several, *_mean_leaps(found)]))
    if single:
        lines = [*header, "whole run", "control", "forecast", "R", "random, R", "verdict", "S", "own"]
        tables.append(f"### One leap under the schedule\n\n{one.strip()}\n\n" + table(lines, [*single, _mean_single(found)]))
    return section("A real pretrained model", text, *tables)


def _results(trials: Sequence[Trial]) -> dict[Setting, Modes]:
    done = [(trial, result) for trial in trials if trial.is_done and (result := trial.read())]
    return {
        setting: {trial.mode: result for trial, result in pairs}
        for setting, pairs in grouped(done, lambda pair: pair[0].setting).items()
    }


def _key(setting: Setting) -> list[str]:
    run = f"{TASKS[setting.task]}, {KINDS[setting.kind]}, {setting.schedule}"
    return [run, f"{setting.lr:g}", str(setting.seed)]


def _end(loss: float, accuracy: float) -> str:
    return f"{number(loss, 4)} ({100 * accuracy:.1f} %)"


# --- leaps after every stretch ---------------------------------------------------------------------------------------


def _leaps_row(setting: Setting, modes: Modes) -> list[str]:
    ends = [_end(*modes[mode]["curve"][-1][1:]) if mode in modes else NOTHING for mode in SHOWN]
    made = [sum(leap["norms"] is not None for leap in modes[mode]["leaps"]) for mode in (LEAPS, JUDGED) if mode in modes]
    shares = (number(passes(modes, mode)) for mode in SHOWN[1:])
    return [*_key(setting), *ends, *shares, ", ".join(map(str, made))]


def passes(modes: Modes, mode: str) -> float:
    """The share of the plain run's steps at which a mode has the plain run's loss at the end; nan without the mode."""
    if mode not in modes:
        return math.nan
    last, target, _ = modes[PLAIN]["curve"][-1]
    return next((step / last for step, loss, _ in modes[mode]["curve"] if loss <= target), NEVER)


def _mean_leaps(found: dict[Setting, Modes]) -> list[list[str]]:
    """A line for each kind of run at each rate: the mean over seeds and schedules."""
    rows = []
    for (task, kind, lr), pairs in grouped(list(found.items()), lambda p: (p[0].task, p[0].kind, p[0].lr)).items():
        both = [modes for _, modes in pairs if LEAPS in modes or JUDGED in modes]
        losses = [[modes[mode]["curve"][-1][1] for modes in both if mode in modes] for mode in SHOWN]
        shares = [spread([passes(modes, mode) for modes in both if mode in modes]) for mode in SHOWN[1:]]
        label = f"**mean, {TASKS[task]}, {KINDS[kind]}**"
        rows += [[label, f"{lr:g}", "all", *(spread(each, 4) for each in losses), *shares, ""]] if both else []
    return rows


# --- one leap under the schedule -------------------------------------------------------------------------------------


def _single_row(setting: Setting, modes: Modes) -> list[str]:
    one, default = modes[ONE], modes[ONE]["default"]
    ends = [_end(*modes[PLAIN]["curve"][-1][1:]), _end(*one["control"]["final"]), _end(*one["forecast"]["final"])]
    shares = [number(_replaced(modes, name)) for name in ("forecast", "random")]
    own = str(default["horizon"]) if default["verdict"] == "forecast" else "none"
    return [*_key(setting), *ends, *shares, one["said"]["verdict"], number(one["said"]["coherence"]), own]


def _replaced(modes: Modes, name: str) -> float:
    one, full = modes[ONE], modes[PLAIN]["curve"][-1][1]
    return replaced(one[name]["final"][0], one["control"]["final"][0], full)


def _mean_single(found: dict[Setting, Modes]) -> list[str]:
    measured = [modes for modes in found.values() if ONE in modes]
    shares = [spread([_replaced(modes, name) for modes in measured]) for name in ("forecast", "random")]
    kept = sum(modes[ONE]["said"]["verdict"] == "forecast" for modes in measured)
    return ["**mean**", "all", "all", "", "", "", *shares, f"kept {kept} of {len(measured)}", "", ""]
