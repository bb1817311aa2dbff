"""The report's sections on a leap under a schedule and on leaps with memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from anneal import PLACES
from figures import TELLING, Annealed, annealed, grouped, whole
from memory import EVALUATIONS, FACTORS, JUDGED, LEAPS, NONE, RANDOM
from tables import NOTHING, number, section, spread, table
from titles import SCHEDULES, title
from training import AVERAGED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from figures import Results, Whole
    from tasks import Spec

MODES = {
    NONE: "no leap",
    LEAPS: "leaps",
    JUDGED: "leaps, steered by the loss",
    RANDOM: "random direction",
    "rate-2": "rate x2",
    "rate-4": "rate x4",
}
CLASSES = {  # of runs, for the lines with the mean
    "mean, rates too small": ("mlp-sgd-small", "conv-small", "gpt-small"),
    "mean, tuned rates": ("mlp-sgd", "conv", "gpt"),
}


# --- one leap under a schedule ---------------------------------------------------------------------------------------


def annealing(results: Results) -> str:
    """R by run, origin and lead, with the default's verdicts."""
    found = annealed(results)
    rows = [_annealed_row(title(name), ones) for name, ones in grouped(found, lambda one: one.spec.name).items()]
    for schedule, words in SCHEDULES.items():
        ones = [one for one in found if one.spec.schedule == schedule]
        rows += [_annealed_row(f"**mean, {words}**", ones)] if ones else []
    rows += [_annealed_row("**mean**", found)] if found else []
    for label, kept in (("**mean where the default kept**", True), ("**mean where it abstained**", False)):
        ones = [one for one in found if one.kept is kept]
        rows += [_annealed_row(label, ones)] if ones else []
    text = f"""
The rate falls to zero by the end of the run. At an origin, `predict --even-if-worse` writes a forecast with the default method and counters
advanced by a lead of the origin. Training continues from it to the end of the schedule. The control has advanced counters and unchanged
weights. R = (final loss of the control - of the forecast) / (final loss of the control - of the whole run): 1 if the leap replaces all of
the training that it skips, 0 if it replaces none. `{NOTHING}` if the control ends less than {100 * TELLING:g} % above the whole run.
Columns are origin / lead, cells the mean over seeds with its range. `random` is a random direction with the same norm per tensor. `kept`
says how often the default would write the forecast of that horizon, `own horizon` how often it writes one of its own, and its mean length
as a share of the run.
"""
    header = ["run", *(f"{origin:g} / {lead:g}" for origin, lead in PLACES), "mean R", "random", "kept", "own horizon"]
    return section("One leap under a schedule", text, table(header, rows) if rows else "")


def _annealed_row(label: str, ones: Sequence[Annealed]) -> list[str]:
    at = grouped(ones, lambda one: (one.origin, one.lead))
    chosen = [one.chosen for one in ones if one.chosen]
    own = f"{len(chosen)} of {len(ones)}" + (f", {np.mean(chosen):.2f}" if chosen else "")
    return [
        label,
        *(spread([one.replaced for one in at.get(place, ())]) for place in PLACES),
        number(_mean([one.replaced for one in ones])),
        number(_mean([one.random for one in ones])),
        f"{sum(one.kept for one in ones)} of {len(ones)}",
        own,
    ]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


# --- leaps with memory -----------------------------------------------------------------------------------------------


def remembering(results: Results) -> str:
    """Shares of steps and losses at the end, for each run and seed."""
    found = _remembered(results)
    shares = [[*_key(key), *(_shares(columns.get(mode)) for mode in MODES)] for key, columns in found.items()]
    shares += [line for label, names in CLASSES.items() if (line := _mean_row(label, names, found))]
    ends = [[*_key(key), *(_ends(columns.get(mode)) for mode in MODES)] for key, columns in found.items()]
    text = f"""
`farcast leap` after each of 50, 30 or 20 stretches of a run. The counters are kept: every mode trains the same steps, at the same rates, on
the same batches. The loss is measured every N / {EVALUATIONS} steps, of the weights (raw, mean of three neighbours) and of the mean of
the weights at the last {AVERAGED} of these (averaged, across leaps). The figure is the number of steps to the loss that the run without
leaps has after 50, 75 and 100 % of its steps, as a share of the steps that it needs; raw / averaged. `!` is the number of the six
targets that were never reached; each counts as 1.05 N. In brackets: the number of leaps. `no leap` has the same average. `random
direction` leaps when `leaps` did, by the same norm per tensor. `rate x2` and `x4` do not leap. The two seeds were not used for any
choice.
"""
    header = ["run", "stretches", "seed", *MODES.values()]
    last = "### Loss at the end, raw / averaged\n\n" + table(header, ends) if ends else ""
    return section("Leaps with memory", text, table(header, shares) if shares else "", last)


def _remembered(results: Results) -> dict[tuple[Spec, int], dict[str, Whole]]:
    """By run and number of stretches, what came of each mode."""
    cells = [(cell, result) for cell, result in results.items() if cell.kind == "memory"]
    plain = {cell.spec: result["curve"] for cell, result in cells if cell.method == NONE}
    counts = {(c.spec, _count(c.method)) for c, _ in cells if c.method not in {NONE, *FACTORS}}
    found: dict[tuple[Spec, int], dict[str, Whole]] = {}
    for cell, result in cells:
        for spec, count in sorted(counts, key=lambda pair: -pair[1]):
            if spec == cell.spec and spec in plain and _count(cell.method) in {0, count}:
                num_leaps = sum(bool(leap["norms"]) for leap in result["leaps"])
                there = found.setdefault((spec, count), {})
                there[_mode(cell.method)] = whole(result["curve"], plain[spec], num_leaps)
    return found


def _count(method: str) -> int:
    """Stretches of a mode that leaps, else 0."""
    return 0 if method in {NONE, *FACTORS} else int(method.rpartition("-")[2])


def _mode(method: str) -> str:
    return method.rpartition("-")[0] if _count(method) else method


def _key(key: tuple[Spec, int]) -> list[str]:
    spec, count = key
    return [title(spec.name), str(count), str(spec.seed)]


def _shares(one: Whole | None) -> str:
    if one is None:
        return NOTHING
    leaps, missed = f" [{one.leaps}]" if one.leaps else "", f" !{one.missed}" if one.missed else ""
    return f"{number(one.raw)} / {number(one.average)}{leaps}{missed}"


def _ends(one: Whole | None) -> str:
    return NOTHING if one is None else f"{number(one.final, 3)} / {number(one.final_average, 3)}"


def _mean_row(label: str, names: Sequence[str], found: dict[tuple[Spec, int], dict[str, Any]]) -> list[str]:
    """The mean over runs of the mean over seeds, of each mode that all of them have."""
    columns = [by_mode for (spec, count), by_mode in found.items() if spec.name in names and count == 50]
    runs = grouped(
        [(s.name, by_mode) for (s, count), by_mode in found.items() if s.name in names and count == 50], lambda p: p[0]
    )
    if not columns:
        return []
    line = [f"**{label}**", "50", "all"]
    for mode in MODES:
        if not all(mode in by_mode for by_mode in columns):
            line.append(NOTHING)
            continue
        means = [[_mean([getattr(m[mode], key) for _, m in pairs]) for pairs in runs.values()] for key in ("raw", "average")]
        line.append(" / ".join(number(_mean(mean)) for mean in means))
    return line
