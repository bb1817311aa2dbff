"""Which tensors the snapshots of a run share: what can be forecast, and what is copied and why.

Knows how names are matched between snapshots, where a run's tensors change, and which lie in the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

from farcast_cli.errors import MixedRunsError, SnapshotError, UsageError
from farcast_cli.formats.safetensors_file import StoredTensors
from farcast_cli.run.closed import are_alike
from farcast_cli.run.quantised import quantised_owner
from farcast_cli.tensors import FORECASTABLE, TensorEntry, canonical_name
from farcast_cli.trainers.base import num_copied_in

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from farcast_cli.trainers.base import Snapshot

Value = TypeVar("Value")
Row = tuple["TensorEntry | None", ...]
"""A tensor as each snapshot has it; None where one lacks it. The last one has it."""
MAX_NAMED = 3
"""Tensors that a message names one by one."""
_EXTRA_STATE = "_extra_state"
"""The key under which `torch.nn.Module.get_extra_state` keeps what is no weight."""
_SCATTERED = "not stored contiguously in the same order in every snapshot"


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """A tensor that all snapshots share; `entries[t]` is where snapshot t holds it, complex numbers as pairs."""

    name: str
    entries: tuple[TensorEntry, ...]
    remark: str = ""
    """What is unusual about its type."""

    @property
    def num_elements(self) -> int:
        return self.entries[-1].num_elements


@dataclass(frozen=True, slots=True)
class Copied:
    """A tensor that is taken over from the last snapshot unchanged, and why; `of` is the tensor that the reason names."""

    name: str
    reason: str
    of: str = ""

    @property
    def kind(self) -> str:
        """The reason without a name, the same for all tensors of its kind."""
        return self.reason.replace(self.of, "another") if self.of else self.reason

    @property
    def num_tensors(self) -> int:
        """How many are copied: a state dict beside the weights is one entry, and an average moves with the weights."""
        return num_copied_in(self.reason)


@dataclass(frozen=True, slots=True)
class Alignment:
    """What can be forecast, and what is copied."""

    tensors: tuple[AlignedTensor, ...]
    copied: tuple[Copied, ...]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)


def align(snapshots: Sequence[Snapshot], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Alignment:
    """Match the tensors of all snapshots by name, wrappers' prefixes aside.

    Tensors that are not of a floating type, are empty, belong to a quantised tensor, or that `include` and `exclude`
    (globs) leave out are copied; those may come, go and change their shape.

    Raises:
        MixedRunsError: names or shapes of other tensors differ between snapshots.
    """
    origin, choice = snapshots[-1], _Choice(tuple(include), tuple(exclude))
    flat = next((part.name for part in origin.parts if part.is_shard and part.weights_paths), "")
    if flat and (include or exclude):
        raise UsageError(
            f"--include and --exclude: {flat} has the weights of several layers joined into one tensor",
            hint="leave the options out: tensors are chosen by name, and this one has no part of its own for each layer",
        )
    alike = all(are_alike(snapshot, origin) for snapshot in snapshots[:-1])
    rows = _rows_in_order(snapshots) if alike else _rows_by_name(snapshots, choice)
    changed, reordered = ({}, {}) if alike else (_changed(rows, snapshots), _reordered(rows))
    reasons = reordered | _not_floating(origin) | changed | _set_aside(origin, choice)
    compared = slice(-1 if alike else 0, None)  # where all are alike, the last stands for them
    steps = tuple(snapshot.step for snapshot in snapshots)
    aligned: list[AlignedTensor] = []
    copied: list[Copied] = []
    for key, found in rows.items():
        if key in reasons:
            copied.append(reasons[key])
        else:
            entries = tuple(entry for entry in found if entry)
            real = tuple(entry.as_real() for entry in entries)
            remark = _remark(tuple(e.dtype.name for e in entries[compared]), real[-1].dtype.name, steps[compared])
            aligned.append(AlignedTensor(entries[-1].name, real, remark))
    copied += [Copied(name, reason) for name, reason in origin.beside]
    if not aligned:
        raise SnapshotError(
            f"{origin.path}: no tensor to forecast: all {len(copied)} are copied ({copied[0].reason})"
            if copied
            else f"{origin.path}: it holds no tensors",
            hint="change --include and --exclude" if include or exclude else "",
        )
    return Alignment(tuple(aligned), tuple(copied))


def since_last_change(
    snapshots: Sequence[Snapshot], *, include: Sequence[str] = (), exclude: Sequence[str] = (), minimum: int = 1
) -> tuple[tuple[Snapshot, ...], str]:
    """The snapshots since a tensor that is forecast last appeared, vanished or changed its shape, and a line that says so.

    Raises:
        MixedRunsError: fewer than `minimum` of them, or two models.
    """
    choice = _Choice(tuple(include), tuple(exclude))
    then = None
    for index in reversed(range(1, len(snapshots))):
        before, after = snapshots[index - 1], snapshots[index]
        if are_alike(before, after):
            then = None
            continue
        now, then = then or _Named.of(after, choice), _Named.of(before, choice)
        changes = _changes(then, now, choice)
        if not changes:
            continue
        num_left = len(snapshots) - index
        if num_left < minimum or not _is_one_model(before, after, choice):
            since = f"; {_counted(num_left, 'snapshot')} since, and fit needs {minimum}"
            raise _mixed_runs(before, after, changes, choice, since)
        left_out = f"{_counted(index, 'snapshot')} before it {'is' if index == 1 else 'are'} left out"
        return tuple(snapshots[index:]), f"history begins at step {after.step}, where {_told(changes)}; {left_out}"
    return tuple(snapshots), ""


# --- what one snapshot holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the user chose to forecast, as globs."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]


def under_common_names(named: Mapping[str, Value]) -> dict[str, Value]:
    """The same under names without wrappers' prefixes; under their own where that would make two the same."""
    found = {canonical_name(name): item for name, item in named.items()}
    return found if len(found) == len(named) else dict(named)


