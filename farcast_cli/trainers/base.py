"""What every layout says of a snapshot: its tensors, its files and their roles, and the evidence for its step."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

from farcast_cli.errors import FarcastError, FileFormatError, SnapshotError, UnreadableError, UnsafeFileError, UsageError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import Mark, file_size, look_again, mark_of, read_bytes, read_stretches, reading
from farcast_cli.formats.dcp_file import DcpFile
from farcast_cli.formats.pickle_file import PickleFile
from farcast_cli.formats.pickled_module import as_state_dict
from farcast_cli.formats.safetensors_file import MAX_NAME, SafetensorsFile, StoredTensors
from farcast_cli.formats.torch_file import TorchFile, read_raw_pickle, refuse_half_written
from farcast_cli.formats.torch_pickle import TensorRef, is_streamable, iter_tensors
from farcast_cli.formats.tree import at, dotted, grow
from farcast_cli.tensors import sample_stretches
from farcast_cli.trainers.folder_files import files_below
from farcast_cli.trainers.names import MAX_DIGITS, find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.choices import StepUnit
    from farcast_cli.files.reading import FileStretch
    from farcast_cli.formats.tree import TreePath
    from farcast_cli.tensors import TensorEntry

    States = Sequence[tuple[int, Any]]  # of one state file: (step, tree), the origin last

DIGEST_BYTES = 4096
METADATA_STEPS = ("step", "ss_steps", "global_step")
"""Metadata keys of safetensors files that hold a step; `ss_steps` is what the LoRA trainers of the image world write."""

MAX_METADATA_JSON = 64 * 1024
"""Characters of a metadata text that is looked into."""
KEPT_KEY = "farcast_kept"
"""The key of the metadata that a kept snapshot is recognised by."""

_TORCH_ENDINGS = frozenset({".pt", ".pth", ".bin", ".pkl"})
Role = Literal[
    "weights",
    "weights-index",
    "twin",
    "average",
    "state",
    "side-state",
    "optimizer",
    "scheduler",
    "trainer-state",
    "data",
    "other",
]
"""What a file is. A twin holds weights that another file, which the trainer loads, holds too: it gets their forecast.

An average holds an average of the weights in a file of its own, under their names.
"""
_UNREAD_STATE: frozenset[Role] = frozenset({"optimizer", "scheduler", "side-state", "state", "other"})
EvidenceKind = Literal["trainer state", "payload", "adam step", "name", "metadata", "scheduler", "order"]
"""Evidence for a step, in the order in which it is trusted; `order` is that of saving, to which `--steps` gave steps."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One place that names a snapshot's step, as in `trainer state: global_step = 500`."""

    source: EvidenceKind
    where: str
    step: int


@dataclass(frozen=True, slots=True)
class LeapMark:
    """What a checkpoint says of a leap that it descends from, and its trainer carries on."""

    step: int
    """Which the trainer's counters are at when it resumes."""
    origin_step: int
    valid_step: int


def marks_of(rows: Iterable[Any]) -> list[LeapMark]:
    """The marks among rows of three values that a file tells: those that are steps and can be a leap."""
    steps = (row for row in rows if len(row) == len(fields(LeapMark)) and all(map(is_step, row)))
    marks = (LeapMark(*row) for row in steps)
    return [mark for mark in marks if mark.origin_step < mark.valid_step and mark.step in {mark.origin_step, mark.valid_step}]


def is_step(value: object) -> TypeGuard[int]:
    """Whether a value of a file can be a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**MAX_DIGITS


@dataclass(frozen=True, slots=True)
class Network:
    """Where the tensors of one network lie in a file's tree, and what their names begin with in the snapshot."""

    path: TreePath = ()
    prefix: TreePath = ()


