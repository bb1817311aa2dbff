"""docs/results.md: the tables of what was measured. Every number in it comes from the stored cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import paper_report
import report_leaps
from cells import EVALUATED, GATE_LEADS, RATIO_LEADS, RESUME_METHODS
from figures import HARMFUL, MISSED, NEVER, Resumed, Whole, grouped, rank_correlation, resumed, whole
from tables import NOTHING, number, section, spread, table
from titles import title
from whole import DOUBLED, GATED, RANDOM, UNGATED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from figures import Results
    from store import Cell
    from tasks import Spec

MODE_TITLES = {GATED: "leaps, default", UNGATED: "leaps, no gate", RANDOM: "random direction", DOUBLED: "rate doubled"}


def compose(cells: Sequence[Cell], pretrained: str = "") -> str:
    """The whole page, from the cells that are there, with the section on a pretrained model."""
    records = {cell: record for cell in cells if (record := cell.read())}
    results: Results = {cell: record["result"] for cell, record in records.items()}
    found = resumed(results)
    parts = [
        _head(cells, records),
        _runs(results),
        _ratios(results),
        _resuming(found),
        _whole_runs(results),
        report_leaps.annealing(results),
        report_leaps.remembering(results),
        pretrained,
        _evaluation(results),
        _gate(found),
        _calibration(results),
        _paper(results),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


# --- words and tables ------------------------------------------------------------------------------------------------


def _origins(shares: Iterable[float]) -> str:
    return ", ".join(f"{share:g}" for share in sorted(set(shares)))


def _of_kind(results: Results, kind: str) -> dict[str, list[tuple[Cell, dict[str, Any]]]]:
    """Cells of a kind by the name of their run."""
    return grouped([(c, r) for c, r in results.items() if c.kind == kind], lambda pair: pair[0].spec.name)


# --- sections --------------------------------------------------------------------------------------------------------


def _head(cells: Sequence[Cell], records: dict[Cell, dict[str, Any]]) -> str:
    machines = sorted({record["machine"] for record in records.values()})
    minutes = sum(record["cpu_s"] for record in records.values()) / 60
    return f"""# Results

Written by `bench/quality.py` (`make bench-quality`); do not edit. {len(records)} of {len(cells)} measurements are in it.
They took {minutes:.0f} minutes of CPU time on: {"; ".join(machines) or "no machine yet"}.

All runs are small. All methods are compared with the same seeds, batches and validation data. h is the horizon, L the history from the
first snapshot to the origin, h / L the lead, N the steps of a run. [Method](method.md) explains the methods and the gate. If several
seeds or origins are pooled, a figure is a mean with its range, `mean (min..max)`.
"""


def _runs(results: Results) -> str:
    rows = []
    for name, pairs in _of_kind(results, "plain").items():
        spec: Spec = pairs[0][0].spec
        last = [result["curve"][-1] for _, result in pairs]
        optimizer = {"sgd": "SGD", "adamw": "AdamW"}[spec.optimizer]
        rows.append([
            title(name), f"{pairs[0][1]['num_weights']:,}", f"{optimizer} {spec.lr * spec.rate_factor:g}",
            f"{spec.steps:,}", str(spec.batch), ", ".join(str(cell.spec.seed) for cell, _ in pairs),
            number(float(np.mean([p[1] for p in last])), 3), number(float(np.mean([p[2] for p in last])), 3),
        ])  # fmt: skip
    text = """
