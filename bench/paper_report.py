"""The section of docs/results.md on the paper's method in its own setting: its rows, and what they say in words."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from figures import grouped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from figures import Results

TITLE = "The paper's method in its own setting"
KINDS = ("regression", "distilbert")  # of cells
OTHERS, OWN, MIXED, GRAD = "lfd2, other runs", "lfd2, own history", "lfd2, other runs of all settings", ", L_grad"
NEAR = 0.02  # errors as close as this are told apart by chance

Table = dict[str, dict[str, dict[float, tuple[float, float]]]]
"""Error and mean absolute error by run, method and lead."""


def rows(results: Results) -> list[list[str]]:
    """A header, and a row for each run and method; nothing where nothing was measured."""
    found, used = _by_lead(results), _cpu_ms(results)
    body = [
        [run, method, *(f"{ratio:.2f} ({mae:.2g})" for ratio, mae in each.values()), f"{used[_kind(run)][method]:,.1f}"]
        for run, methods in found.items()
        for method, each in methods.items()
    ]
    leads = sorted({lead for methods in found.values() for each in methods.values() for lead in each})
    return [["run", "method", *(f"lead {lead:g}" for lead in leads), "CPU, ms"], *body] if body else []


def words(results: Results) -> str:
    seeds = {kind: len([cell for cell in results if cell.kind == kind]) for kind in KINDS}
    return f"""
"Less is More: Efficient Weight Farcasting with 1-Layer Neural Network" (arXiv 2505.02714) tests its method on two-dimensional linear regression
by SGD and on DistilBERT. We test it on regressions of 400 steps in batches of 10, with three rates, three noise levels (0.1, 0.3, 1) and 40
runs of each per seed, and on the small DistilBERT above, trained from scratch. Seeds measured: {seeds["regression"]} of the regressions, {seeds["distilbert"]} of DistilBERT. Each run
has a snapshot every 2 % and the origin at its middle. Leads go from one snapshot to the length of the history (8 to 200 steps, and 24 to
600). At the origin, a run at rate 0.002 has gone a third of the way, at 0.01 nine tenths; at 0.05 only noise is left. Rates, noise and data are
our choice: we do not know the paper's.

`other runs`: as in the paper, one layer is fitted on other runs: on their first weights, their weights at the origin, and their later weights.
These are 200 runs of the same rate and noise, or DistilBERT's run of the other seed. This needs such runs, trained up to the forecast
step. `of all settings`: 1,800 runs of all rates and noise levels together. `own history`: as in farcast, from the run alone; a regression
has two weights, so this fits three numbers on two rows. `L_grad`: its weight; 0 if none is named. The gate is not used: every forecast counts.

A figure is || w_hat - w || / || w_last - w ||, median over runs; in brackets is the mean of |w_hat - w|. Both are medians over noise levels and
seeds. 1.00 is the error without a forecast. CPU: milliseconds of a fit and a forecast for one run at a lead of 0.48. The weights are in memory for
the regressions, and in files for farcast's own fit on DistilBERT. The cost of training other runs is not included.

{_findings(_by_lead(results), _cpu_ms(results))}
"""


def _findings(found: Table, used: dict[str, dict[str, float]]) -> str:
    """What the figures say, good and bad."""
    pairs = [
        {name: each[lead][0] for name, each in methods.items()} for methods in found.values() for lead in methods["persistence"]
    ]
    alone = [{name: ratio for name, ratio in pair.items() if OTHERS not in name and GRAD not in name} for pair in pairs]
    near = sum(pair[OTHERS] <= min(pair.values()) + NEAR for pair in pairs)
    counts = {name: sum(pair[name] <= min(pair.values()) + NEAR for pair in alone) for name in alone[0]}
    best = [f"{name.removesuffix(', own history')} {counts[name]}" for name in sorted(counts, key=lambda n: -counts[n])]
    cost = [
        f"{kind} {times[OTHERS]:,.0f} fitted on other runs, {times[OWN]:,.0f} from its own history, k5 {times['k5']:,.1f}"
        for kind, times in used.items()
    ]
    first = f"""Fitted on other runs of the same kind, the paper's layer has the lowest error of all, or one within {NEAR:g} of
        it, in {near} of {len(pairs)} pairs of run and lead: {_ranges(found, OTHERS)}. Fitted on runs of all settings together:
        {_ranges(found, MIXED)}."""
    second = f"""Without other runs, these have the lowest error or one within {NEAR:g} of it, in this number of the
        {len(pairs)} pairs: {", ".join(best)}. `lfd2` from its own history: {_ranges(found, OWN)}."""
    third = f"""L_grad changes the error by more than {NEAR:g} in this number of the {len(pairs)} pairs. Fitted on other runs:
        {_grad_changes(pairs, OTHERS)}. From its own history: {_grad_changes(pairs, OWN)}."""
    return "\n".join(map(_bullet, (first, second, third, f"CPU of `lfd2` in ms: {'; '.join(cost)}.")))


def _bullet(text: str) -> str:
    return textwrap.fill("- " + " ".join(text.split()), 120, subsequent_indent="  ", break_on_hyphens=False)


def _ranges(found: Table, method: str) -> str:
    """The range of the error over leads, run by run."""
    ratios = {run: [ratio for ratio, _ in methods[method].values()] for run, methods in found.items() if method in methods}
    return ", ".join(f"{min(each):.2f} to {max(each):.2f} ({run})" for run, each in ratios.items())


def _grad_changes(pairs: Sequence[dict[str, float]], method: str) -> str:
    found = []
    for weight in (1, 10):
        changes = [pair[f"{method}{GRAD} {weight}"] - pair[method] for pair in pairs]
        lower, higher = sum(c < -NEAR for c in changes), sum(c > NEAR for c in changes)
        found.append(f"weight {weight} lower in {lower}, higher in {higher}")
    return "; ".join(found)


# --- medians over seeds and noise levels -----------------------------------------------------------------------------


def _by_lead(results: Results) -> Table:
    every = [row | {"run": _run(row)} for cell, r in results.items() if cell.kind in KINDS for row in r["rows"]]
    return {
        run: {
            method: {
                lead: (_median([row["ratio"] for row in each]), _median([row["mae"] for row in each]))
                for lead, each in grouped(same, lambda row: row["lead"]).items()
            }
            for method, same in grouped(ones, lambda row: row["method"]).items()
        }
        for run, ones in grouped(every, lambda row: row["run"]).items()
    }


def _run(row: dict[str, Any]) -> str:
    return f"regression, rate {row['rate']:g}" if "rate" in row else "DistilBERT"


def _kind(run: str) -> str:
    return KINDS[run == "DistilBERT"]


def _cpu_ms(results: Results) -> dict[str, dict[str, float]]:
    """Of a fit and a forecast, by kind of cell and method."""
    found = grouped([(cell.kind, r["cpu_s"]) for cell, r in results.items() if cell.kind in KINDS], lambda pair: pair[0])
    return {
        kind: {name: 1000 * _median([used[name] for _, used in ones]) for name in ones[0][1]} for kind, ones in found.items()
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
