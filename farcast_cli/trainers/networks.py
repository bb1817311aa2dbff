"""Which parts of a torch file's tree are weights: its networks, the averages of them, and state dicts that are neither.

A network is a dict of tensors of a floating type, or a pickled module, up to three levels deep, that is no optimizer's state.
Its key tells nothing of this but for a few words: an average (`ema`), a copy of an earlier time (`best`), a log (`loss`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import NoWeightsError, listed
from farcast_cli.formats.pickled_module import as_state_dict, is_module
from farcast_cli.formats.torch_pickle import Made, TensorRef, iter_tensors
from farcast_cli.formats.tree import at, dotted, find, walk
from farcast_cli.tensors import FLOATING, FORECASTABLE, canonical_name
from farcast_cli.trainers.base import AVERAGED, Average, Network, outside

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module", "network", "net", "params", "weights")
"""Usual keys of weights. The names of the first network under one get no prefix."""
MAX_DEPTH = 3
MAX_KEYS = 8
"""Keys that a message lists."""
MAX_WORDS = 64
"""Last words of a tensor's name that are looked at: a name of thousands would take minutes."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_AVERAGE = frozenset({"ema", "teacher", "avg", "average", "averaged", "target", "swa", "shadow", "polyak", "running"})
_EARLIER = frozenset({"best", "init", "initial", "old", "prev", "previous", "backup", "frozen", "ref", "reference"})
_NO_NETWORK = frozenset(
    {
        *("opt", "optim", "optimizer", "optimizers", "optimiser", "optimisers", "sched", "scheduler", "schedulers", "scaler"),
        *("rng", "random", "sampler", "loader", "dataloader", "loss", "losses", "log", "logs", "history", "metric", "metrics"),
        *("stats", "statistics", "queue", "buffer", "replay", "extra"),
    }
)
"""Words in the key of a dict of tensors that is no network."""
_MATRIX = 2  # dimensions; a dict without any tensor of so many is a log or a statistic, where there is a network beside it


@dataclass(frozen=True, slots=True)
class Networks:
    """The weights of a tree."""

    networks: tuple[Network, ...]
    averages: tuple[Average, ...] = ()
    told: tuple[tuple[str, str], ...] = ()
    """State dicts that are not forecast: (name, what becomes of it)."""

    @property
    def is_bare(self) -> bool:
        return self.networks == (Network(),)

    @property
    def holder(self) -> TreePath:
        """Where the first network lies."""
        return self.networks[0].path[:-1]


def find_networks(path: Path, tree: object, chosen: Sequence[str] = (), *, may_be_bare: bool = True) -> Networks:
    """The networks of a file's tree.

    Args:
        chosen: the dotted keys of the networks; by default all that there are.
        may_be_bare: whether the whole tree may be one state dict.

    Raises:
        NoWeightsError: there are none, or none under a key that was chosen.
    """
    if isinstance(tree, dict) and "param_groups" in tree and "state" in tree:
        raise _no_weights(path, tree)  # an optimiser's state by itself, as the second file of a snapshot
    found = dict(_state_dicts(tree))
    if chosen:
        paths = [_path_of(path, tree, key, found) for key in chosen]
    elif may_be_bare and isinstance(tree, dict) and _is_bare(tree, found):
        return Networks((Network(),))
    else:
        paths = _networks(found)
    if not paths:
        raise _no_weights(path, tree)
    networks = _prefixed(paths)
    averages, told = [], []
    for key, node in found.items():
        if key not in paths:
            average = _average_of(key, node, networks, tree)
            averages += [average] if average else []
            told.append((f"{dotted(key)}.*", _what_becomes(node, average)))
    return Networks(networks, tuple(averages), (*told, *_loose(tree, networks)))


def _what_becomes(node: object, average: Average | None) -> str:
    if average:
        return AVERAGED
    return outside(num_weights(as_state_dict(node)))


def _loose(tree: object, networks: Sequence[Network]) -> Iterator[tuple[str, str]]:
    """Tensors at the top of a tree that lie in no network."""
    if isinstance(tree, dict) and networks != (Network(),):
        yield from ((str(key), "a tensor outside the weights: copied") for key, value in tree.items() if _is_weight(value))


# --- what there is ---------------------------------------------------------------------------------------------------


def _state_dicts(tree: object) -> Iterator[tuple[TreePath, Any]]:
    """The dicts of tensors, lists of them in averages, and modules that may be networks, with their keys; none within another."""
    waiting: list[tuple[TreePath, Any]] = [((), tree)]
    while waiting:
        key, node = waiting.pop()
        if key and _is_none(key, node):
            continue
        if _is_state_dict(key, node):
            yield key, node
        elif isinstance(node, dict) and len(key) < MAX_DEPTH:
            inner = [((*key, name), value) for name, value in node.items() if isinstance(value, (dict, list, Made))]
            waiting += reversed(inner)


