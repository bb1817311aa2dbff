"""Which tensors of a snapshot are trained: those that its optimizer has a state for.

A buffer of a floating type (a queue of features, a history of maxima, an observer) lies among the weights and moves, but no
gradient moves it: its path says nothing of the training. Nothing is guessed: a tensor of which the optimizer's state does not
tell is unknown.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError
from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import TensorRef
from farcast_cli.state.files import load_histories, optimizer_states
from farcast_cli.tensors import FORECASTABLE, TensorEntry, canonical_name, is_batch_norm_statistic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from farcast_cli.trainers.base import Snapshot

    Shape = tuple[int, ...]

_SHARD = ".@"
"""What the name of a weight's shard has after the weight's own."""


def trained_in(snapshot: Snapshot) -> Mapping[str, bool]:
    """Whether tensors are trained, by name; those that are missing are unknown.

    Reads the optimizer's files without their tensors.
    """
    try:
        histories = load_histories([snapshot])
    except FarcastError:
        return {}  # a damaged file: whatever writes a forecast says so
    optimizers = [one for history in histories.values() for _, tree, _ in history.states for one in optimizer_states(tree)]
    found = [_shapes(one) for one in optimizers]
    known = [shapes for shapes in found if shapes is not None]
    if not known or len(known) < len(found):
        return {}
    weights = _weights(snapshot)
    if all(isinstance(key, str) for shapes in known for key in shapes):
        return _by_name(weights, {canonical_name(key) for shapes in known for key in shapes})
    shapes = [shape for one in known for shape in one.values()]
    is_in_order = len(optimizers) == 1 and len(optimizers[0]["param_groups"]) == 1 and _keeps_order(snapshot)
    return (_by_order(weights, shapes) if is_in_order else {}) or _by_count(weights, shapes)


def _shapes(optimizer: dict[str, Any]) -> dict[Any, Shape] | None:
    """The shape of each parameter of an optimizer, in its order; None where its state does not tell that of all."""
    state = optimizer["state"]
    groups = [group.get("params") if isinstance(group, dict) else None for group in optimizer["param_groups"]]
    num_parameters = sum(len(group) for group in groups if isinstance(group, (list, tuple)))
    shapes = {key: _shape(entry) for key, entry in state.items()}
    known = {key: shape for key, shape in shapes.items() if shape is not None}
    return known if known and len(known) == len(state) == num_parameters else None


def _shape(entry: object) -> Shape | None:
    """The one shape of a parameter's moments; single numbers, such as its count of steps, aside."""
    tensors = entry.values() if isinstance(entry, dict) else ()
    shapes = {value.shape for value in tensors if isinstance(value, TensorRef) and value.shape}
    shapes = shapes - {(1,)} or shapes
    return shapes.pop() if len(shapes) == 1 else None


def _weights(snapshot: Snapshot) -> dict[str, TensorEntry]:
    """What may be trained, each stretch of memory once."""
    places: dict[tuple[object, int], str] = {}
    for name, entry in snapshot.tensors.items():
        if entry.dtype.name in FORECASTABLE and not is_batch_norm_statistic(name):
            places.setdefault((entry.path, entry.offset), name)
    return {name: snapshot.tensors[name] for name in places.values()}


def _keeps_order(snapshot: Snapshot) -> bool:
    """Whether the file has the weights in the model's order, as torch's state dicts do."""
    return all(isinstance(part.content, TorchFile) for part in snapshot.parts if part.role in {"weights", "state"})


def _by_name(weights: Mapping[str, TensorEntry], trained: set[str]) -> dict[str, bool]:
    found = {name: canonical_name(name).partition(_SHARD)[0] in trained for name in weights}
    return found if trained <= {canonical_name(name).partition(_SHARD)[0] for name in weights} else {}


def _by_count(weights: Mapping[str, TensorEntry], shapes: Iterable[Shape]) -> dict[str, bool]:
    """Of a shape of which the optimizer has as many as the weights, all are trained; of one that it has none of, none is."""
    wanted, there = Counter(shapes), Counter(entry.shape for entry in weights.values())
    if any(count > there[shape] for shape, count in wanted.items()):
        return {}
    told = {shape for shape, count in there.items() if wanted[shape] in {0, count}}
    return {name: wanted[entry.shape] > 0 for name, entry in weights.items() if entry.shape in told}


def _by_order(weights: Mapping[str, TensorEntry], shapes: Sequence[Shape]) -> dict[str, bool]:
    """The parameters are the weights in order, with others between them: known where only one choice of weights fits.

    >>> entries = {name: TensorEntry(name, None, shape, None, 0) for name, shape in [("a", (2,)), ("b", (3,)), ("c", (2,))]}
    >>> _by_order(entries, [(3,), (2,)])
    {'a': False, 'b': True, 'c': True}
    >>> _by_order(entries, [(2,)])
    {}
    """
    items = [(name, entry.shape) for name, entry in weights.items()]
    first, last = _chosen(items, shapes), _chosen(items[::-1], shapes[::-1])
    return {name: name in first for name, _ in items} if first and first == last else {}


def _chosen(items: Iterable[tuple[str, Shape]], shapes: Sequence[Shape]) -> set[str]:
    """The first weights that have these shapes in this order; none where there are no such."""
    rest, found = list(shapes[::-1]), set()
    for name, shape in items:
        if rest and shape == rest[-1]:
            rest.pop()
            found.add(name)
    return set() if rest else found
