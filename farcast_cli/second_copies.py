"""The trainer's own second copies of the weights: where they lie in its optimizer's state, and how they are forecast.

A loop in bfloat16 keeps the weights again in float32 (master weights), and its optimizer overwrites the model with them at each
step. Lookahead keeps slow weights, and Schedule-free the point z: both pull the model towards them. Left at the origin, they
undo a forecast. A copy is found by its values, a few KiB of each tensor; names alone decide nothing but a caution.

Averages of the weights (EMA) lie beside the optimizer, or in a file of their own. They are found by their names, and move with
the weights.

Shapes: N values of a sample, C copies.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.engine.casts import narrow, widen, work_type
from farcast_cli.errors import listed
from farcast_cli.files.reading import read_bytes
from farcast_cli.formats.safetensors_file import SafetensorsFile
from farcast_cli.formats.torch_pickle import in_collection, is_streamable, iter_tensors
from farcast_cli.formats.tree import dotted, is_below, walk
from farcast_cli.run.alignment import AlignedTensor
from farcast_cli.state.advance import StorageSpan, place_of
from farcast_cli.state.files import STATE_ROLES, load_histories, param_groups
from farcast_cli.tensors import FLOATING, TensorEntry, sample_stretches
from farcast_cli.trainers.base import Average

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from farcast_cli.engine.batch import Inputs
    from farcast_cli.formats.torch_file import TorchFile
    from farcast_cli.formats.tree import TreePath
    from farcast_cli.tensors import DType
    from farcast_cli.trainers.base import Part, Snapshot

    Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides

NUM_SAMPLES = 2048  # values of a tensor that are compared, in blocks spread over it
MAX_ALIKE = 512  # weights of one shape among which the nearest is looked for
NEAR = 0.5  # of the weight's own way since the first snapshot that is read: a copy is nearer than that to its weight
_OPTIMIZER = re.compile(r"optim|lookahead|master|fp32|slow", re.IGNORECASE)
"""Keys of the trees in which an optimizer keeps its state."""
_COPY = re.compile(r"master|fp32|slow|lookahead|cached_params", re.IGNORECASE)
"""Keys that say of a tensor that it is a copy."""
_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
        *("sum", "exp_avg_diff", "neg_pre_grad", "exp_avg_sq_row", "exp_avg_sq_col", "exp_grad_norm", "slow_momentum"),
    }
)
"""What optimizers say of gradients: never a copy, and not read at all."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor of an optimizer at a snapshot: its file's part, and its path in that part's tree."""

    part: str
    path: TreePath
    place: StorageSpan
    entry: TensorEntry
    is_ahead: bool = False
    """Whether it is Schedule-free's point z, which may be far ahead of the weights: their mean."""

    @property
    def layout(self) -> Layout:
        return self.entry.shape, self.entry.strides


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy of weight number `of`; one that `trails` is not equal to it, and moves as it does."""

    held: _Held
    of: int
    trails: bool
    tensor: AlignedTensor
    is_average: bool = False


@dataclass(frozen=True)
class SecondCopies:
    """The copies that were found, numbered in the engine's inputs from `first` on, and what to tell of them."""

    first: int
    copies: tuple[_Copy, ...] = ()
    notes: tuple[str, ...] = ()
    weights: tuple[AlignedTensor, ...] = ()

    def added_to(self, inputs: Inputs) -> Inputs:
        """Inputs from which the copies can be forecast too."""
        if not self.copies:
            return inputs
        linear = inputs.linear.with_copies([copy.of for copy in self.copies], [copy.trails for copy in self.copies])
        return replace(inputs, linear=linear, copies=tuple(copy.tensor for copy in self.copies))

    @cached_property
    def by_part(self) -> Mapping[str, Mapping[StorageSpan, tuple[TensorEntry, int]]]:
        """The copies of each part: their entry at the origin and their number, by place."""
        found: dict[str, dict[StorageSpan, tuple[TensorEntry, int]]] = {}
        for number, copy in enumerate(self.copies, self.first):
            found.setdefault(copy.held.part, {})[copy.held.place] = copy.held.entry, number
        return found

    @cached_property
    def averages(self) -> Mapping[str, Mapping[str, tuple[TensorEntry, int]]]:
        """The averages of each part by their names in it: their entry at the origin and their number."""
        found: dict[str, dict[str, tuple[TensorEntry, int]]] = {}
        for number, copy in enumerate(self.copies, self.first):
            if copy.is_average:
                found.setdefault(copy.held.part, {})[dotted(copy.held.path)] = copy.held.entry, number
        return found

    @cached_property
    def masters(self) -> Mapping[str, tuple[TensorEntry, int]]:
        """The copies that are more precise than the weights of these names, and equal to them up to rounding."""
        return {
            self.weights[copy.of].name: (copy.held.entry, number)
            for number, copy in enumerate(self.copies, self.first)
            if not (copy.trails or copy.is_average)
            and copy.held.entry.dtype.itemsize > self.weights[copy.of].entries[-1].dtype.itemsize
        }


