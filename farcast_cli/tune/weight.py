"""One weight matrix of a checkpoint, read in blocks of rows: never whole, and every pass over it is counted.

Knows which tensors can be tuned at all, and how the shards of one are joined.

Shapes: W (m_out, m_in), stored so or transposed; with a bias the inputs get a last element 1, so that W has a last column b.
"""

from __future__ import annotations

import difflib
import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.engine.reader import Reader, aligned
from farcast_cli.errors import NonFiniteError, SnapshotError, UsageError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.run.alignment import under_common_names
from farcast_cli.run.quantised import quantised_owner
from farcast_cli.tensors import FLOATING, canonical_name
from farcast_cli.tune.numbers import decode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.tensors import TensorEntry
    from farcast_cli.trainers.base import Snapshot

BLOCK_BYTES = 8 << 20  # of float64, of a block of rows; a larger one gains nothing and takes memory
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared"}
_HEADS = {"lm_head", "embed_out"}
"""What transformers' models call the layers that they may tie."""
_OTHER_HEADS = {"output", "score", "classifier"}
_SHARD = re.compile(r"\.@(\d+)(?:,\d+)*$")
MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of a matrix that lie in one stretch of a file; `first` is the number of the first."""

    entry: TensorEntry
    first: int

    @property
    def num_rows(self) -> int:
        return self.entry.shape[0]


@dataclass(slots=True)
class Weight:
    """A matrix, with its bias as a last column where it has one. Counts the bytes and the passes that were read."""

    name: str
    shards: tuple[Shard, ...]
    """Of the matrix as it is stored."""
    bias: tuple[Shard, ...] = ()
    is_transposed: bool = False
    """Whether it is stored as inputs x outputs, as GPT-2's Conv1D is."""
    num_passes: int = 0
    bytes_read: int = 0
    square: float = field(default=0.0)
    """The squared norm, and below the checksum: of the last pass."""
    checksum: int = 0
    _biases: NDArray[np.floating] = field(default_factory=lambda: np.empty(0))

    @property
    def num_outputs(self) -> int:
        return self._stored_shape[self.is_transposed]

    @property
    def num_inputs(self) -> int:
        return self._stored_shape[not self.is_transposed]

    @property
    def _stored_shape(self) -> tuple[int, int]:
        return sum(shard.num_rows for shard in self.shards), self.shards[0].entry.shape[1]

    @property
    def path(self) -> Path:
        return self.shards[0].entry.path

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(shard.entry for shard in (*self.shards, *self.bias))

    @property
    def bias_name(self) -> str | None:
        return _SHARD.sub("", self.bias[0].entry.name) if self.bias else None

    @property
    def turn_hint(self) -> str:
        """What to do about a shape that fits the layer the other way round."""
        told, act = ("is not stored", "leave out") if self.is_transposed else ("may be stored", "add")
        return f"{self.name} {told} as inputs x outputs, as GPT-2's Conv1D is: {act} --transposed"

    def extended(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inputs (n, m_in) with the last element 1 that a bias asks for, (n, m_in + 1)."""
        return np.hstack([inputs, np.ones((len(inputs), 1))]) if self.bias else inputs

    def forward(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """X W^T (n, m_out) for extended inputs (n, m_in or m_in + 1), in one pass."""
        if self.is_transposed:
            out = np.zeros((len(inputs), self.num_outputs))
            for first, rows in self.blocks():
                out += inputs[:, first : first + len(rows)] @ rows
            return out + inputs[:, -1:] * self._biases if self.bias else out
        out = np.empty((len(inputs), self.num_outputs))
        for first, part in self.outputs(inputs):
            out[:, first : first + part.shape[1]] = part
        return out

    def outputs(self, inputs: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The same, some outputs at a time, as (first output, (n, b)), in one pass; all at once where W is stored transposed."""
        if self.is_transposed:
            yield 0, self.forward(inputs)
            return
        count = max(1, BLOCK_BYTES // (8 * max(1, len(inputs))))
        for first, rows in self.blocks():
            for start in range(0, len(rows), count):
                yield first + start, inputs @ rows[start : start + count].T

    def backward(self, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """G W (n, m_in or m_in + 1) for gradients (n, m_out), in one pass."""
        out = np.zeros((len(gradients), self.num_inputs + bool(self.bias)))
        for first, rows in self.blocks():
            part = slice(first, first + len(rows))
            if self.is_transposed:
                out[:, part] = gradients @ rows.T
            else:
                out += gradients[:, part] @ rows
        if self.is_transposed and self.bias:
            out[:, -1] = gradients @ self._biases
        return out

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The stored rows in order, as (first row, float64 (R, columns)), in memory that the next block takes over.

        The last column is the bias; where W is stored transposed, the bias is no part of it.

        Raises:
            NonFiniteError: a row that holds NaN or infinity.
        """
        self.num_passes += 1
        self.square, self.checksum = 0.0, 0
        stored_width = self._stored_shape[1]
        self._biases = np.concatenate([self._read_all(shard) for shard in self.bias]) if self.bias else np.empty(0)
        has_column = bool(self.bias) and not self.is_transposed
        if self.is_transposed:
            self.square += float(np.vdot(self._biases, self._biases))
        width = stored_width + has_column
        num_rows = max(1, BLOCK_BYTES // (8 * width))
        block = np.empty((num_rows, width))
        raw = aligned(num_rows * stored_width * 8)
        reader = Reader()
        for shard in self.shards:
            for start in range(0, shard.num_rows, num_rows):
                count = min(num_rows, shard.num_rows - start)
                rows = block[:count]
                rows[:, :stored_width] = self._read(reader, shard, start, count, raw)
                if has_column:
                    rows[:, -1] = self._biases[shard.first + start : shard.first + start + count]
                self._check(shard.entry, rows)
                yield shard.first + start, rows

    def _read(self, reader: Reader, shard: Shard, start: int, count: int, raw: NDArray[np.uint8]) -> NDArray[np.floating]:
        row_bytes = shard.entry.shape[1] * shard.entry.dtype.itemsize
        memory = raw[: count * row_bytes]
        reader.fill(shard.entry.path, shard.entry.offset + start * row_bytes, memory)
        self.bytes_read += len(memory)
        self.checksum = zlib.crc32(memory.data, self.checksum)
        return decode(memory, shard.entry.dtype).reshape(count, shard.entry.shape[1])

    def _read_all(self, shard: Shard) -> NDArray[np.floating]:
        values, raw = read_tensor(shard.entry)
        self.bytes_read += len(raw)
        self.checksum = zlib.crc32(raw, self.checksum)
        if not np.isfinite(values).all():
            raise _non_finite(shard.entry, values)
        return values

    def _check(self, entry: TensorEntry, rows: NDArray[np.float64]) -> None:
        square = float(np.vdot(rows, rows))
        if not np.isfinite(square) and not np.isfinite(rows).all():
            raise _non_finite(entry, rows)
        self.square += square


def _non_finite(entry: TensorEntry, values: NDArray[np.floating]) -> NonFiniteError:
    return NonFiniteError(
        f"{entry.path}: tensor {entry.name!r} holds {values[~np.isfinite(values)][0]}: expected finite numbers",
        hint="the run diverged or the file is damaged: tune an earlier checkpoint",
    )


def read_tensor(entry: TensorEntry) -> tuple[NDArray[Any], bytes]:
    """A small tensor's values (N,), whole, and its bytes."""
    raw = read_bytes(entry.path, entry.offset, entry.num_bytes)
    return decode(raw, entry.dtype), raw


def find_weight(snapshot: Snapshot, layer: str, bias: str | None = None, *, is_transposed: bool = False) -> Weight:
    """A layer of a checkpoint, seen to be one that can be tuned.

    Raises:
        UsageError: no such tensor, or none of two dimensions (a bias: of one, as long as the layer has rows).
        SnapshotError: integers, quantised, tied to another tensor, or not stored row by row.
    """
    shards = find_matrix(snapshot, "--layer", layer)
    weight = Weight(layer, shards, is_transposed=is_transposed)
    _check_tied(snapshot, weight.entries, layer)
    if bias is None:
        return weight
    found = _find(snapshot, "--bias", bias)
    length = sum(entry.num_elements for entry in found)
    if any(len(entry.shape) != 1 for entry in found) or length != weight.num_outputs:
        shape = list(found[0].shape) if len(found) == 1 else [length]
        raise UsageError(
            f"{snapshot.path}: --bias {bias}: expected shape [{weight.num_outputs}], one number for each output of {layer},"
            f" found {shape}",
            hint=weight.turn_hint if length == weight.num_inputs else "",
        )
    _check_tied(snapshot, found, bias)
    return Weight(layer, shards, _in_order(found), is_transposed)


def find_matrix(snapshot: Snapshot, option: str, key: str) -> tuple[Shard, ...]:
    """A tensor of two dimensions, in the shards that it is stored as."""
    found = _find(snapshot, option, key)
    if any(len(entry.shape) != 2 for entry in found):  # noqa: PLR2004 - a matrix
        shape = list(found[0].shape)
        raise UsageError(
            f"{snapshot.path}: {option} {key}: expected a matrix, outputs x inputs, found shape {shape}",
            hint="name the weight of a linear layer",
        )
    shards = _in_order(found)
    if any(shard.entry.shape[1] != shards[0].entry.shape[1] for shard in shards):
        raise SnapshotError(
            f"{snapshot.path}: {option} {key}: sharded by columns: expected rows",
            hint="python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE",
        )
    return shards


def find_vector(snapshot: Snapshot, option: str, key: str, length: int) -> NDArray[np.float64]:
    """A small tensor's values (length,)."""
    found = _find(snapshot, option, key)
    values = np.concatenate([read_tensor(shard.entry)[0] for shard in _in_order(found)]).astype(np.float64)
    if values.size != length or any(len(entry.shape) != 1 for entry in found):
        raise UsageError(f"{snapshot.path}: {option} {key}: expected shape [{length}], found {list(found[0].shape)}")
    return values


def _in_order(entries: Sequence[TensorEntry]) -> tuple[Shard, ...]:
    """Shards by their rows; each must begin where the one before ends."""
    first, found = 0, []
    for entry in sorted(entries, key=_begin):
        found.append(Shard(entry, first))
        if len(entries) > 1 and _begin(entry) != first:
            raise SnapshotError(
                f"{entry.path}: tensor {entry.name!r} does not begin at row {first}: expected shards of whole rows",
                hint="python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE",
            )
        first += entry.shape[0] if entry.shape else 1
    return tuple(found)


def _begin(entry: TensorEntry) -> int:
    match = _SHARD.search(entry.name)
    return int(match[1]) if match else 0


def _find(snapshot: Snapshot, option: str, key: str) -> list[TensorEntry]:
    """The tensor of a name, or its shards, of a floating type."""
    tensors = snapshot.tensors
    named = [tensors[key]] if key in tensors else [e for name, e in tensors.items() if _SHARD.sub("", name) == key]
    if not named:
        common = under_common_names(tensors)
        named = [common[key]] if key in common else []
    if not named:
        near = difflib.get_close_matches(key, tensors, n=MAX_NAMED, cutoff=0.3) or list(tensors)[:MAX_NAMED]
        raise UsageError(f"{snapshot.path}: {option} {key}: no such tensor", hint=f"it has {', '.join(near)}")
    for entry in named:
        _check_kind(snapshot, entry)
    return named


def _check_kind(snapshot: Snapshot, entry: TensorEntry) -> None:
    others = {other.name for other in snapshot.tensors.values() if other.dtype.name not in FLOATING}
    owner = quantised_owner(entry.name, others)
    if entry.dtype.name not in FLOATING or owner:
        what = f"belongs to {owner}, which is quantised" if owner else f"is {entry.dtype.name}"
        raise SnapshotError(
            f"{entry.path}: tensor {entry.name!r} {what}: expected {', '.join(FLOATING)}",
            hint="tune the checkpoint that it was quantised from",
        )
    if entry.name in snapshot.not_streamable or entry.strides:
        raise SnapshotError(
            f"{entry.path}: tensor {entry.name!r} is not stored row by row",
            hint="save the checkpoint with tensor.contiguous()",
        )
    if not entry.num_elements:
        raise SnapshotError(f"{entry.path}: tensor {entry.name!r} is empty", hint="name another layer")


def _check_tied(snapshot: Snapshot, entries: Sequence[TensorEntry], key: str) -> None:
    """Refuse a tensor that another layer uses too: tuning one would change both."""
    _check_tied_by_config(snapshot, key)
    own = {entry.name for entry in entries}
    for entry in entries:
        for other in snapshot.tensors.values():
            overlaps = other.offset < entry.offset + entry.num_bytes and entry.offset < other.offset + other.num_bytes
            if other.name not in own and other.path == entry.path and overlaps:
                raise SnapshotError(
                    f"{entry.path}: {key} is tied to {other.name}: tuning would change both",
                    hint="save the checkpoint without this tie, or tune another layer",
                )


def _check_tied_by_config(snapshot: Snapshot, key: str) -> None:
    """A file keeps one of two tied weights; that transformers uses it twice, only the model's settings tell."""
    path = next((part.path for part in snapshot.parts if part.name == "config.json"), None)
    module = canonical_name(key).split(".")[-2:][0]
    if path is None or module not in _EMBEDDINGS | _HEADS:
        return
    try:
        config = parse_json(read_bytes(path, 0, file_size(path)))
    except ValueError:
        return
    sections = [one for one in (config, *config.values()) if isinstance(one, dict)] if isinstance(config, dict) else []
    told = [section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in section]
    has_head = any(not (_HEADS | _OTHER_HEADS).isdisjoint(name.split(".")) for name in snapshot.tensors)
    if told[0] if told else not has_head:  # a setting that is what its model has by default is not written
        raise SnapshotError(
            f"{snapshot.path}: {key} is the model's input and its output layer (tie_word_embeddings): tuning one would change"
            " both",
            hint="save the checkpoint without this tie, or tune another layer",
        )
