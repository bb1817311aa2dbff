"""Weights in a folder: whole or in shards, of one model, of several, or of adapters. What folder layouts have in common."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, HalfWrittenError, SnapshotError, UnsafeFileError
from farcast_cli.files.json_text import parse_json, parse_json_beside
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.formats.file_kind import kind_of
from farcast_cli.formats.safetensors_file import StoredTensors, by_name, read_safetensors
from farcast_cli.formats.torch_file import TorchFile, read_torch_file
from farcast_cli.trainers.base import ADAPTER_FILES, Part, find_weights, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.formats.safetensors_file import SafetensorsFile
    from farcast_cli.tensors import TensorEntry

MAX_SHARDS = 10_000
MAX_JSON_BYTES = 1 << 27  # 128 MiB; a log of 400,000 steps takes half of it
_WEIGHTS = re.compile(r"(?:^|/)(?!optim)[^/]*\.safetensors$|(?:model|weights|consolidated)[^/]*\.(?:bin|pth?)$")
_SHARD = re.compile(r"(?!optim)(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_SECOND_FILE = "a second file of weights: not forecast, copied from the last snapshot"
_SECOND_ADAPTER = "an adapter next to the full weights, which the trainer loads: not forecast, copied from the last snapshot"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One model's weights, by their one file or their index of shards, and what its tensors' names begin with."""

    path: Path
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a snapshot: their files as parts, the tensors by name, and those that cannot be streamed."""

    parts: tuple[Part, ...]
    tensors: Mapping[str, TensorEntry]
    rough: frozenset[str] = frozenset()

    def under(self, prefix: str, folder: Path) -> Weights:
        """The same with a prefix to all names; `folder` is the snapshot's."""
        parts = [replace(part, name=part.path.relative_to(folder).as_posix(), prefix=prefix) for part in self.parts]
        tensors = self.tensors
        if prefix:
            tensors = {prefix + name: replace(entry, name=prefix + name) for name, entry in tensors.items()}
        return Weights(tuple(parts), tensors, frozenset(prefix + name for name in self.rough))


def as_one(folder: Path, several: Iterable[Weights]) -> Weights:
    """The weights of several models as those of one snapshot."""
    whole = Weights((), {})
    for one in several:
        if not whole.parts:
            whole = one
            continue
        twice = whole.tensors.keys() & one.tensors.keys()
        if twice:
            raise SnapshotError(f"{folder}: tensor {min(twice)!r} is in two files, {one.parts[0].name} and another")
        whole = Weights(whole.parts + one.parts, {**whole.tensors, **one.tensors}, whole.rough | one.rough)
    return whole


def with_twins(whole: Weights, again: Weights, path: Path) -> Weights:
    """Weights, and those that the snapshot holds again in files that its trainer does not load, though users do.

    What has the names and shapes of the weights is their twin: it gets the same forecast. Anything else counts by itself.
    """
    if all(are_alike(whole.tensors.get(name), entry) for name, entry in again.tensors.items()):
        twins = (replace(part, role="twin" if part.role == "weights" else "other") for part in again.parts)
        return replace(whole, parts=(*whole.parts, *twins))
    return as_one(path, (whole, again))


def are_alike(one: TensorEntry | None, other: TensorEntry) -> bool:
    """Whether there is a tensor of the other's shape and order; the types may differ."""
    return one is not None and (one.shape, one.strides) == (other.shape, other.strides)


def find_adapters(folder: Path) -> list[WeightFile]:
    """The adapters that PEFT saved: the default one in the folder, those with a name in subfolders of that name."""
    top = find_weights(folder, ADAPTER_FILES)
    below = [(find_weights(inner, ADAPTER_FILES), inner.name) for inner in sorted(folder.iterdir()) if inner.is_dir()]
    return [*([WeightFile(top)] if top else []), *(WeightFile(path, f"{name}.") for path, name in below if path)]


def find_shards(folder: Path) -> Path | None:
    """The first shard of weights in a folder without their index, which some programs do without."""
    return next((file for file in sorted(folder.glob("*-of-*")) if _SHARD.fullmatch(file.name) and file.is_file()), None)


def parse_json_of(path: Path) -> Any:
    """The value of a small JSON file.

    Raises:
        FileFormatError: not JSON.
    """
    try:
        return parse_json(read_bytes(path, 0, file_size(path)))
    except ValueError as error:
        raise FileFormatError(f"{path}: not JSON: {error}", hint="the file is incomplete or damaged") from error