Rates are tuned unless the name of the run says otherwise. The MLP and the convnet read scikit-learn's digits, shifted by up to a pixel, with
noise. GPT and DistilBERT read Python's manual, character by character. Fine-tuning starts from a GPT of 1,500 steps and continues on
Python source code. LoRA has rank 4. REINFORCE is rewarded for the text's own next character; its loss is one minus the expected
reward. GPT and DistilBERT use a warm-up of 60 steps, clipping at 1 and weight decay 0.01; fine-tuning uses the last two. Rates are constant unless the
run's name says otherwise.
The last columns are validation losses at the end, mean over seeds: of the weights, and of the mean of the weights at the last ten
evaluations (1 % of the run apart).
"""
    header = ("run", "weights", "optimiser, rate", "steps", "batch", "seeds", "loss", "loss of the average")
    return section("Runs", text, table(header, rows) if rows else "")


def _ratios(results: Results) -> str:
    """Methods by runs; median over seeds, origins and leads."""
    by_run = {name: [row for _, r in pairs for row in r["rows"]] for name, pairs in _of_kind(results, "ratio").items()}
    known = {name: grouped([r for r in rows if r["ratio"] is not None], lambda r: r["method"]) for name, rows in by_run.items()}
    methods = list(dict.fromkeys(method for found in known.values() for method in found))
    rows = [
        [title(name), *(_median([row["ratio"] for row in found.get(method, ())]) for method in methods)]
        for name, found in known.items()
    ]
    leads = ", ".join(f"{lead:g}" for lead in RATIO_LEADS)
    text = f"""
|| w_hat - w || / || w_last - w || of each method as it is written; 1.00 is the error without a forecast. Median over seeds, the origins 0.2,
0.4, 0.5 and 0.7 of N, and the leads {leads}, if the run is long enough.
"""
    return section("Error of the weights", text, table(["run", *methods], rows) if rows else "")


def _median(values: Sequence[float]) -> str:
    return number(float(np.median(values))) if len(values) else NOTHING


def _resuming(found: Sequence[Resumed]) -> str:
    at_lead = [r for r in found if r.lead == 0.25]
    if not at_lead:
        return ""
    kept, dropped = [r for r in at_lead if r.kept], [r for r in at_lead if not r.kept]
    text = f"""
Training resumes from the forecast for N / 10 steps, from the origins {_origins(r.origin for r in at_lead)} of N and at a lead of 0.25. It uses the origin's
optimiser state and the plain run's batches at the same step numbers. It is compared with the plain run over the last third of these
steps. `random` has blend's norm per tensor and a random direction. The gate decides on `blend`; `kept` is the number of cells in which it
allowed a forecast.

**Steps ahead**, as a share of h: the paired difference of the losses divided by the slope of the plain run's curve, if the gate kept the
forecast. **Gain**: by how many percent the loss of the weights averaged over that third is lower than the plain run's; it is less noisy than steps
ahead. **At once**: the change of the loss directly after the leap, in percent.
"""
    tables = [
        f"### Steps ahead as a share of h, where the gate kept\n\n{_by_method(at_lead, _ahead_if_kept)}",
        f"### Gain in percent, where the gate kept\n\n{_by_method(kept, lambda r: 100 * r.gain, digits=1)}",
        f"### Gain in percent, where the gate abstained\n\n{_by_method(dropped, lambda r: 100 * r.gain, digits=1)}",
        f"### Change of the loss at once in percent, where the gate kept\n\n{_by_method(kept, lambda r: 100 * r.at_once, digits=1)}",
    ]
    return section("Resuming", text, *tables)


def _ahead_if_kept(one: Resumed) -> float:
    return one.ahead if one.kept else math.nan


def _by_method(found: Sequence[Resumed], value: Any, digits: int = 2) -> str:
    methods = [name for name in RESUME_METHODS if name != "persistence"]
    rows = []
    for name, ones in grouped(found, lambda r: r.spec.name).items():
        blends = [r for r in ones if r.method == "blend"]
        by_method = grouped(ones, lambda r: r.method)
        spreads = [spread([value(r) for r in by_method.get(method, ())], digits) for method in methods]
        rows.append([title(name), f"{sum(r.kept for r in blends)} of {len(blends)}", *spreads])
    return table(["run", "kept", *methods], rows) if rows else "None.\n"


def _whole_runs(results: Results) -> str:
    plain = {cell.spec: result["curve"] for cell, result in results.items() if cell.kind == "plain"}
    rows, finals = [], []
    for name, pairs in _of_kind(results, "whole").items():
        specs = list(dict.fromkeys(cell.spec for cell, _ in pairs if cell.spec in plain))
        columns = [[whole(plain[spec], plain[spec]) for spec in specs]]
        columns += [
            [whole(r["curve"], plain[c.spec], _leaps(r)) for c, r in pairs if c.method == mode and c.spec in plain]
            for mode in MODE_TITLES
        ]
        rows.append([title(name), str(len(specs)), *(_shares(column) for column in columns)])
        finals.append([title(name), *(_ends(column) for column in columns)])
    text = f"""