def _is_none(key: TreePath, node: object) -> bool:
    """Whether a node is no network by its key, or as an optimizer's state."""
    is_usual = key[-1] in WEIGHT_KEYS
    return (isinstance(node, dict) and "param_groups" in node) or (not is_usual and bool(_words(key[-1]) & _NO_NETWORK))


def _is_state_dict(key: TreePath, node: object) -> bool:
    if is_module(node):
        return any(_is_weight(ref) for _, ref in iter_tensors(as_state_dict(node)))
    if isinstance(node, list):
        return _is_average(key) and bool(node) and all(isinstance(ref, TensorRef) for ref in node)
    if not isinstance(node, dict) or not key:
        return False
    if key[-1] in WEIGHT_KEYS:
        return not holds_optimizer(node) and any(isinstance(inner, TensorRef) for _, inner in walk(node, enters=_in_dicts))
    return any(isinstance(name, str) and (_is_weight(value) or _is_sharded(value)) for name, value in node.items())


def _is_sharded(node: object) -> bool:
    """Whether it is a tensor of a distributed checkpoint: its shards by their offsets."""
    return isinstance(node, dict) and bool(node) and all(str(key).startswith("@") for key in node)


def _in_dicts(_: TreePath, node: object) -> bool:
    return isinstance(node, dict)


def holds_optimizer(tree: dict[Any, Any]) -> bool:
    """Whether it is an optimizer's state, or that of a wrapper around one; the copies of the weights in it are told elsewhere."""
    return any(isinstance(node, dict) and "param_groups" in node for _, node in walk(tree))


def _is_weight(node: object) -> bool:
    return isinstance(node, TensorRef) and node.dtype.name in FORECASTABLE and bool(node.shape)


def num_weights(tree: object) -> int:
    """How many tensors of a tree may be weights; random states are bytes, and counters are single numbers."""
    return sum(_is_weight(ref) for _, ref in iter_tensors(tree))


def _is_bare(tree: dict[Any, Any], found: dict[TreePath, Any]) -> bool:
    """Whether the whole tree is one state dict: there are tensors at its top, and no network by its key or beside an optimizer."""
    if any(key[-1] in WEIGHT_KEYS for key in found):
        return False
    if found:
        has_numbers = any(isinstance(value, (int, float, str)) for value in tree.values())
        return any(_is_weight(value) for value in tree.values()) and not has_numbers and not holds_optimizer(tree)
    return any(isinstance(value, TensorRef) for value in tree.values())


# --- which of them are networks --------------------------------------------------------------------------------------


def _networks(found: dict[TreePath, Any]) -> list[TreePath]:
    """All that are neither averages nor of another time; where there is nothing else, these."""
    own = [key for key in found if not _is_average(key) and not _is_earlier(key)]
    matrices = [key for key in own if not key or key[-1] in WEIGHT_KEYS or _has_matrix(found[key])]
    named = [key for key in found if not isinstance(found[key], list)]
    return matrices or own or [key for key in named if not _is_earlier(key)] or named


def _has_matrix(node: object) -> bool:
    return any(_is_weight(ref) and len(ref.shape) >= _MATRIX for _, ref in iter_tensors(as_state_dict(node)))


def _prefixed(paths: Sequence[TreePath]) -> tuple[Network, ...]:
    """The networks with what their tensors' names begin with: nothing for the only one, and for the first under a usual key."""
    main = next((path for path in paths if path and path[-1] in WEIGHT_KEYS), None) if len(paths) > 1 else paths[0]
    depth = 0
    while all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return tuple(Network(path, () if path == main else tuple(map(str, path[depth:]))) for path in paths)


def _words(key: object) -> frozenset[str]:
    """The words of a key: those of `modelEMA`, `g_ema` and `state_dict_ema` have `ema` among them.

    >>> sorted(_words("modelEMA") | _words("netG_ema"))
    ['ema', 'g', 'model', 'net']
    """
    return frozenset(word.lower() for word in _WORD.findall(str(key)))


def _is_average(path: TreePath) -> bool:
    return any(_words(key) & _AVERAGE for key in path)


def _is_earlier(path: TreePath) -> bool:
    return any(_words(key) & _EARLIER for key in path)


# --- averages --------------------------------------------------------------------------------------------------------


def _average_of(path: TreePath, node: object, networks: Sequence[Network], tree: object) -> Average | None:
    """A state dict as the average of a network: by its key, and by the names and shapes of its tensors, or their order.

    Of several networks that it fits, the one whose key it has but for the word; none where that tells nothing.
    """
    if not _is_average(path) or _is_earlier(path):
        return None
    words = [frozenset[str]().union(*map(_words, part)) - _AVERAGE for part in (path, path[-1:])]
    fitting = []
    for network in networks:
        pairs = pairs_of(node, at(tree, network.path))
        if pairs:
            named = tuple((ref, dotted((*network.prefix, name))) for ref, name in pairs)
            fitting.append((_words(network.path[-1]) in words if network.path else False, Average(path, named)))
    best = [average for is_named, average in fitting if is_named] or [average for _, average in fitting]
    return best[0] if len(best) == 1 else None