def read_json(path: Path, *, log: str = "") -> dict[str, Any]:
    """A JSON object from a file of the run; the list under the key `log`, which grows with the run, is left in the file."""
    size = file_size(path)
    raw = read_bytes(path, 0, size) if size <= MAX_JSON_BYTES else b""
    if size > (MAX_JSON_BYTES if raw.isascii() else MAX_JSON_BYTES // 4):  # other letters take four bytes of memory
        raise FileFormatError(
            f"{path}: {size} bytes of JSON, expected at most {MAX_JSON_BYTES}, or a quarter of it if it is not ASCII",
            hint="shorten the log in it, or leave the snapshot out with --steps",
        )
    try:
        value = parse_json_beside(raw, log, path) if log else parse_json(raw)
    except ValueError as error:
        if not raw.strip(b"\0 \n") or (raw.startswith(b"{") and not raw.rstrip().endswith(b"}")):
            raise HalfWrittenError(
                f"{path}: ends before its JSON does", hint="the file is incomplete: save it again"
            ) from error
        raise FileFormatError(f"{path}: not JSON: {error}", hint="the file is incomplete or damaged") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_weights(folder: Path, sources: Iterable[WeightFile]) -> Weights:
    """The weights of a snapshot's folder; headers only."""
    return as_one(folder, (_read_one(source.path).under(source.prefix, folder) for source in sources))


def _read_one(first: Path) -> Weights:
    if not first.name.endswith(".index.json"):
        return _read_files(_numbered(first) if _SHARD.fullmatch(first.name) else [first])
    index = read_json(first)
    found = _read_files(_shards(first.parent, first, index))
    _check_index(first, index["weight_map"], found.tensors)
    return replace(found, parts=(Part(first, first.name, "weights-index", index), *found.parts))


def _read_files(paths: Sequence[Path]) -> Weights:
    if paths and (paths[0].suffix == ".safetensors" or kind_of(paths[0]) == "safetensors"):
        files = [read_safetensors(path) for path in paths]
        return Weights(tuple(_part(file) for file in files), by_name(files, paths[0].parent))
    tensors: dict[str, TensorEntry] = {}
    rough: frozenset[str] = frozenset()
    parts = []
    for path in paths:
        torch_file = read_torch_file(path)
        found, uneven = weights_of(torch_file, torch_file.tree)
        tensors |= found
        rough |= uneven
        parts.append(_part(torch_file))
    return Weights(tuple(parts), tensors, rough)


def _part(file: SafetensorsFile | TorchFile) -> Part:
    return Part(file.path, file.path.name, "weights", file)


def _shards(folder: Path, index_path: Path, index: dict[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FileFormatError(f"{index_path}: no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePath(name).name != name or name in {"", ".", ".."}:
            raise UnsafeFileError(f"{index_path}: shard {name!r} lies outside the folder")
        if not (folder / name).is_file():
            raise HalfWrittenError(f"{folder}: shard {name} is missing", hint="the snapshot is incomplete: leave it out")
    return [folder / name for name in names]


def _numbered(first: Path) -> list[Path]:
    """All shards that the name of one counts."""
    found = _SHARD.fullmatch(first.name)
    assert found is not None  # noqa: S101 - the caller has looked
    stem, _, count, ending = found.groups()
    paths = [first.with_name(f"{stem}-{number:05}-of-{count}{ending}") for number in range(1, min(int(count), MAX_SHARDS) + 1)]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        raise HalfWrittenError(
            f"{first.parent}: shard {missing.name} is missing", hint="the snapshot is incomplete: leave it out"
        )
    return paths


def _check_index(index_path: Path, weight_map: dict[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    files = tensors.files if isinstance(tensors, StoredTensors) else ()
    if files and weight_map == {name: file.path.name for file in files for name in file.header.names}:
        return
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise FileFormatError(f"{index_path}: tensor {name!r} is not in {shard}, where the index has it")
    extra = sorted(tensors.keys() - weight_map.keys())
    if extra:
        raise FileFormatError(f"{index_path}: tensor {extra[0]!r} is in a shard but not in the index")


def second_weights(others: Iterable[Part]) -> tuple[tuple[str, str], ...]:
    """Files beside the weights that look like weights too: the same in another format, an adapter, an average."""
    found = [part.name for part in others if part.role == "other" and _WEIGHTS.search(part.name)]
    return tuple((name, _SECOND_ADAPTER if "adapter_model" in name else _SECOND_FILE) for name in found)
