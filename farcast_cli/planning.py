"""What a request comes to before anything is written: places, the trainer's state at the later step, the files of a forecast."""

from __future__ import annotations

import os
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.checkpoint.convert import plan_converted
from farcast_cli.checkpoint.pieces import Rewrite
from farcast_cli.checkpoint.plan import forecast_name, with_modes
from farcast_cli.engine.write import Engine
from farcast_cli.errors import OutputError, UsageError, shell_word
from farcast_cli.evaluation.judge import logs_of
from farcast_cli.files.place import check_ours, check_outside, check_place, sidecar_of
from farcast_cli.files.staged import refuse_existing
from farcast_cli.folder import folder_of
from farcast_cli.forecast.ledger import check_ledger
from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.request import Prepared, Start
from farcast_cli.second_copies import find_copies, replaced_averages
from farcast_cli.state.advance import Advanced, advance, advance_batch_counts, told_as_damage
from farcast_cli.state.metadata import advance_metadata
from farcast_cli.trainers import trainer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.checkpoint.convert import Container
    from farcast_cli.checkpoint.pieces import OutputFile
    from farcast_cli.engine.batch import Inputs
    from farcast_cli.files.staged import Check
    from farcast_cli.request import Request
    from farcast_cli.second_copies import SecondCopies
    from farcast_cli.trainers.base import Snapshot


def refuse_no_place(output: str) -> None:
    """Refuse an empty text for a place.

    Raises:
        UsageError: it is one.
    """
    if not output:
        raise UsageError("-o: expected a path, found an empty text", hint="-o OUT, or no -o: forecasts/ is the default")


def place_of(request: Request, start: Start, horizon: int, container: Container, *, unit: Fraction = Fraction(1)) -> Path:
    """Where a forecast goes.

    Args:
        unit: what the number in the run's names counts per step.

    Raises:
        UsageError: the name that the user gave does not end as the forecast's must.
        OutputError: there is no place for it.
    """
    origin = start.origin
    name = forecast_name(origin, horizon, unit=unit, keep_step=request.counters == "keep")
    if request.counters == "advance":
        name = trainer_of(origin).rename(name, state_of(origin), horizon)
    name = container.renamed(name, origin, mark=container.mark if request.purpose == "evaluation" else "")
    if request.output is None:
        return folder_of(start.run) / name
    refuse_no_place(request.output)
    if len(request.horizons) > 1 or request.output.endswith(("/", os.sep)):
        return Path(request.output) / name
    ending = container.name_ending
    if not request.output.endswith(ending):
        why = f", as {origin.path.name} does" if container.layout == "same" else ""
        raise UsageError(
            f"-o {request.output}: expected a name that ends in {ending}{why}",
            hint=f"-o {shell_word(request.output + ending)}, or -o {shell_word(request.output + os.sep)} to write into a folder",
        )
    return Path(request.output)


def state_of(origin: Snapshot) -> object:
    """The object tree of a checkpoint that is one torch file, or of the file beside its weights that is its trainer's own."""
    trees = [part.content.tree for part in origin.parts if isinstance(part.content, TorchFile)]
    content, wrote = origin.parts[0].content, trainer_of(origin).wrote
    first = content.tree if isinstance(content, TorchFile) else None
    return next((tree for tree in trees if wrote(tree)), first)


def start_at(run: Path, origin: Snapshot, index: int, request: Request) -> Start:
    """Where the forecasts of a request begin."""
    return Start(run, origin, index, trainer_of(origin).end(origin) if request.purpose == "resume" else None)


def prepare(
    request: Request,
    start: Start,
    history: Sequence[Snapshot],
    inputs: Inputs,
    horizons: Sequence[int],
    *,
    container: Container,
    paths: Sequence[Path],
    snapshots: Sequence[Snapshot],
) -> Prepared:
    """Plan the files of every horizon.

    Args:
        history: the last few snapshots up to the origin.
        paths: where the forecasts go.
        snapshots: those that are read.
    """
    with told_as_damage(start.origin):
        wanted = request.purpose == "resume"
        found = find_copies(inputs, snapshots, start.origin, with_averages=wanted, earlier=start.averages)
    inputs = found.added_to(inputs)
    planned = [_plan(request, start, history, horizon, inputs=inputs, found=found, container=container) for horizon in horizons]
    advanced, plans = tuple(moved for moved, _ in planned), tuple(plan for _, plan in planned)
    engine = Engine(inputs, request.resources, request.team)
    return Prepared(engine, plans, advanced, container, tuple(paths), tuple(snapshots), start.origin, start.run)