@dataclass(frozen=True, slots=True)
class Average:
    """Where an average of a network lies in a file's tree; each of its tensors with the name of the weight that it averages."""

    path: TreePath
    pairs: tuple[tuple[TensorRef, str], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a snapshot. `name` is its path inside the snapshot, "" where the snapshot is that one file."""

    path: Path
    name: str
    role: Role
    content: SafetensorsFile | TorchFile | DcpFile | PickleFile | Mapping[str, Any] | None = None
    networks: tuple[Network, ...] = (Network(),)
    """Where its weights lie in its tree; the whole tree by default."""
    prefix: str = ""
    """What the names of its tensors begin with in the snapshot, where several files have tensors of the same names."""
    averages: tuple[Average, ...] = ()
    known_as: str = ""
    """Its name in all snapshots of the run, where `name` tells the step."""
    is_shard: bool = False
    """Whether it is one process's piece of a state, whose other pieces are other parts."""

    @property
    def is_bare(self) -> bool:
        """Whether a torch file is weights and nothing else."""
        return self.networks == (Network(),)

    @property
    def weights_paths(self) -> frozenset[TreePath]:
        """Where weights and their averages lie in a tree that holds more than them."""
        paths = [one.path for one in self.networks] + [one.path for one in self.averages]
        return frozenset(path for path in paths if path)

    @property
    def torch_file(self) -> TorchFile | None:
        """Its content as a torch file, a distributed checkpoint's too; None where it is neither, or was not read."""
        content = self.content.as_torch if isinstance(self.content, DcpFile) else self.content
        return content if isinstance(content, TorchFile) else None

    def weights_in(self, tree: Any) -> Any:
        """The weights of a tree as one state dict.

        Raises:
            SnapshotError: two networks whose tensors would have the same names.
        """
        return weights_in(self.path, tree, self.networks)

    def name_of(self, place: TreePath) -> TreePath | None:
        """The name of a tensor at a place of the tree, in parts; None where it is no weight."""
        found = next((one for one in self.networks if place[: len(one.path)] == one.path), None)
        return None if found is None else (*found.prefix, *place[len(found.path) :])

    @property
    def key(self) -> str:
        """What it is known by from snapshot to snapshot."""
        return self.known_as or self.name


@dataclass(frozen=True, slots=True)
class StateNumbers:
    """The numbers of a trainer's state file: its tree without tensors, under the file's name in the snapshot."""

    name: str
    role: Role
    tree: Any
    is_read: bool
    """Whether the file is read with its snapshot; others are read where they are asked for."""


@dataclass(frozen=True, slots=True)
class KeptFrom:
    """The checkpoint that a kept snapshot was copied from: what a kept snapshot says of it."""

    run: Path
    """The run's folder."""
    pattern: str
    digest: str
    """Its `full_digest`."""
    num_bytes: int
    states: tuple[StateNumbers, ...]
    marks: tuple[LeapMark, ...]
    averages: Mapping[str, str]
    """A mark of each of its averages of the weights: the same where a sample of its values is."""


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
    unit: StepUnit = "step"
    """What `step` counts."""
    not_streamable: frozenset[str] = frozenset()
    beside: tuple[tuple[str, str], ...] = ()
    """Weights that are not the run's own by any rule, and so are copied: (name, reason)."""
    notes: tuple[str, ...] = ()
    """What a person should know before resuming from it."""
    marks: Mapping[Path, Mark] = field(default_factory=dict)
    """Every file as it was before any of it was read."""
    source: KeptFrom | None = None
    """Of a kept snapshot, the checkpoint that it was copied from."""
    weights: tuple[str, ...] = ()
    """The keys of the weights that were chosen when it was read, or kept; none for all networks."""

    @property
    def num_bytes(self) -> int:
        return sum(file_size(part.path) for part in self.parts)

    @property
    def digest(self) -> str:
        """A fingerprint: all headers, and a block from the middle of the largest tensor, which every step changes."""
        whole = hashlib.sha256()
        for part in self.parts:
            if isinstance(part.content, (SafetensorsFile, TorchFile, DcpFile)) and part.role in {"weights", "state"}:
                whole.update(part.content.digest.encode())
        plain = (self.tensors[name] for name in self.tensors if name not in self.not_streamable)
        stored = self.tensors.largest if isinstance(self.tensors, StoredTensors) else None
        largest = stored or max(plain, key=lambda entry: entry.num_bytes, default=None)
        if largest is not None:
            whole.update(_middle_of(largest))
        return whole.hexdigest()

    @property
    def full_digest(self) -> str:
        """The same with a block from the middle of every tensor: another fingerprint wherever any tensor has been trained.

        A kept snapshot has that of the checkpoint that it was copied from.
        """
        if self.source is not None:
            return self.source.digest
        whole = hashlib.sha256(self.digest.encode())
        plain = (entry for name, entry in sorted(self.tensors.items()) if name not in self.not_streamable)
        for block in read_stretches(map(_place_of_middle, plain)):
            whole.update(block)
        return whole.hexdigest()

    def has_weights_of(self, other: Snapshot) -> bool:
        """Whether two snapshots hold the same weights, by a block from the middle of every tensor."""
        mine, others = self.tensors, other.tensors
        return [(e.name, e.dtype, e.shape) for e in mine.values()] == [
            (e.name, e.dtype, e.shape) for e in others.values()
        ] and all(_middle_of(mine[name]) == _middle_of(others[name]) for name in mine)

    def includes(self, other: Snapshot) -> bool:
        """Whether every tensor of another snapshot is here with the same values, by a block from its middle."""
        pairs = [(self.tensors.get(name), entry) for name, entry in other.tensors.items()]
        return all(
            mine is not None
            and (mine.dtype, mine.shape) == (its.dtype, its.shape)
            and _are_alike(mine.as_real(), its.as_real())
            for mine, its in pairs
        )

    @property
    def weights_files(self) -> frozenset[Path]:
        """The files that hold its tensors."""
        files = self.tensors.files if isinstance(self.tensors, StoredTensors) else self.tensors.values()
        return frozenset(file.path for file in files)

    @property
    def is_sample(self) -> bool:
        """Whether it holds only a sample of some tensor's values."""
        return any(entry.sample for entry in self.tensors.values())

    def settle(self, step: int, source: str, unit: StepUnit | None = None) -> Snapshot:
        return replace(self, step=step, step_source=source, unit=unit or self.unit)


AVERAGED = "an average of the weights: it moves with them for resuming; --for evaluation replaces it by the forecast"
_OUTSIDE = "tensors outside the weights are not forecast; they are copied from the last snapshot"


def outside(count: int) -> str:
    """What becomes of so many tensors in a state dict beside the weights."""
    return f"{count} {_OUTSIDE}"


def num_copied_in(told: str) -> int:
    """How many tensors are copied where this is told of them: none of an average, which moves with the weights.

    >>> num_copied_in(outside(4)), num_copied_in(AVERAGED), num_copied_in("excluded")
    (4, 0, 1)
    """
    count = told.removesuffix(_OUTSIDE).strip()
    return 0 if told == AVERAGED else int(count) if told.endswith(_OUTSIDE) and count.isdecimal() else 1


class Clock(Protocol):
    """A trainer's own counts at a later step, worked out from those at its snapshots."""

    @property
    def paths(self) -> Collection[TreePath]:
        """Where in a state file's tree the clock alone counts: no rate moves what lies there."""

    @property
    def epoch_ends(self) -> Sequence[int]:
        """The horizons, below and above, at which an epoch ends, where a trainer begins its data anew in mid-epoch."""

    def move(self, tree: Any) -> Sequence[tuple[str, int, int]]:
        """Move the counts of a tree in place; says what changed: (where, old, new)."""

    def notes(self, name: str, tree: Any) -> Iterable[str]:
        """What a person should know of the step; `name` is the state file's."""

    def schedule_count(self, path: TreePath) -> int | None:
        """How often the schedule at a path has been stepped by then; None where the clock does not tell."""

    def optimizer_count(self, count: float) -> int | None:
        """An optimiser's own count by then, from the origin's; None where its own rate tells."""


def _never(_: object) -> bool:
    return False


def _no_clock(_: States, __: int) -> None:
    return None


def _same_name(name: str, _: object, __: int) -> str:
    return name


def _unknown(_: Snapshot) -> None:
    return None


def _no_log(_: Snapshot) -> list[tuple[int, float]]:
    return []


def _no_losses(_: Snapshot) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    return [], []


def _no_marks(_: Snapshot) -> list[LeapMark]:
    return []


def _not_marked(_: Any, __: LeapMark) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a trainer asks of a checkpoint that it resumes from. The defaults are those of a loop of one's own."""

    wrote: Callable[[object], bool] = _never
    """Whether the tree of a state file is this trainer's, whatever file it lies in."""
    clock: Callable[[States, int], Clock | None] = _no_clock
    """The clock of a run at a step, from its states; None where each counter moves by its own rate."""
    rename: Callable[[str, object, int], str] = _same_name
    """A name whose step has been moved on, with what else it tells (an epoch) at so many steps after the state's tree."""
    end: Callable[[Snapshot], tuple[str, int] | None] = _unknown
    """Where the end of the run is said, and the step."""
    num_steps: Callable[[Snapshot], int | None] = _unknown
    """How long the whole run is to be, which its learning rates follow from."""
    formula: Callable[[Snapshot], Callable[[int], float] | None] = _unknown
    """The learning rate that the run's arguments name, as a factor by the count of steps."""
    logged_rates: Callable[[Snapshot], list[tuple[int, float]]] = _no_log
    """The learning rates of the run's log by step, in order."""
    logged_losses: Callable[[Snapshot], tuple[list[tuple[int, float]], list[tuple[int, float]]]] = _no_losses
    """The losses of the run's log by step: those of training, those of evaluation."""
    computes_rates: bool = False
    """Whether it computes its learning rates when it resumes, whatever its optimisers' groups hold."""
    log_lags: tuple[int, ...] = (0,)
    """By how many steps the log's entries may lag behind the rate of the next step."""
    mark: Callable[[Any, LeapMark], None] = _not_marked
    """Adds a leap to the tree of its own state file, in place, where it carries that on to its later checkpoints."""
    marks: Callable[[Snapshot], list[LeapMark]] = _no_marks
    """The leaps that a checkpoint descends from, in order."""
    needs_optimizer: str = ""
    """Why a checkpoint without its optimiser's state cannot be loaded; "" where it can."""
    without_optimizer: str = ""
    """What comes of an optimiser's file that is left out."""
    loads_shards: bool = True
    """Whether weights in shards are loaded."""
    has_own_files: bool = False
    """Whether its torch files are for the trainer alone, so that a plain torch file of the weights is a conversion."""
    half_written: Mapping[str, str] = field(default_factory=dict)
    """The layouts that a snapshot looks like as long as it is being saved, and what it then lacks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout: its name, whether something on disk has it, how to read it (headers only), and its trainer."""

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Snapshot]
    names_are_steps: bool = True
    """Whether a snapshot of a step always bears that step as its number, so that others need not be opened."""
    trainer: Trainer = field(default_factory=Trainer)
    read_chosen: Callable[[Path, Sequence[str]], Snapshot] | None = None
    """How to read it where the keys of its weights are chosen; None where they lie in one place only."""

    def choosing(self, keys: Sequence[str]) -> Layout:
        """The same for the weights under these keys; by default all that there are.

        Raises:
            UsageError: the layout has its weights in one place.
        """
        if not keys:
            return self
        if self.read_chosen is None:
            raise UsageError(f"--weights: a {self.name} snapshot has its weights in one place", hint="leave the option out")
        read, chosen = self.read_chosen, tuple(keys)
        return replace(self, read=lambda path: replace(read(path, chosen), weights=chosen))