Ten segments of N / 10 steps, with a snapshot every N / 100. After each segment except the last, `fit` and `predict` run with a ledger and
without a horizon. Each leap advances the counters and keeps the optimiser's state; only trained steps count. The figure is the number of
steps to the loss that the plain run has after 50, 75 and 100 % of its steps, as a share of the steps that the plain run needs; the mean
of the three. The first number is for the loss of the weights (mean of three neighbouring evaluations). The number after the slash is for the
loss of the average of the last ten evaluated weights since the last leap. In brackets: the number of leaps, mean over seeds. A target
that is never reached counts as {NEVER:g} N, and `!` is the number of such targets. `no leap` is the plain run. `random direction` leaps when
`leaps, default` did, by the same horizon and the same norm per tensor.
"""
    header = ["run", "seeds", "no leap", *MODE_TITLES.values()]
    last = (
        "### Loss at the end, of the weights / of the average\n\n" + table([header[0], *header[2:]], finals) if finals else ""
    )
    return section("Whole runs", text, table(header, rows) if rows else "", last)


def _leaps(result: dict[str, Any]) -> int:
    return sum(bool(leap["horizon"]) for leap in result["leaps"])


def _shares(column: Sequence[Whole]) -> str:
    if not column:
        return NOTHING
    leaps, missed = float(np.mean([w.leaps for w in column])), sum(w.missed for w in column)
    text = f"{spread([w.raw for w in column])} / {spread([w.average for w in column])}"
    return text + (f" [{leaps:.3g}]" if leaps else "") + (f" !{missed}" if missed else "")


def _ends(column: Sequence[Whole]) -> str:
    if not column:
        return NOTHING
    raw, average = (float(np.mean([getattr(w, key) for w in column])) for key in ("final", "final_average"))
    return f"{number(raw, 3)} / {number(average, 3)}"


def _evaluation(results: Results) -> str:
    rows = []
    for name, pairs in _of_kind(results, "evaluation").items():
        losses, own = [r["losses"] for _, r in pairs], [r["default"] for _, r in pairs]
        change = {m: [100 * (found[m] / found["last snapshot"] - 1) for found in losses] for m in (*EVALUATED, "default")}
        chosen = sorted({str(d["method"]) for d in own if d["verdict"] == "forecast"})
        wrote = sum(d["verdict"] == "forecast" for d in own)
        verdicts = f"{wrote} of {len(own)}" + (f": {', '.join(chosen)}" if chosen else "")
        last = spread([found["last snapshot"] for found in losses], 3)
        rows.append([title(name), last, *(spread(change[m], 1) for m in change), verdicts])
    text = f"""
Validation loss without training, from the origins {_origins(c.origin for c in results if c.kind == "evaluation")} of N. The first column is the
loss of the last snapshot. The others give the change of the loss in percent for each method (k5 and average-extrapolate at a lead of
0.1). `default` is what `predict --for evaluation` writes without a horizon; if it abstains, the last snapshot counts.
"""
    header = ["run", "last snapshot", *EVALUATED, "default", "default wrote"]
    return section("To evaluate", text, table(header, rows) if rows else "")


def _gate(found: Sequence[Resumed]) -> str:
    """What the gate kept of `blend`, by lead."""
    blends = [r for r in found if r.method == "blend"]
    rows = [_gate_row(f"{lead:g}", ones) for lead in GATE_LEADS if (ones := [r for r in blends if r.lead == lead])]
    rows += [_gate_row("all", blends)] if blends else []
    text = f"""
