"""From a request to a published checkpoint: open, check, tune, judge, write, read back. Nothing is printed here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from farcast_cli.choices import DEFAULT_WEIGHT, ActivationName, SolverName
from farcast_cli.errors import DataError, OutputError, SnapshotError, UsageError
from farcast_cli.files.place import check_place
from farcast_cli.files.reading import mark_of
from farcast_cli.files.staged import staged
from farcast_cli.run.trajectory import open_snapshot, run_of
from farcast_cli.sidecar import files_of, write_sidecar
from farcast_cli.trainers.base import unchanged
from farcast_cli.tune.adapter import check_adaptable, write_adapter
from farcast_cli.tune.data import Draw, Fit, check_enough, folds_of, read_anchors, read_data
from farcast_cli.tune.delta import read_deltas, write_deltas
from farcast_cli.tune.description import check_description, constant_loss
from farcast_cli.tune.gate import judge
from farcast_cli.tune.metric import Metric, read_covariance, write_covariance
from farcast_cli.tune.objective import Objective
from farcast_cli.tune.record import Place, asked_to_apply, asked_to_tune, judged, repeated
from farcast_cli.tune.request import TuneOutcome
from farcast_cli.tune.solve import Model, Solved, solve
from farcast_cli.tune.weight import find_matrix, find_vector, find_weight
from farcast_cli.tune.write import Writing, check_kept, check_moved, check_place_of, write_tuned

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.files.reading import Mark
    from farcast_cli.progress import Progress
    from farcast_cli.records import TuneSidecar
    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.data import Data
    from farcast_cli.tune.delta import Delta, Rounded
    from farcast_cli.tune.gate import GateResult
    from farcast_cli.tune.request import TuneRequest
    from farcast_cli.tune.weight import Weight


MAX_HEAD_BYTES = 128 << 20
"""Of a head in float64, which every iteration uses whole."""


def tune_checkpoint(request: TuneRequest, progress: Progress) -> TuneOutcome:
    """Tune layers of a checkpoint on labelled rows; write it where rows that were not seen are the better for it.

    Reads each layer once to tune it (several layers: twice an iteration), once to write, once to check.

    Raises:
        UsageError, SnapshotError, FileFormatError, OutputError: nothing was published.
    """
    started = time.monotonic()
    _check_options(request)
    snapshot = open_snapshot(request.checkpoint)
    place = _place_of(request, snapshot)
    check_place_of(place, snapshot)
    if place.is_taken and not place.overwrite:
        return repeated(place, asked_to_tune(request, snapshot, place.path), snapshot)
    files = _marks_of(request)
    model = _model_of(request, snapshot)
    work = _Work(request, snapshot, model, *_data_of(request, model))
    with unchanged([snapshot], copied=snapshot):
        told = progress("tune", 0)
        work.tune()
        told(0)
        outcome = work.outcome()
        if work.verdict.is_accepted:
            about = judged(asked_to_tune(request, snapshot, place.path), outcome, work.verdict)
            _check_kept_files(files)
            outcome = _publish(work, replace(outcome, path=place.path), place, about, progress)
    return replace(outcome, bytes_read=_bytes_read(model) + outcome.bytes_read, seconds=time.monotonic() - started)


def apply_deltas(
    checkpoint: Path, file: Path, output: Path, rounded: Rounded, *, overwrite: bool, num_threads: int, progress: Progress
) -> TuneOutcome:
    """Add the deltas of a file to the checkpoint that they were made for.

    Raises:
        SnapshotError: the weights are not those that the deltas were made for.
    """
    started = time.monotonic()
    snapshot = open_snapshot(checkpoint)
    place = Place(output, "-o", is_file=snapshot.path.is_file(), overwrite=overwrite)
    check_place_of(place, snapshot)
    deltas = read_deltas(file)
    layers = tuple(delta.layer for delta in deltas)
    asked = asked_to_apply(file, snapshot, output, layers=layers, rounded=rounded)
    if place.is_taken and not place.overwrite:
        return repeated(place, asked, snapshot)
    weights = [find_weight(snapshot, delta.layer, delta.bias, is_transposed=delta.is_transposed) for delta in deltas]
    with unchanged([snapshot], copied=snapshot):
        bases = [_base_of(weight, delta, file) for weight, delta in zip(weights, deltas, strict=True)]

        def check(written: Sequence[Weight]) -> None:
            for again, base, delta in zip(written, bases, deltas, strict=True):
                expected = delta.applied(base, delta.directions @ delta.directions.T)
                check_moved(base, expected, again.forward(delta.directions), delta.layer)

        outcome = TuneOutcome(layers, "apply", path=output, notes=tuple(_left_alone(snapshot)))
        about = asked.model_copy(update={"notes": outcome.notes})
        changes = list(zip(weights, deltas, strict=True))
        num_read, num_written = write_tuned(snapshot, changes, Writing(place, rounded, about, check, num_threads), progress)
    num_read += sum(weight.bytes_read for weight in weights)
    return replace(outcome, bytes_read=num_read, bytes_written=num_written, seconds=time.monotonic() - started)


def covariance_of(
    checkpoint: Path, layers: Sequence[str], data: Path, place: Path, *, is_transposed: bool, overwrite: bool
) -> TuneOutcome:
    """Write the covariance of a layer's inputs; nothing is tuned, and of the layer only its shape is looked at.

    Raises:
        UsageError, SnapshotError, FileFormatError, OutputError: nothing was published.
    """
    started = time.monotonic()
    if place.suffix != ".safetensors":
        raise UsageError(f"--covariance-out {place}: expected a name that ends in .safetensors")
    if len(layers) > 1:
        raise UsageError(f"--covariance-out: expected one --layer, found {len(layers)}", hint="give each layer its own file")
    snapshot = open_snapshot(checkpoint)
    check_place(place, run=run_of(snapshot), existing=lambda _: None, option="--covariance-out")
    marks = {data: mark_of(data)} if data.is_file() else {}
    weight = find_weight(snapshot, layers[0], is_transposed=is_transposed)
    num_bytes = write_covariance(place, data, weight, overwrite=overwrite)
    _check_kept_files(marks)
    return TuneOutcome(tuple(layers), "covariance", path=place, bytes_written=num_bytes, seconds=time.monotonic() - started)


def _base_of(weight: Weight, delta: Delta, file: Path) -> Any:
    """D W_0^T, from weights that are seen to be those of the delta."""
    width = weight.num_inputs + bool(weight.bias)
    if delta.directions.shape[1] != width or delta.factors.shape[1] != weight.num_outputs:
        raise SnapshotError(
            f"{file}: {delta.layer}: expected a delta for {weight.num_outputs} x {width},"
            f" found one for {delta.factors.shape[1]} x {delta.directions.shape[1]}",
            hint="apply it to the checkpoint that it was made for",
        )
    base = weight.forward(delta.directions)
    if weight.checksum != delta.checksum:
        raise SnapshotError(
            f"{weight.path}: {delta.layer} is not the layer that {file} was made for: its bytes differ",
            hint="apply it to the checkpoint that it was made for, or tune this one",
        )
    return base


# --- checks ----------------------------------------------------------------------------------------------------------


def check_given(unwanted: Mapping[str, object], wanted: Mapping[str, object], *, of: str) -> None:
    """See that some options are given and others are not."""
    for name, value in unwanted.items():
        if value:
            raise UsageError(f"{of} takes no {name}", hint="farcast tune --help")
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise UsageError(f"{of}: expected {', '.join(wanted)}, found no {missing[0]}", hint="farcast tune --help")


def method_named(name: str | None) -> SolverName:
    """A method by its name; Gauss-Newton by default."""
    if name is None:
        return "gauss-newton"
    if name.startswith("adam"):
        raise UsageError(
            f"--method {name}: divides every element of the gradient by its own number, so the change has no low rank:"
            " every iteration would need the whole layer",
            hint="--method gauss-newton uses the curvature and needs no rate",
        )
    found = next((method for method in get_args(SolverName) if method == name), None)
    if found is None:
        raise UsageError(f"--method {name}: expected one of {', '.join(get_args(SolverName))}")
    chosen: SolverName = found
    return chosen


def _check_options(request: TuneRequest) -> None:
    _check_layers(request)
    _check_numbers(request)
    settings, several = request.settings, len(request.layers) > 1
    if sum(place is not None for place in (request.output, request.delta_out, request.lora_out)) != 1:
        raise UsageError(
            "expected one of -o OUT, --delta-out FILE and --lora-out DIR", hint="-o OUT writes the tuned checkpoint"
        )
    for option, file in {"--anchor": request.anchor, "--covariance": request.covariance}.items():
        if file and settings.weight_decay:
            raise UsageError(
                f"--weight-decay changes the rows that {option} keeps", hint="--ridge pulls towards the checkpoint instead"
            )
        if file and several:
            raise UsageError(f"{option} works with one layer, found several", hint="tune one layer, or leave it out")
    if request.anchor_weight is not None and not (request.anchor or request.covariance):
        raise UsageError("--anchor-weight needs --anchor or --covariance", hint="--anchor FILE names rows x to keep")
    if request.lora_out:
        check_adaptable(request.layers, weight_decay=settings.weight_decay)


def _check_layers(request: TuneRequest) -> None:
    several = len(request.layers) > 1
    if len(set(request.layers)) != len(request.layers):
        raise UsageError(f"--layer {request.layers[0]}: given twice")
    if request.biases and len(request.biases) != len(request.layers):
        raise UsageError(f"expected one --bias for each --layer, found {len(request.biases)} for {len(request.layers)}")
    if (request.head or several) and not request.activations:
        raise UsageError(
            f"expected --activation {'for several layers' if several else 'with --head'}: what follows the layer, or none",
            hint=f"--activation {'|'.join(get_args(ActivationName))}",
        )
    if len(request.activations) not in {0, 1, len(request.layers)}:
        raise UsageError(
            f"expected one --activation, or one for each --layer, found {len(request.activations)} for {len(request.layers)}"
        )
    if request.head_bias and not request.head:
        raise UsageError("--head-bias without --head", hint="--head KEY")


def _check_numbers(request: TuneRequest) -> None:
    """See that every number is one that makes sense, and that the method reads it."""
    own = request.settings
    decays = {"--rate": own.rate, "--momentum": own.momentum, "--weight-decay": own.weight_decay}
    for option, value in {
        **decays,
        "--ridge": own.ridge,
        "--gate": request.gate,
        "--anchor-weight": request.anchor_weight,
    }.items():
        if value is not None and not (isfinite(value) and value >= 0 and (option != "--rate" or value > 0)):
            above = "above 0" if option == "--rate" else "of 0 or more"
            raise UsageError(f"{option} {value:g}: expected a finite number {above}")
    if own.momentum is not None and own.momentum >= 1:
        raise UsageError(f"--momentum {own.momentum:g}: expected a number below 1", hint="--momentum 0.9")
    if own.method == "gauss-newton":
        for option, value in decays.items():
            if value is not None:
                hint = "--ridge pulls towards the checkpoint instead" if option == "--weight-decay" else "leave it out"
                raise UsageError(f"{option} needs --method gradient-descent", hint=hint)
        if own.iterations is not None and _has_closed_form(request):
            raise UsageError("--iterations: a last layer with --loss mse has a closed form", hint="leave it out")


def _has_closed_form(request: TuneRequest) -> bool:
    return request.loss == "mse" and not request.head and request.activations in {(), ("none",)} and len(request.layers) == 1


def _place_of(request: TuneRequest, snapshot: Snapshot) -> Place:
    if request.output is not None:
        return Place(request.output, "-o", is_file=snapshot.path.is_file(), overwrite=request.overwrite)
    if request.lora_out is not None:
        return Place(request.lora_out, "--lora-out", is_file=False, overwrite=request.overwrite)
    assert request.delta_out is not None  # noqa: S101 - _check_options has seen to it
    return Place(request.delta_out, "--delta-out", is_file=True, overwrite=request.overwrite)


def _marks_of(request: TuneRequest) -> dict[Path, Mark]:
    """The files of rows, as they are before they are read, which says what is missing."""
    files = (request.data, request.val, request.anchor, request.covariance)
    return {path: mark_of(path) for path in files if path is not None and path.is_file()}


def _check_kept_files(marks: Mapping[Path, Mark]) -> None:
    """See that the record tells of the rows that were read."""
    for path, mark in marks.items():
        if mark_of(path) != mark:
            raise DataError(f"{path}: changed during the tuning", hint="run the command again when the file is complete")


def _model_of(request: TuneRequest, snapshot: Snapshot) -> Model:
    biases = request.biases or (None,) * len(request.layers)
    weights = tuple(
        find_weight(snapshot, layer, bias, is_transposed=request.is_transposed)
        for layer, bias in zip(request.layers, biases, strict=True)
    )
    for before, after in pairwise(weights):
        if before.num_outputs != after.num_inputs:
            raise UsageError(
                f"--layer {after.name}: expected {before.num_outputs} inputs, the outputs of {before.name},"
                f" found {after.num_inputs}",
                hint="name the layers in forward order"
                + (f"; or {before.turn_hint}" if before.num_inputs == after.num_outputs else ""),
            )
    activations = request.activations or ("none",)
    activations *= len(weights) if len(activations) == 1 else 1
    head, bias = _head_of(request, snapshot, weights[-1])
    return Model(weights, activations[:-1], Objective(request.loss, activations[-1], head, bias))


def _head_of(request: TuneRequest, snapshot: Snapshot, last: Weight) -> tuple[Any, Any]:
    if request.head is None:
        return None, None
    find_matrix(snapshot, "--head", request.head)  # which says what is wrong with it
    matrix = find_weight(snapshot, request.head)
    turned = request.is_transposed and last.num_outputs == matrix.num_outputs
    rows, width = (matrix.num_inputs, matrix.num_outputs) if turned else (matrix.num_outputs, matrix.num_inputs)
    if width != last.num_outputs:
        raise UsageError(
            f"{snapshot.path}: --head {request.head}: expected {last.num_outputs} inputs, the outputs of {last.name}, found {width}",
            hint=last.turn_hint
            if last.num_inputs in {matrix.num_inputs, matrix.num_outputs}
            else "the head must directly follow the (last) layer and its activation",
        )
    if 8 * rows * width > MAX_HEAD_BYTES:
        raise UsageError(
            f"{snapshot.path}: --head {request.head} is {rows} x {width}: too large for tune's memory",
            hint="leave the head out and give targets of the layer itself as y, with --loss mse",
        )
    head = np.concatenate([block.copy() for _, block in matrix.blocks()])
    bias = None if request.head_bias is None else find_vector(snapshot, "--head-bias", request.head_bias, rows)
    return np.ascontiguousarray(head.T) if turned else head, bias


def _data_of(request: TuneRequest, model: Model) -> tuple[Data, Data | None, Metric | None]:
    """The rows, those of --val, and what a change costs."""
    fit = Fit(model.weights, model.num_outputs)
    draw = Draw(request.subsample, request.rounded.seed) if request.subsample is not None else None
    data = read_data(request.data, request.loss, fit=fit, draw=draw)
    val = read_data(request.val, request.loss, fit=fit) if request.val else None
    check_enough(data if val is None else val, what="the gate would use")
    if data.is_constant and data.targets.ndim == 1 and not (request.anchor or request.covariance):
        raise DataError(
            f"{data.path}: y: all rows are of one class, {data.targets[0]}: there is nothing to learn, but to give it to every row",
            hint="give rows of other classes, too; for an edit, --anchor FILE or --covariance FILE names what must stay;"
            " for numbers to foretell, --loss mse",
        )
    return data, val, _metric_of(request, model.weights[0])


def _metric_of(request: TuneRequest, layer: Weight) -> Metric | None:
    """Anchors are hard, unless a weight is given for them; a covariance is soft, and takes the weight if there is one."""
    if request.anchor is None and request.covariance is None:
        return None
    metric = Metric.none(layer.num_inputs + bool(layer.bias))
    weight = DEFAULT_WEIGHT if request.anchor_weight is None else request.anchor_weight
    if request.anchor is not None:
        anchors = layer.extended(read_anchors(request.anchor, layer))
        is_soft = request.anchor_weight is not None and request.covariance is None
        metric = metric.with_rows(anchors, weight) if is_soft else Metric.hard(anchors)
    return metric if request.covariance is None else metric.with_moment(read_covariance(request.covariance, layer), weight)


# --- what came of it -------------------------------------------------------------------------------------------------


def _left_alone(snapshot: Snapshot) -> Iterator[str]:
    """Other weights beside those that are tuned, such as their average, which may be the ones that are loaded."""
    if snapshot.beside:
        yield f"copied without tuning: {', '.join(name for name, _ in snapshot.beside)}"


def _bytes_read(model: Model) -> int:
    return sum(weight.bytes_read for weight in model.weights)


@dataclass(slots=True)
class _Work:
    """A tuning: what it is asked for, what it comes from, and what came of it."""

    request: TuneRequest
    snapshot: Snapshot
    model: Model
    data: Data
    val: Data | None
    metric: Metric | None
    solved: Solved = field(init=False)
    verdict: GateResult = field(init=False)
    judging: dict[str, tuple[Data, Any, Any]] = field(default_factory=dict)
    """Rows with their losses before and after, which the written file must keep."""

    def tune(self) -> None:
        """Tune, and judge."""
        request, data, val = self.request, self.data, self.val
        folds = folds_of(data, seed=request.rounded.seed, one_by_one=self.model.has_closed_form(request.settings))
        check_description(self.model, data, self.snapshot)
        self.solved = solved = solve(self.model, data, folds, request.settings, metric=self.metric)
        self.judging["tuned"] = (data, solved.before, solved.after)
        how = "leave-one-out" if folds.max() + 1 == data.num_rows else f"{folds.max() + 1} folds"
        before, after, groups, shares = solved.before, solved.left_out, data.groups, data.shares
        if val is not None:
            before = self.model.row_losses(val.inputs, val.targets)
            after = self.model.row_losses(val.inputs, val.targets, solved.deltas)
            groups, shares, how = val.groups, val.shares, "--val"
            self.judging["--val"] = (val, before, after)
        self.verdict = judge(before, after, groups, shares=shares, threshold=request.gate, judged_by=how)
        if not solved.place:  # what rows left out chose is the start
            self.verdict = replace(self.verdict, after=self.verdict.before, z=0.0)

    def outcome(self) -> TuneOutcome:
        """What is told of it."""
        data, solved = self.data, self.solved
        return TuneOutcome(
            self.request.layers,
            self.request.settings.method,
            self.verdict,
            num_rows=data.num_rows,
            iterations=solved.place,
            tuned_loss=(float(solved.before @ data.shares), float(solved.after @ data.shares)),
            sizes=solved.sizes,
            num_passes=solved.num_passes,
            has_closed_form=self.model.has_closed_form(self.request.settings),
            notes=(*self._notes(), *_left_alone(self.snapshot), *solved.notes),
        )

    def _notes(self) -> Iterator[str]:
        data, (first, *_) = self.data, self.model.weights
        least, what = constant_loss(self.model, data)
        head, is_zero = self.model.objective.head, any(not weight.square for weight in self.model.weights)
        better = "" if is_zero else "; a new layer is better started at zero"
        if head is not None:
            better = "; a new head is better tuned first, from zero"
        if head is not None and not head.any():
            better, is_zero = "", True
            yield "the head is zero, so the layer does not move the outputs: tune the head first"
        if self.verdict.after >= least:
            yield (
                f"after tuning, the loss of rows not seen, {self.verdict.after:.4g}, is no better than that of {what}, {least:.4g}:"
                f" the tuned layer has learnt nothing of use yet{better}"
            )
        if data.num_copies:
            yield (
                f"{data.num_copies} of {data.num_rows} rows have the x of another row: such rows stay together, and the gate counts"
                " them once"
            )
        if data.num_rows > 2 * first.num_inputs and self.request.settings.method == "gradient-descent":
            yield (
                f"{data.num_rows} rows, more than twice the {first.num_inputs} inputs of {first.name}: an iteration costs as much"
                " as one of ordinary training"
            )
        if self.request.head and self.val is None:
            yield (
                "rows that the head or the layer was trained on cannot judge: their losses are too small before and after;"
                " --val FILE judges by other rows"
            )
        loss = float(self.solved.before @ data.shares)
        if data.out is None and loss >= least and not is_zero:
            yield (
                f"before tuning, the loss {loss:.4g} is no better than that of {what}, {least:.4g}: unless the layer is new, see"
                " that --activation, --bias and --head are right; out, the model's outputs for these rows, lets farcast check them"
            )

    def check(self, written: Sequence[Weight]) -> None:
        """See that the losses are still what they were."""
        again = replace(self.model, weights=tuple(written))
        for what, (data, before, after) in self.judging.items():
            check_kept((before, after, again.row_losses(data.inputs, data.targets)), data.shares, what)


def _publish(work: _Work, outcome: TuneOutcome, place: Place, about: TuneSidecar, progress: Progress) -> TuneOutcome:
    """Write the checkpoint, or the change alone, with its record."""
    request, snapshot, deltas = work.request, work.snapshot, work.solved.deltas
    if place.option == "--delta-out":
        return replace(outcome, bytes_written=_publish_deltas(deltas, place, about, like=snapshot.path))
    if place.option == "--lora-out":
        with staged(place.path, check=place.check, option=place.option) as hidden:
            write_adapter(hidden, deltas, snapshot.path.resolve())
            files = files_of(hidden)
            write_sidecar(hidden, None, about.model_copy(update={"files": files}))
        return replace(outcome, bytes_written=sum(file.bytes for file in files))
    changes = list(zip(work.model.weights, deltas, strict=True))
    writing = Writing(place, request.rounded, about, work.check, request.num_threads)
    num_read, num_written = write_tuned(snapshot, changes, writing, progress)
    return replace(outcome, bytes_read=num_read, bytes_written=num_written)


def _publish_deltas(deltas: Sequence[Delta], place: Place, about: TuneSidecar, *, like: Path) -> int:
    """The size of the file; its permissions are those of the checkpoint."""
    with staged(place.path, check=place.check) as hidden:
        write_deltas(hidden, deltas, about.as_json(), like=like)
        for delta, again in zip(deltas, read_deltas(hidden), strict=True):
            if not np.array_equal(delta.factors, again.factors) or not np.array_equal(delta.directions, again.directions):
                raise OutputError(f"{place.path}: its content differs from what was written", hint="check the disk")
        return hidden.stat().st_size