def _tensors(snapshot: Snapshot) -> dict[str, TensorEntry]:
    return under_common_names(snapshot.tensors)


def _set_aside(snapshot: Snapshot, choice: _Choice) -> dict[str, Copied]:
    """Tensors that are not forecast by themselves, whatever they hold: by choice, or as part of another's memory."""
    groups = {} if isinstance(snapshot.tensors, StoredTensors) else _memory_groups(snapshot.tensors.values())
    if not (groups or choice.include or choice.exclude):
        return {}
    found = {
        key: _reason_by_group(entry, groups.get(entry.name, _MemoryGroup((entry,))), choice)
        for key, entry in _tensors(snapshot).items()
    }
    return {key: copied for key, copied in found.items() if copied}


def _not_floating(snapshot: Snapshot) -> dict[str, Copied]:
    """Tensors whose values do not move along a path."""
    quantised = {entry.name for entry in snapshot.tensors.values() if entry.dtype.name not in FORECASTABLE}
    found = {key: _reason_by_kind(entry, snapshot, quantised) for key, entry in _tensors(snapshot).items()}
    return {key: copied for key, copied in found.items() if copied}


def _reason_by_kind(entry: TensorEntry, snapshot: Snapshot, quantised: Collection[str]) -> Copied | None:
    if entry.name.rpartition(".")[2] == "num_batches_tracked" and entry.dtype.name == "int64":
        return Copied(entry.name, "a counter, advanced with the trainer's own")
    if entry.dtype.name not in FORECASTABLE:
        return Copied(entry.name, f"{entry.dtype.name} is not forecast")
    if owner := quantised_owner(entry.name, quantised):
        return Copied(entry.name, f"belongs to {owner}, which is quantised", owner)
    if _EXTRA_STATE in entry.name.split("."):
        return Copied(entry.name, "the extra state of a module, no weight")
    if not entry.num_elements:
        return Copied(entry.name, "empty")
    return Copied(entry.name, _SCATTERED) if entry.name in snapshot.not_streamable else None


def _forecast_in(snapshot: Snapshot, choice: _Choice) -> dict[str, TensorEntry]:
    """The tensors that would be forecast if all snapshots were like this one."""
    others = _set_aside(snapshot, choice).keys() | _not_floating(snapshot).keys()
    return {key: entry for key, entry in _tensors(snapshot).items() if key not in others}


@dataclass(frozen=True, slots=True)
class _MemoryGroup:
    """Tensors that share bytes, as tied weights and views of a torch storage do, the largest first."""

    members: tuple[TensorEntry, ...]

    @property
    def owner(self) -> TensorEntry | None:
        """The member that spans all others, with which they move; None where they only overlap."""
        first = self.members[0]
        end = max(member.offset + member.num_bytes for member in self.members)
        return first if first.offset + first.num_bytes == end else None