def _plan(
    request: Request,
    start: Start,
    history: Sequence[Snapshot],
    horizon: int,
    *,
    inputs: Inputs,
    found: SecondCopies,
    container: Container,
) -> tuple[Advanced, tuple[OutputFile, ...]]:
    """The trainer's state at the later step, and the files of the forecast."""
    _check_end(request, start, horizon)
    counters = request.counters if horizon else "keep"
    with told_as_damage(start.origin):
        is_leap = bool(horizon) and request.purpose == "resume"
        moved = advance(
            history, horizon, optimizer=request.optimizer, counters=counters, is_marked=is_leap, copies=found.by_part
        )
    moved.notes += found.notes
    if container.is_weights_only:
        moved = Advanced(moved.trees)  # what else was done is not written
    counts = advance_batch_counts(history, horizon) if counters == "advance" else {}
    texts, changes, notes = advance_metadata(history, horizon) if counters == "advance" else ({}, [], [])
    moved.changes.extend((*counts.values(), *changes))
    moved.notes.extend(notes)
    mirror = request.purpose == "evaluation"
    index_of = {tensor.name: index for index, tensor in enumerate(inputs.alignment.tensors)}
    averages = replaced_averages(start.origin, index_of, found.masters) if mirror else found.averages
    rewrite = Rewrite(
        index_of,
        request.dtype,
        request.max_shard_bytes,
        counts,
        texts,
        mirror,
        masters=found.masters,
        averages=averages,
    )
    return moved, tuple(with_modes(plan_converted(start.origin, moved, rewrite, container), start.origin))


def _check_end(request: Request, start: Start, horizon: int) -> None:
    """A Trainer that is handed a checkpoint at or past its last step trains nothing and exits happily."""
    valid, end = start.origin.step + horizon, start.end
    if request.counters == "advance" and end is not None and start.ends_before(horizon):
        longest = end[1] - start.origin.step - 1
        raise UsageError(
            f"valid step {valid}: expected a step before the end of the run, {end[0]} = {end[1]}",
            hint=(f"--horizon {longest} or less; --counters keep forecasts the weights only; " if longest > 0 else "")
            + f"farcast predict{request.source}{request.origin_option} --for evaluation writes the weights to evaluate or ship",
        )


def claim(paths: Sequence[Path], run: Path, request: Request, *, is_file: bool, existing: Check | None = None) -> None:
    """See that forecasts may be put there, and remove what an interrupted call left of them.

    Args:
        existing: what may lie there already; by default nothing, or a forecast that is replaced.

    Raises:
        OutputError: a place inside the run's folder, or what farcast did not write stands there.
    """
    existing = existing or existing_check(run, overwrite=request.overwrite, is_file=is_file)
    for path in paths:
        check_place(
            path, run=run, existing=existing, has_sidecar_beside=is_file, clears=not request.dry_run and request.team.leads
        )
        if request.evaluator:
            check_outside(logs_of(path), run)
        _check_logs(request.logs, (path, sidecar_of(path, is_file=is_file)))


def _check_logs(logs: Sequence[Path], outputs: Sequence[Path]) -> None:
    for log in logs:
        for output in outputs:
            if log.resolve().is_relative_to(output.resolve()):
                raise OutputError(f"--log-to {log}: lies in the output {output}", hint="choose a place outside with --log-to")


def existing_check(run: Path, *, overwrite: bool, is_file: bool) -> Check:
    """What may lie where a forecast of a run goes: nothing, or a forecast of this run that is replaced."""
    return partial(check_ours, is_file=is_file, run=run) if overwrite else refuse_existing


def check_ledger_of(request: Request, run: Path) -> None:
    """See that leaps can be recorded, where they will be."""
    if request.ledgers is not None and request.purpose == "resume" and not request.dry_run:
        check_outside(request.ledgers.file, run, option="--ledger")
        check_ledger(request.ledgers.file, run)
