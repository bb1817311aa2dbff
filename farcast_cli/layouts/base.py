"""What every layout says of a snapshot: its tensors, its files and their roles, and the evidence for its step."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from farcast_cli.errors import FileFormatError, SnapshotError
from farcast_cli.formats.files import file_size, read_bytes
from farcast_cli.formats.safetensors_file import SafetensorsFile
from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import TensorRef, is_streamable, iter_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.tensors import TensorEntry

DIGEST_BYTES = 4096
MAX_DIGITS = 15  # of a step; a longer number in a name is a hash or a date

Role = Literal["weights", "weights-index", "state", "optimizer", "scheduler", "trainer-state", "other"]
Source = Literal["trainer state", "payload", "adam step", "name", "metadata", "scheduler"]
"""Evidence for a step, in the order in which it is trusted."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One place that names a snapshot's step, as in `trainer state: global_step = 500`."""

    source: Source
    where: str
    step: int


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a snapshot. `name` is its path inside the snapshot, "" where the snapshot is that one file."""

    path: Path
    name: str
    role: Role
    content: SafetensorsFile | TorchFile | Mapping[str, Any] | None = None
    weights_key: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One saved state of the run. `step` is settled when the whole trajectory is known; -1 until then."""

    path: Path
    layout: str
    parts: tuple[Part, ...]
    tensors: Mapping[str, TensorEntry]
    evidence: tuple[Evidence, ...]
    step: int = -1
    step_source: str = ""
    not_streamable: frozenset[str] = frozenset()
    beside: tuple[tuple[str, str], ...] = ()
    """Weights that are not the run's own by any rule, and so are copied: (name, reason)."""

    @property
    def num_bytes(self) -> int:
        return sum(file_size(part.path) for part in self.parts)

    @property
    def digest(self) -> str:
        """A fingerprint: all headers, and a block from the middle of the largest tensor, which every step changes."""
        whole = hashlib.sha256()
        for part in self.parts:
            if isinstance(part.content, (SafetensorsFile, TorchFile)) and part.role in {"weights", "state"}:
                whole.update(part.content.digest.encode())
        largest = max(self.tensors.values(), key=lambda entry: entry.num_bytes, default=None)
        if largest is not None:
            count = min(largest.num_bytes, DIGEST_BYTES)
            whole.update(read_bytes(largest.path, largest.offset + (largest.num_bytes - count) // 2, count))
        return whole.hexdigest()

    def settle(self, step: int, source: str) -> Snapshot:
        return replace(self, step=step, step_source=source)


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout: its name, whether something on disk has it, and how to read it (headers only)."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Snapshot]
    names_are_steps: bool = True
    """Whether a snapshot of a step always bears that step as its number, so that others need not be opened."""


_ENDINGS = {"safetensors", "pt", "pth", "bin", "ckpt"}
_GLUED = re.compile(r"(?<![a-z])(?:global_?step|steps?|iter(?:ation)?|ba)[-_=]?(\d+)", re.IGNORECASE)
_CHECKPOINT = re.compile(r"(?<![a-z])(?:checkpoint|ckpt)[-_=]?(\d+)(?![\d.])", re.IGNORECASE)
_BARE = re.compile(r"^(?:[a-z]+[-_])?(\d+)$", re.IGNORECASE)


def find_step_in_name(name: str) -> re.Match[str] | None:
    """The number of a file or folder name that is its step; group 1 holds the digits.

    A number glued to `step`, `iter`, `global_step` or `ba` wins over `checkpoint-N`, and that over a lone number.
    """
    stem = _stem(name)
    bare = None if stem.lower().startswith("epoch") else _BARE.search(stem)
    return _GLUED.search(stem) or _CHECKPOINT.search(stem) or bare


def _stem(name: str) -> str:
    base, ending = name[: name.rfind(".")], name[name.rfind(".") + 1 :]
    return base if base and ending in _ENDINGS else name


def name_evidence(path: Path) -> tuple[Evidence, ...]:
    found = find_step_in_name(path.name)
    return (Evidence("name", path.name, int(found[1])),) if found and len(found[1]) <= MAX_DIGITS else ()


def unique_tensors(files: Iterable[SafetensorsFile], path: Path) -> dict[str, TensorEntry]:
    """All tensors of a snapshot's safetensors files by name."""
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in tensors:
                raise SnapshotError(
                    f"{path}: tensor {entry.name!r} is in two files, {tensors[entry.name].path.name} and {file.path.name}"
                )
            tensors[entry.name] = entry
    return tensors


def weights_of(file: TorchFile, tree: object) -> tuple[dict[str, TensorEntry], frozenset[str]]:
    """The tensors of a (nested) state dict in a torch file, and those whose elements are no gapless stretch."""
    refs: dict[str, TensorRef] = {}
    for keys, ref in iter_tensors(tree):
        name = ".".join(map(str, keys))
        if not name.isprintable():
            raise FileFormatError(f"{file.path}: a tensor's name is {name!r}, which is no printable text")
        if name in refs:
            raise SnapshotError(f"{file.path}: two tensors are called {name!r}, one of them in a nested dict")
        refs[name] = ref
    entries = {name: file.entry(name, ref) for name, ref in refs.items()}
    return entries, frozenset(name for name, ref in refs.items() if not is_streamable(ref))


def files_below(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file of a snapshot's folder with its name relative to the folder, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.relative_to(folder).as_posix()
        elif path.is_symlink():
            raise FileFormatError(f"{path}: a link that leads nowhere", hint="remove it, or restore what it points to")


def find_weights(folder: Path, stems: Sequence[str] = ("model", "pytorch_model")) -> Path | None:
    """A folder's weights as transformers and diffusers name them: an index of shards, or the one file."""
    for stem in stems:
        for ending in (".safetensors", ".bin"):
            for name in (f"{stem}{ending}.index.json", f"{stem}{ending}"):
                if (folder / name).is_file():
                    return folder / name
    return None