def _memory_groups(entries: Iterable[TensorEntry]) -> dict[str, _MemoryGroup]:
    """The groups of several tensors, by the names of their members; most tensors are alone."""
    groups: list[list[TensorEntry]] = []
    end = 0
    for entry in sorted(entries, key=lambda e: (str(e.path), e.offset, -e.num_bytes)):
        if groups and groups[-1][0].path == entry.path and entry.offset < end and entry.num_bytes:
            groups[-1].append(entry)
            end = max(end, entry.offset + entry.num_bytes)
        else:
            groups.append([entry])
            end = entry.offset + entry.num_bytes
    several = [_MemoryGroup(tuple(members)) for members in groups if len(members) > 1]
    return {entry.name: group for group in several for entry in group.members}


def _reason_by_group(entry: TensorEntry, group: _MemoryGroup, choice: _Choice) -> Copied | None:
    """Why a tensor is not forecast by itself, from what the user chose and from whom it shares its memory with."""
    if _matches(entry.name, choice.exclude):
        return Copied(entry.name, "excluded")
    left_out = next((member.name for member in group.members if _matches(member.name, choice.exclude)), None)
    if left_out:
        return Copied(entry.name, f"tied to {left_out}, which is excluded", left_out)
    if choice.include and not any(_matches(member.name, choice.include) for member in group.members):
        return Copied(entry.name, "not included")
    owner = group.owner
    if owner is None:
        other = next(member.name for member in group.members if member.name != entry.name)
        return Copied(entry.name, f"shares part of its memory with {other}", other)
    if owner.name != entry.name:
        tie = "tied to" if owner.num_bytes == entry.num_bytes else "part of"
        return Copied(entry.name, f"{tie} {owner.name}", owner.name)
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return bool(patterns) and any(fnmatchcase(name, pattern) for pattern in patterns)


# --- what differs between snapshots ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """What became of a tensor from one snapshot to another."""

    name: str
    what: str


@dataclass(frozen=True, slots=True)
class _Named:
    """A snapshot's tensors by their common names, and the shapes of those that may be forecast."""

    snapshot: Snapshot
    tensors: Mapping[str, TensorEntry]
    outline: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, snapshot: Snapshot, choice: _Choice) -> _Named:
        tensors = _tensors(snapshot)
        return cls(snapshot, tensors, _outline(tensors, choice))


def _changes(before: _Named, after: _Named, choice: _Choice) -> list[_Change]:
    """What became of the tensors that are forecast in either of two snapshots."""
    if before.outline == after.outline:
        return []
    found = [
        _Change(now.name, _difference(before.tensors.get(key), now))
        for key, now in _forecast_in(after.snapshot, choice).items()
    ]
    gone = [
        _Change(was.name, "vanished") for key, was in _forecast_in(before.snapshot, choice).items() if key not in after.tensors
    ]
    return [change for change in found if change.what] + gone


def _outline(tensors: Mapping[str, TensorEntry], choice: _Choice) -> dict[str, tuple[int, ...]]:
    """The shapes of whatever may be forecast: where they are equal, nothing that is has changed."""
    return {
        key: _shape(entry)
        for key, entry in tensors.items()
        if entry.dtype.name in FORECASTABLE and 0 not in entry.shape and not _matches(entry.name, choice.exclude)
    }


def _shape(entry: TensorEntry) -> tuple[int, ...]:
    return entry.as_real().shape


def _difference(was: TensorEntry | None, now: TensorEntry) -> str:
    """How a tensor that is forecast in the later of two snapshots differs from the earlier one's."""
    if was is None:
        return "appeared"
    if _shape(was) != _shape(now):
        return f"changed its shape from {list(_shape(was))} to {list(_shape(now))}"
    if was.dtype.name not in FORECASTABLE:
        return f"changed its type from {was.dtype.name} to {now.dtype.name}"
    return ""