def find_copies(
    inputs: Inputs,
    snapshots: Sequence[Snapshot],
    origin: Snapshot,
    *,
    with_averages: bool = False,
    earlier: Mapping[str, str] | None = None,
) -> SecondCopies:
    """The second copies of the weights in the origin's optimizer, and the averages of the weights beside them.

    Reads the optimizer's files of all snapshots where there is a copy, and a sample of each tensor that may be one.

    Args:
        snapshots: those that the forecast reads, in any order.
        with_averages: whether the averages are asked for.
        earlier: marks of the averages at an earlier snapshot of the run, as `marks_of_averages` gives them; by default of the
            first that is read and has some. One that has not changed since then is no average of weights that move, such as a
            teacher that is not trained: it stays.
    """
    tensors = inputs.alignment.tensors
    first = len(tensors)
    weights = _Weights(tensors, inputs)
    own = {(entry.path, entry.offset) for entry in origin.tensors.values()}
    pairs, lost = [], []
    for held in _optimizer_tensors(origin):
        if held.layout not in weights.by_layout or (held.entry.path, held.entry.offset) in own:
            continue
        found = weights.match(held)
        if found is not None:
            pairs.append((held, *found))
        elif held.is_ahead or _COPY.search(dotted(held.path)):
            lost.append(held)
    averages = list(_averages(origin)) if with_averages else []
    if averages and not earlier:
        earlier = next(filter(None, (marks_of_averages(one) for one in snapshots if one.step < origin.step)), {})
    still = {key for key, mark in _marks(averages).items() if earlier and earlier.get(key) == mark}
    averages = [(name, held) for name, held in averages if _key_of(held) not in still]
    if not pairs and not lost and not averages and not still:
        return SecondCopies(first)
    history = _History(snapshots)
    copies = (
        *(
            _Copy(held, of, trails, _trailing(held, tensors[of], inputs) if trails else history.aligned(held, tensors[of]))
            for held, of, trails in pairs
        ),
        *_average_copies(averages, inputs, history),
    )
    return SecondCopies(first, copies, tuple(_notes(copies, lost, still)), tensors)


def marks_of_averages(snapshot: Snapshot) -> Mapping[str, str]:
    """A mark of each of a snapshot's averages, by its key: equal where a sample of all its tensors has the same bytes."""
    return snapshot.source.averages if snapshot.source else _marks(list(_averages(snapshot)))


