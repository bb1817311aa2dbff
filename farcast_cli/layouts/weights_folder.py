"""Weights in a folder, whole or in shards: what the Hugging Face layouts have in common."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, UnsafeFileError
from farcast_cli.formats.files import file_size, read_bytes
from farcast_cli.formats.safetensors_file import read_safetensors
from farcast_cli.formats.torch_file import TorchFile, read_torch_file
from farcast_cli.layouts.base import Part, find_weights, unique_tensors, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from farcast_cli.formats.safetensors_file import SafetensorsFile
    from farcast_cli.tensors import TensorEntry

MAX_JSON_BYTES = 1 << 28
_WEIGHTS = re.compile(r"\.safetensors$|(?:model|weights|consolidated)[^/]*\.(?:bin|pth?)$")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the run."""
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise FileFormatError(f"{path}: {size} bytes of JSON, over the limit of {MAX_JSON_BYTES}")
    try:
        value = json.loads(read_bytes(path, 0, size))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON: {error}", hint="the file is half-written or damaged") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_weights(folder: Path) -> tuple[list[Part], dict[str, TensorEntry], frozenset[str]]:
    """The weight files of a folder as parts, their tensors, and those that cannot be streamed."""
    first = find_weights(folder)
    if first is None:
        raise FileFormatError(f"{folder}: no weights found")
    if not first.name.endswith(".index.json"):
        return _parts([first])
    index = read_json(first)
    paths = _shards(folder, first, index)
    parts, tensors, rough = _parts(paths)
    _check_index(first, index["weight_map"], tensors)
    return [Part(first, first.name, "weights-index", index), *parts], tensors, rough


def _parts(paths: Sequence[Path]) -> tuple[list[Part], dict[str, TensorEntry], frozenset[str]]:
    if paths and paths[0].suffix == ".safetensors":
        files = [read_safetensors(path) for path in paths]
        return [_part(file) for file in files], unique_tensors(files, paths[0].parent), frozenset()
    tensors: dict[str, TensorEntry] = {}
    rough: frozenset[str] = frozenset()
    parts = []
    for path in paths:
        torch_file = read_torch_file(path)
        found, uneven = weights_of(torch_file, torch_file.tree)
        tensors |= found
        rough |= uneven
        parts.append(_part(torch_file))
    return parts, tensors, rough


def _part(file: SafetensorsFile | TorchFile) -> Part:
    return Part(file.path, file.path.name, "weights", file)


def _shards(folder: Path, index_path: Path, index: dict[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FileFormatError(f"{index_path}: no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).name != name or name in {"", ".", ".."}:
            raise UnsafeFileError(f"{index_path}: shard {name!r} lies outside the folder")
        if not (folder / name).is_file():
            raise FileFormatError(f"{folder}: shard {name} is missing", hint="the snapshot is half-written: leave it out")
    return [folder / name for name in names]


def _check_index(index_path: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise FileFormatError(f"{index_path}: tensor {name!r} is not in {shard}, where the index has it")
    extra = sorted(tensors.keys() - weight_map.keys())
    if extra:
        raise FileFormatError(f"{index_path}: tensor {extra[0]!r} is in a shard but not in the index")


def second_weights(others: Iterable[Part]) -> tuple[tuple[str, str], ...]:
    """Files beside the weights that look like weights too: the same in another format, an adapter, an average."""
    found = [part.name for part in others if part.role == "other" and _WEIGHTS.search(part.name)]
    return tuple((name, "a second file of weights: not forecast, as the last snapshot has it") for name in found)