def pairs_of(average: object, network: object) -> list[tuple[TensorRef, str]]:
    """The tensors of an average, and the names of those in the network that they are the averages of; none where it is none."""
    weights = [(dotted(keys), ref) for keys, ref in iter_tensors(as_state_dict(network))]
    tensors = [(dotted(keys), ref) for keys, ref in iter_tensors(as_state_dict(average))]
    if isinstance(average, list):
        return _by_order([ref for _, ref in tensors], weights)
    known = {canonical_name(name): (name, ref) for name, ref in weights}
    found = []
    for name, ref in tensors:
        match = next((known[tail] for tail in _tails(canonical_name(name)) if tail in known), None)
        if match and _are_alike(ref, match[1]):
            found.append((ref, match[0]))
    num_weights = sum(_is_weight(ref) for _, ref in weights)
    return found if 2 * sum(_is_weight(ref) for ref, _ in found) > num_weights else []


def _tails(name: str) -> Iterator[str]:
    """A name, and what is left of it without its first words: an average may hold a network under a key of its own."""
    yield name
    parts = name.rsplit(".", MAX_WORDS)[1:]
    yield from (".".join(parts[start:]) for start in range(len(parts)))


def _are_alike(one: TensorRef, other: TensorRef) -> bool:
    are_floats = {one.dtype.name, other.dtype.name} <= set(FLOATING)
    return one.shape == other.shape and (one.dtype == other.dtype or are_floats)


def _by_order(refs: Sequence[TensorRef], weights: Sequence[tuple[str, TensorRef]]) -> list[tuple[TensorRef, str]]:
    """A list of tensors that has those of the network in order, without buffers between them if it has fewer."""
    rest, found = list(weights), []
    for ref in refs:
        while rest and not _are_alike(ref, rest[0][1]):
            rest.pop(0)
        if not rest:
            return []
        found.append((ref, rest.pop(0)[0]))
    return found


# --- what a person should know ---------------------------------------------------------------------------------------


def _path_of(path: Path, tree: object, key: str, found: dict[TreePath, Any]) -> TreePath:
    """The place of a dotted key, in which a key of the tree may have dots itself."""
    parts = key.split(".")
    place = next((place for place in _places(tree, parts)), None)
    node = None if place is None else find(tree, place)
    if place is None or not (is_module(node) or isinstance(node, dict)) or not _tensors_in(node):
        raise NoWeightsError(
            f"{path}: --weights {key}: expected a dict of tensors under that key, found {_kind_of(node)}",
            hint=_hint(_keys(tree) or list(map(dotted, found))),
        )
    return place


def _places(tree: object, parts: Sequence[str]) -> Iterator[TreePath]:
    if not parts:
        yield ()
    if isinstance(tree, dict):
        for count in range(1, len(parts) + 1):
            for key in tree:
                if str(key) == ".".join(parts[:count]):
                    yield from ((key, *rest) for rest in _places(tree[key], parts[count:]))


def _tensors_in(node: object) -> bool:
    return any(True for _ in iter_tensors(as_state_dict(node)))


def _keys(tree: object) -> list[str]:
    """The keys under which tensors lie, as `--weights` takes them."""
    nodes = walk(tree, enters=lambda path, node: isinstance(node, dict) and len(path) <= MAX_DEPTH)
    dicts = [(path, node) for path, node in nodes if path and (isinstance(node, dict) or is_module(node))]
    holding = [path for path, node in dicts if is_module(node) or any(isinstance(ref, TensorRef) for ref in node.values())]
    return [dotted(path) for path in holding if "param_groups" not in path and "state" not in path[1:]]


def _hint(keys: Sequence[str]) -> str:
    if not keys:
        return "save the weights under 'model', or keep the file out of this folder"
    return f"--weights KEY[,KEY] names the keys of the weights; tensors lie under {listed(keys, most=MAX_KEYS)}"


def _no_weights(path: Path, tree: object) -> NoWeightsError:
    found = sorted(map(str, tree))[:MAX_KEYS] if isinstance(tree, dict) else _kind_of(tree)
    return NoWeightsError(
        f"{path}: no weights found: expected a state dict, or one under a key (model, state_dict, g, student, ...); found {found}",
        hint=_hint(_keys(tree)),
    )


def _kind_of(node: object) -> str:
    if node is None:
        return "nothing"
    return f"one object of class {node.maker}" if isinstance(node, Made) else type(node).__name__
