"""A zip of torch files and a JSON object, read as one torch file: the zip of stable-baselines3.

Its tree has a key for each record: the tree of a torch file, the JSON object, or nothing for a record that is copied. The
storages of each are known by its name before their own keys. Texts in the object may hold pickles: they stay texts.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, UnsafeFileError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import file_size
from farcast_cli.formats.torch_file import TorchFile, ZippedFile, read_records, read_torch_stretch
from farcast_cli.formats.torch_pickle import StorageRef, TensorRef, iter_storages
from farcast_cli.formats.tree import with_leaves
from farcast_cli.formats.zip_file import Span

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farcast_cli.formats.zip_file import ZipMember

PREFIX = "bundle"
_MAX_TORCH_FILES = 64  # in one zip; an agent has less than ten
_MAX_JSON_BYTES = 1 << 27


def read_bundle(path: Path, json_name: str) -> TorchFile:
    """Read the torch files of a zip (`*.pth`) and its JSON object; costs their directories and pickles.

    Raises:
        UnsafeFileError: a pickle names something that is no data, or the zip is made to exhaust its reader.
        FileFormatError: not a zip, damaged, or its records are compressed.
    """
    stretch = Span(path, 0, file_size(path))
    tree: dict[str, Any] = {}
    records: dict[str, ZipMember] = {}
    members = []
    num_torch_files = 0
    whole = hashlib.sha256()
    for name, record in read_records(stretch).items():
        inner = None
        if name == json_name:
            tree[name] = _parse(stretch, record)
        elif name.endswith(".pth"):
            inner = read_torch_stretch(path, record.offset, record.num_bytes)
            tree[name] = with_storages(inner.tree, partial(_named, name))
            data = f"{inner.prefix}/data/"
            own = {key.removeprefix(data): at for key, at in inner.records.items() if key.startswith(data)}
            records |= {f"{PREFIX}/data/{name}/{key}": at for key, at in own.items()}
            whole.update(inner.digest.encode())
            num_torch_files += 1
            if num_torch_files > _MAX_TORCH_FILES:
                raise UnsafeFileError(f"{path}: more than {_MAX_TORCH_FILES} torch files in a zip")
        members.append(ZippedFile(record, inner))
    return TorchFile(path, tree, records, PREFIX, stretch.size, whole.hexdigest(), tuple(members))


def with_storages(tree: Any, change: Callable[[StorageRef], StorageRef]) -> Any:
    """A copy of a tree whose tensors are views of what a function makes of their storages.

    Raises:
        FileFormatError: a tensor inside an object that is carried unread.
    """

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, TensorRef):
            return replace(leaf, storage=change(leaf.storage))
        if isinstance(leaf, StorageRef):
            return change(leaf)
        if any(True for _ in iter_storages(leaf)):
            raise FileFormatError(f"a tensor inside {leaf!r:.60}: expected tensors in dicts and lists only")
        return leaf

    return with_leaves(tree, changed)


def _named(name: str, storage: StorageRef) -> StorageRef:
    return replace(storage, key=f"{name}/{storage.key}")


def _parse(stretch: Span, record: ZipMember) -> dict[str, Any]:
    if record.num_bytes > _MAX_JSON_BYTES:
        raise UnsafeFileError(
            f"{stretch.path}: {record.name} has {record.num_bytes} bytes, over the limit of {_MAX_JSON_BYTES}"
        )
    try:
        value = parse_json(stretch.read_record(record))
    except ValueError as error:
        raise FileFormatError(f"{stretch.path}: {record.name} is not JSON: {error}", hint="save it again") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{stretch.path}: {record.name}: expected a JSON object, found {type(value).__name__}")
    return value