`blend`, from all runs and origins, judged by the gain of the averaged weights after resuming. `harmful`: kept although the gain was under
{100 * HARMFUL:g} %. `missed`: abstained although the gain was over {100 * MISSED:g} %. S is the coherence of the whole history,
`recent S` that of its recent half. The last columns are rank correlations.
"""
    header = ["lead", "cells", "kept", "harmful", "abstained", "missed", "gain where kept", "gain where abstained",
              "S, gain", "recent S, gain", "b, gain"]  # fmt: skip
    wrong = [r for r in blends if (r.kept and r.gain < HARMFUL) or (not r.kept and r.gain > MISSED)]
    listed = [
        [title(r.spec.name), str(r.spec.seed), f"{r.origin:g}", f"{r.lead:g}", "harmful" if r.kept else "missed",
         number(100 * r.gain, 1), number(r.coherence), number(r.recent), number(r.ratio)]
        for r in wrong
    ]  # fmt: skip
    of_them = table(["run", "seed", "origin", "lead", "what", "gain in %", "S", "recent S", "b"], listed) if listed else ""
    return section("The gate's record", text, table(header, rows) if rows else "", of_them)


def _gate_row(label: str, ones: Sequence[Resumed]) -> list[str]:
    kept, dropped = [r for r in ones if r.kept], [r for r in ones if not r.kept]
    gains = [r.gain for r in ones]
    return [
        label, str(len(ones)), str(len(kept)), str(sum(r.gain < HARMFUL for r in kept)),
        str(len(dropped)), str(sum(r.gain > MISSED for r in dropped)),
        spread([100 * r.gain for r in kept], 1), spread([100 * r.gain for r in dropped], 1),
        *(number(rank_correlation([getattr(r, key) for r in ones], gains)) for key in ("coherence", "recent", "ratio")),
    ]  # fmt: skip


def _calibration(results: Results) -> str:
    """The back-test ratio b against the real ratio, by method and lead."""
    rows = [row for _, r in ((c, r) for c, r in results.items() if c.kind == "ratio") for row in r["rows"]]
    known = grouped(
        [row for row in rows if row["ratio"] is not None and row["method"] != "persistence"], lambda row: row["method"]
    )
    lines = []
    for method, ones in known.items():
        by_lead = grouped(ones, lambda row: row["lead"])
        columns = [rank_correlation(*_pairs(by_lead.get(lead, ()))) for lead in RATIO_LEADS]
        worse = sum(row["ratio"] > 1 for row in ones if row["b"] is not None and row["b"] < 0.95)
        kept = sum(row["b"] is not None and row["b"] < 0.95 for row in ones)
        lines.append([method, str(len(ones)), *map(number, columns), str(kept), str(worse)])
    text = """
Rank correlation of the back-test ratio b with the real ratio of the forecast as written, by lead. The last column counts the forecasts with
b < 0.95 that had a ratio over 1. b clips the update. Averages do not aim at later weights, so b does not judge them. For `lfd2`, b was
only computed at a lead of 0.25.
"""
    header = ["method", "cells", *(f"lead {lead:g}" for lead in RATIO_LEADS), "b < 0.95", "of these worse than no forecast"]
    return section("b and the real ratio", text, table(header, lines) if lines else "")


def _pairs(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["b"] for row in rows], [row["ratio"] for row in rows]


def _paper(results: Results) -> str:
    """`lfd2` where the paper tests it, beside ours."""
    rows = paper_report.rows(results)
    return section(paper_report.TITLE, paper_report.words(results), table(rows[0], rows[1:])) if rows else ""