def _is_one_model(before: Snapshot, after: Snapshot, choice: _Choice) -> bool:
    """Whether at least half of the parameters are in both; a vocabulary may grow, which changes the first dimension."""
    old, new = _tensors(before), _forecast_in(after, choice)
    both = sum(now.num_elements for key, now in new.items() if key in old and _shape(old[key])[1:] == _shape(now)[1:])
    return 2 * both >= sum(now.num_elements for now in new.values())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _told(changes: Sequence[_Change]) -> str:
    more = f", and {_counted(len(changes) - 1, 'more tensor')} changed" if len(changes) > 1 else ""
    return f"{changes[0].name} {changes[0].what}{more}"


def quoted(name: str) -> str:
    """A name as one word of a shell, in quotes whatever it is: it stands for a glob."""
    return "'" + name.replace("'", "'\"'\"'") + "'"


def _mixed_runs(
    before: Snapshot, after: Snapshot, changes: Sequence[_Change], choice: _Choice, since: str = ""
) -> MixedRunsError:
    where, told = f"{before.path} to {after.path.name}", _told([_Change(repr(c.name), c.what) for c in changes])
    if not _is_one_model(before, after, choice):
        return MixedRunsError(
            f"{where}: two models: less than half of the parameters are in both: {told}",
            hint="keep one run in the folder, or choose its steps with --steps FROM:TO",
        )
    names = " ".join(f"--exclude {quoted(change.name)}" for change in changes[:MAX_NAMED]) + " ..." * (len(changes) > MAX_NAMED)
    return MixedRunsError(
        f"{where}: tensor {told}{since}",
        hint=f"{names} copies {'it' if len(changes) == 1 else 'them'} from the last snapshot and uses the whole history;"
        " --steps FROM:TO selects a part of the run",
    )


def _rows_in_order(snapshots: Sequence[Snapshot]) -> dict[str, Row]:
    """The tensors of snapshots that all have the same ones in the same order."""
    rows = zip(*(snapshot.tensors.values() for snapshot in snapshots), strict=True)
    return dict(zip(_tensors(snapshots[-1]), rows, strict=True))


def _rows_by_name(snapshots: Sequence[Snapshot], choice: _Choice) -> dict[str, Row]:
    """The tensors that the last snapshot has, as each snapshot has them.

    Raises:
        MixedRunsError: what is forecast of them differs.
    """
    named = [_Named.of(snapshot, choice) for snapshot in snapshots]
    for before in named[:-1]:
        if changes := _changes(before, named[-1], choice):
            raise _mixed_runs(before.snapshot, snapshots[-1], changes, choice)
    return {key: tuple(one.tensors.get(key) for one in named) for key in named[-1].tensors}


def _changed(rows: Mapping[str, Row], snapshots: Sequence[Snapshot]) -> dict[str, Copied]:
    """The tensors that came or changed their shape."""
    found = {key: _how_changed(row, snapshots) for key, row in rows.items()}
    return {key: copied for key, copied in found.items() if copied}


def _how_changed(found: Row, snapshots: Sequence[Snapshot]) -> Copied | None:
    """Why a tensor that came, or changed its shape, is copied; a kept snapshot lacks what is copied anyway."""
    name = _name_of(found)
    seen = [
        (_shape(entry) if entry else None, one.step)
        for entry, one in zip(found, snapshots, strict=True)
        if entry or not one.source
    ]
    if any(shape is None for shape, _ in seen):
        return Copied(name, "not in every snapshot")
    steps = [step for (before, _), (after, step) in pairwise(seen) if before != after]
    return Copied(name, f"changed its shape at step {steps[-1]}") if steps else None


def _reordered(rows: Mapping[str, Row]) -> dict[str, Copied]:
    """The tensors whose elements do not lie in the same order everywhere."""
    return {key: Copied(_name_of(row), _SCATTERED) for key, row in rows.items() if len({one.strides for one in row if one}) > 1}


def _name_of(row: Row) -> str:
    """As the last snapshot calls a tensor."""
    return next(entry.name for entry in reversed(row) if entry)


@lru_cache(maxsize=64)
def _remark(types: tuple[str, ...], parts: str, steps: tuple[int, ...]) -> str:
    """A complex type, of pairs of `parts`, or one that changed: `float32, bfloat16 from step 500 on`."""
    changes = [(name, next(pairs)[1]) for name, pairs in groupby(zip(types, steps, strict=True), key=itemgetter(0))]
    told = ", ".join([types[0], *(f"{name} from step {step} on" for name, step in changes[1:])])
    if parts != types[-1]:
        return f"{told}, as pairs of {parts}"
    return told if len(changes) > 1 else ""