def _marks(averages: Sequence[tuple[str, _Held]]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for _, held in averages:
        found.setdefault(_key_of(held), hashlib.sha256()).update(_raw(held.entry))
    return {key: whole.hexdigest() for key, whole in found.items()}


def _key_of(held: _Held) -> str:
    """The average that a tensor belongs to."""
    return ": ".join(filter(None, (held.part, dotted(held.path[:-1]))))


def replaced_averages(
    origin: Snapshot, index_of: Mapping[str, int], masters: Mapping[str, tuple[TensorEntry, int]]
) -> Mapping[str, Mapping[str, tuple[TensorEntry, int]]]:
    """The weights whose forecast takes the place of averages, by the averages' parts and names, as `SecondCopies.averages`."""
    found: dict[str, dict[str, tuple[TensorEntry, int]]] = {}
    for name, held in _averages(origin):
        if name in index_of:
            found.setdefault(held.part, {})[dotted(held.path)] = masters.get(name, (origin.tensors[name], index_of[name]))
    return found


def _average_copies(averages: Sequence[tuple[str, _Held]], inputs: Inputs, history: _History) -> Iterator[_Copy]:
    """The averages of tensors that are forecast, each forecast by the coefficients of its weight from its own history.

    Where a snapshot lacks it, as a kept one does, it moves by the same step as its weight.
    """
    numbers = {tensor.name: number for number, tensor in enumerate(inputs.alignment.tensors)}
    for name, held in averages:
        if name not in numbers:
            continue
        weight = inputs.alignment.tensors[numbers[name]]
        own = None if inputs.linear.moves else history.averaged(name, held, weight)
        tensor = own or _trailing(held, weight, inputs)
        yield _Copy(held, numbers[name], own is None, tensor, is_average=True)


def _notes(copies: Sequence[_Copy], lost: Sequence[_Held], still: Collection[str]) -> Iterator[str]:
    if still:
        yield f"unchanged since an earlier snapshot, and so no averages of weights that move; they stay as they are: {listed(sorted(still))}"
    averages = Counter(dotted(copy.held.path[:-1]) or copy.held.part for copy in copies if copy.is_average)
    if averages:
        told = (f"{name} ({count} tensors)" for name, count in averages.items())
        yield f"averages of the weights, moved with them: {listed(told)}"
    for trails, what in ((False, "forecast with them"), (True, "near them, moved by the same step")):
        names = [_named(copy.held) for copy in copies if copy.trails == trails and not copy.is_average]
        if names:
            yield f"second copies of the weights, {what}: {listed(names, most=1)}"
    if lost:
        yield (
            f"caution: {listed(map(_named, lost), most=1)}: second copies of the weights by their names, and unlike them by their"
            " values: they stay at the origin, and the optimizer may undo the forecast"
        )


def _named(held: _Held) -> str:
    """Where it lies, in words; a key that is a tensor, as where a parameter is its own key, is told as `...`."""
    keys = tuple(key if isinstance(key, (str, int)) else "..." for key in held.path)
    return ": ".join(filter(None, (held.part, dotted(keys))))


# --- the optimizer's tensors -----------------------------------------------------------------------------------------


def _optimizer_tensors(snapshot: Snapshot) -> Iterator[_Held]:
    """The tensors of a snapshot's optimizers that may be copies: of a floating type, in one stretch."""
    parts = {part.name: part for part in snapshot.parts if part.role in STATE_ROLES}
    for name, history in load_histories([snapshot]).items():
        ((_, tree, file),) = history.states
        part = parts.get(name)
        if file is None or part is None or (part.role == "state" and part.is_bare):
            continue
        averages = any("weight_sum" in group for groups in param_groups(tree) for group in groups)
        for path, ref in _tensors_in_optimizers(tree, part):
            if ref.dtype.name in FLOATING and ref.shape and is_streamable(ref):
                yield _Held(name, path, place_of(ref), file.entry(dotted(path), ref), averages and path[-1] == "z")


def _averages(snapshot: Snapshot) -> Iterator[tuple[str, _Held]]:
    """The tensors of a snapshot's averages, each with the name of its weight."""
    for part in snapshot.parts:
        file = part.torch_file
        found: Iterator[tuple[str, _Held]] = iter(())
        if file is not None:
            found = _in_torch(part, file, [_all_of(file)] if part.role == "average" else part.averages)
        elif isinstance(part.content, SafetensorsFile) and part.role == "average":
            entries = part.content.entries
            found = ((one.name, _Held(part.name, (one.name,), (one.name, 0, one.num_elements), one)) for one in entries)
        yield from (
            (part.prefix + name, held) for name, held in found if held.entry.dtype.name in FLOATING and held.entry.shape
        )


def _all_of(file: TorchFile) -> Average:
    return Average((), tuple((ref, dotted(keys)) for keys, ref in iter_tensors(file.tree)))


def _in_torch(part: Part, file: TorchFile, averages: Iterable[Average]) -> Iterator[tuple[str, _Held]]:
    for average in averages:
        for ref, name in average.pairs:
            if is_streamable(ref):
                path = (*average.path, name)
                yield name, _Held(part.name, path, place_of(ref), file.entry(dotted(path), ref))


def _tensors_in_optimizers(tree: Any, part: Part) -> Iterator[tuple[TreePath, Any]]:
    optimizers = [path for path, node in walk(tree, below=in_collection) if isinstance(node, dict) and "param_groups" in node]
    weights = part.weights_paths
    for path, ref in iter_tensors(tree):
        is_inside = part.role == "optimizer" or is_below(path, optimizers)
        if (
            (is_inside or _OPTIMIZER.search(dotted(path)))
            and not is_below(path, weights)
            and not _MOMENTS.intersection(path[-2:])
        ):
            yield path, ref


class _History:
    """The optimizers' tensors of all snapshots, read where a copy asks for them."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._of = {part.path: number for number, snapshot in enumerate(snapshots) for part in snapshot.parts}
        self._snapshots = snapshots
        self._read: dict[int, dict[tuple[str, TreePath], _Held]] = {}
        self._averages: dict[int, dict[tuple[str, str], _Held]] = {}

    def aligned(self, held: _Held, weight: AlignedTensor) -> AlignedTensor:
        """A copy through the history; the weight itself where a snapshot lacks the copy, or has another value in it."""
        entries = [self._same(held, entry) or entry for entry in weight.entries[:-1]]
        return AlignedTensor(_named(held), (*entries, held.entry))

    def averaged(self, name: str, held: _Held, weight: AlignedTensor) -> AlignedTensor | None:
        """The average of a weight through the history; None where a snapshot lacks it."""
        entries = []
        for entry in weight.entries[:-1]:
            number = self._of.get(entry.path)
            if number is None:
                return None
            if number not in self._averages:
                self._averages[number] = {(one.part, of): one for of, one in _averages(self._snapshots[number])}
            then = self._averages[number].get((held.part, name))
            if then is None or then.layout != held.layout:
                return None
            entries.append(then.entry)
        return AlignedTensor(_named(held), (*entries, held.entry))

    def _same(self, held: _Held, weight: TensorEntry) -> TensorEntry | None:
        number = self._of.get(weight.path)
        if number is None:
            return None
        if number not in self._read:
            self._read[number] = {(one.part, one.path): one for one in _optimizer_tensors(self._snapshots[number])}
        then = self._read[number].get((held.part, held.path))
        if then is None or then.layout != held.layout:
            return None
        return then.entry if _rounded(_values(then.entry), weight.dtype) == _raw(weight) else None


def _trailing(held: _Held, weight: AlignedTensor, inputs: Inputs) -> AlignedTensor:
    """The weight through the history, and last the origin's once more: `LinearMap.with_copies` says why."""
    return AlignedTensor(_named(held), (*weight.entries, weight.entries[inputs.linear.origin]))


# --- values ----------------------------------------------------------------------------------------------------------


class _Weights:
    """The forecast tensors by shape and order of elements, and their samples at the origin and at the first snapshot."""

    def __init__(self, tensors: Sequence[AlignedTensor], inputs: Inputs) -> None:
        self._tensors = tensors
        self._origin = inputs.linear.origin
        self._first = next((t for t in inputs.linear.used if t != self._origin and t not in inputs.linear.moves), None)
        self.by_layout: dict[Layout, list[int]] = {}
        for index, tensor in enumerate(tensors):
            entry = tensor.entries[self._origin]
            if entry.dtype.name in FLOATING:
                self.by_layout.setdefault((entry.shape, entry.strides), []).append(index)
        self._bits: dict[Layout, dict[tuple[str, bytes], int]] = {}

    def match(self, held: _Held) -> tuple[int, bool] | None:
        """The weight that a tensor is a copy of, and whether it trails."""
        values = _values(held.entry)
        if not values.any():  # as a moment that never moved
            return None
        known = self._bits_of(held.layout)
        for dtype in {self._entry(index).dtype for index in self.by_layout[held.layout]}:
            equal = known.get((dtype.name, _rounded(values, dtype)))
            if equal is not None:
                return equal, False
        near = self._near(values, self.by_layout[held.layout], is_ahead=held.is_ahead)
        return None if near is None else (near, True)

    def _entry(self, index: int) -> TensorEntry:
        return self._tensors[index].entries[self._origin]

    def _bits_of(self, layout: Layout) -> dict[tuple[str, bytes], int]:
        if layout not in self._bits:
            entries = ((index, self._entry(index)) for index in self.by_layout[layout])
            self._bits[layout] = {(entry.dtype.name, _raw(entry)): index for index, entry in entries}
        return self._bits[layout]

    def _near(self, values: NDArray[Any], indices: Sequence[int], *, is_ahead: bool) -> int | None:
        """The nearest weight, if it is near by the measure of its own way: what an optimizer says of gradients is not.

        What is a point of the weights' space by its definition need only be nearer to one weight than to all others.
        """
        if self._first is None or len(indices) > MAX_ALIKE:
            return None
        gaps = [float(np.linalg.norm(_values(self._entry(index)) - values)) for index in indices]
        nearest = indices[int(np.argmin(gaps))]
        if is_ahead:
            return nearest if len(gaps) == 1 or min(gaps) <= NEAR * sorted(gaps)[1] else None
        way = np.linalg.norm(_values(self._entry(nearest)) - _values(self._tensors[nearest].entries[self._first]))
        return nearest if min(gaps) <= NEAR * float(way) else None


def _raw(entry: TensorEntry) -> bytes:
    """The bytes of a sample."""
    size = entry.dtype.itemsize
    stretches = sample_stretches(entry.num_elements, NUM_SAMPLES)
    return b"".join(read_bytes(entry.path, entry.offset_of(part), part.count * size) for part in stretches)


def _values(entry: TensorEntry) -> NDArray[Any]:
    """A sample (N,), in the type of arithmetic."""
    raw = np.frombuffer(_raw(entry), np.uint8)
    return np.array(widen(raw, entry.dtype, np.empty(len(raw) // entry.dtype.itemsize, work_type(entry.dtype))))


def _rounded(values: NDArray[Any], dtype: DType) -> bytes:
    """The bytes of values that are rounded to a type."""
    out = np.empty(len(values) * dtype.itemsize, np.uint8)
    narrow(values.astype(work_type(dtype), copy=False), dtype, out)
    return out.tobytes()