def _middle_of(entry: TensorEntry) -> bytes:
    return read_bytes(*_place_of_middle(entry))


def _place_of_middle(entry: TensorEntry) -> FileStretch:
    size = entry.num_bytes
    count = min(size, DIGEST_BYTES)
    return entry.path, entry.offset + (size - count) // 2, count


def _are_alike(mine: TensorEntry, its: TensorEntry) -> bool:
    """Whether two tensors have the same values in a block from the middle, or from the middle of the second one's sample."""
    if not its.sample:
        return _middle_of(mine) == _middle_of(its)
    held = sample_stretches(its.num_elements, its.sample)
    stretch = held[len(held) // 2]
    blocks = [read_bytes(e.path, e.offset_of(stretch), stretch.count * e.dtype.itemsize) for e in (mine, its)]
    return blocks[0] == blocks[1]


def read_snapshot(layout: Layout, path: Path) -> Snapshot:
    """Read a snapshot (headers only), having looked at all its files first: none leads out of it, each is marked.

    Raises:
        UnsafeFileError: a link inside its folder leads out of the run.
        FileFormatError: a link that leads nowhere, or what the layout cannot read.
    """
    with reading(path):
        files = [file for file, _ in files_below(path)] if path.is_dir() else [path]
        marks = {file: mark_of(file) for file in files}
        return replace(layout.read(path), marks=marks)


def refuse_unfinished(snapshot: Snapshot) -> None:
    """See that the files of a trainer's state are whole that its layout has not opened: `predict` reads and copies them.

    Cost: the directory of each torch file.

    Raises:
        HalfWrittenError: one was cut off, or is empty.
    """
    for part in snapshot.parts:
        if part.content is None and part.role in _UNREAD_STATE and part.path.suffix in _TORCH_ENDINGS:
            refuse_half_written(part.path)


@contextmanager
def unchanged(snapshots: Sequence[Snapshot], *, copied: Snapshot | None = None) -> Iterator[None]:
    """A pass over snapshots that ends well only if all is as it was when it was opened.

    Args:
        copied: the one whose every file counts; of the others, those with weights or the trainer's state.

    Raises:
        SnapshotError: a file that was changed, replaced or removed, also where that made the pass fail.
    """
    try:
        yield
    except FarcastError:
        _check_unchanged(snapshots, copied)
        raise
    _check_unchanged(snapshots, copied)


def _check_unchanged(snapshots: Sequence[Snapshot], copied: Snapshot | None) -> None:
    look_again(snapshot.path / "any" for snapshot in snapshots)
    for snapshot in snapshots:
        for part in snapshot.parts:
            is_read = part.role != "other" or (copied is not None and snapshot.path == copied.path)
            if is_read and part.path in snapshot.marks and _mark_now(part.path) != snapshot.marks[part.path]:
                raise SnapshotError(
                    f"{part.path}: changed while it was read",
                    hint="wait until the trainer has saved it, then run the command again",
                )


def _mark_now(path: Path) -> Mark | None:
    try:
        return mark_of(path)
    except FileFormatError:
        return None


def metadata_json(text: str) -> dict[str, Any] | None:
    """The object that a metadata text of a safetensors file holds as JSON; None where it holds none."""
    if not text.startswith("{") or len(text) > MAX_METADATA_JSON:
        return None
    try:
        found = parse_json(text.encode())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def metadata_evidence(metadata: Mapping[str, str]) -> tuple[Evidence, ...]:
    """The first step among the metadata of a safetensors file: under a key of its own, or in the JSON of `training_info`."""
    plain = ((key, metadata[key]) for key in METADATA_STEPS if key in metadata)
    found = [(key, int(text)) for key, text in plain if text.isdecimal() and len(text) <= MAX_DIGITS]
    info = metadata_json(metadata.get("training_info", "")) or {}
    found += [("training_info.step", info["step"])] if is_step(info.get("step")) else []
    return tuple(Evidence("metadata", f"metadata {key}", step) for key, step in found[:1])


def name_evidence(path: Path) -> tuple[Evidence, ...]:
    found = find_step_in_name(path.name)
    return (Evidence("name", path.name, int(found[1])),) if found else ()


def weights_of(file: TorchFile, tree: object) -> tuple[dict[str, TensorEntry], frozenset[str]]:
    """The tensors of a (nested) state dict in a torch file, and those whose elements are no gapless stretch."""
    refs: dict[str, TensorRef] = {}
    for keys, ref in iter_tensors(tree):
        name = dotted(keys)
        if not name.isprintable() or len(name) > MAX_NAME:
            raise FileFormatError(
                f"{file.path}: a tensor's name is {name[:MAX_NAME]!r}, expected printable text of at most {MAX_NAME} characters"
            )
        if name in refs:
            raise SnapshotError(f"{file.path}: two tensors are called {name!r}, one of them in a nested dict")
        refs[name] = ref
    entries = {name: file.entry(name, ref) for name, ref in refs.items()}
    return entries, frozenset(name for name, ref in refs.items() if not is_streamable(ref))


def weights_in(path: Path, tree: Any, networks: Sequence[Network]) -> Any:
    """The networks of a tree as one state dict; a pickled module's state dict stands for it.

    Raises:
        SnapshotError: two networks whose tensors would have the same names.
    """
    if len(networks) == 1:
        return as_state_dict(at(tree, networks[0].path))
    found: dict[Any, Any] = {}
    for one in networks:
        if one.prefix:
            grow(found, one.prefix, as_state_dict(at(tree, one.path)))
    main: dict[Any, Any] = next((as_state_dict(at(tree, one.path)) for one in networks if not one.prefix), {})
    twice = found.keys() & main.keys()
    if twice:
        raise SnapshotError(
            f"{path}: tensors of two networks are called {min(twice)!r}", hint="--weights KEY chooses one network"
        )
    return main | found


def tree_of(part: Part) -> object:
    """The object tree of a state file; None where the part is none, or was not read."""
    content = part.torch_file or part.content
    return content.tree if isinstance(content, (TorchFile, PickleFile)) else None


def holds_text(path: Path, text: str) -> bool:
    """Whether the pickle of a torch file has a text in it: whose it is, before it is read."""
    try:
        return text.encode() in read_raw_pickle(path)
    except (UnreadableError, UnsafeFileError):
        raise
    except FileFormatError:
        return False  # not a torch file; whoever reads it says so


WEIGHT_FILES = tuple(
    f"{stem}{ending}{index}"
    for stem in ("model", "pytorch_model", "diffusion_pytorch_model")
    for ending in (".safetensors", ".bin")
    for index in ("", ".index.json")
)
"""A model's weights as transformers and diffusers name and look for them: the one file, or an index of shards."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""An adapter's weights as PEFT names and looks for them."""


def find_weights(folder: Path, names: Sequence[str] = WEIGHT_FILES) -> Path | None:
    """The first of these files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
