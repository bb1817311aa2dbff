"""Which tensors the snapshots of a run share: what can be forecast, and what is copied and why.

Knows how names are matched between snapshots, and which tensors lie in the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from farcast_cli.errors import MixedRunsError, SnapshotError
from farcast_cli.tensors import FORECASTABLE, TensorEntry, canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from farcast_cli.layouts.base import Snapshot


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """A tensor that all snapshots share; `entries[t]` is where snapshot t holds it."""

    name: str
    entries: tuple[TensorEntry, ...]

    @property
    def num_elements(self) -> int:
        return self.entries[-1].num_elements


@dataclass(frozen=True, slots=True)
class Copied:
    """A tensor that is taken over from the last snapshot unchanged, and why."""

    name: str
    reason: str


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

    Tensors that are not of a floating type, are empty, or that `include` and `exclude` (globs) leave out are copied.

    Raises:
        MixedRunsError: names or shapes differ between snapshots.
    """
    origin = snapshots[-1]
    by_name = [_by_canonical_name(snapshot) for snapshot in snapshots]
    names = {key: entry.name for key, entry in by_name[-1].items()}
    for snapshot, tensors in zip(snapshots, by_name, strict=True):
        _check_same_model(snapshot, tensors.keys(), origin, names.keys())
    aligned: list[AlignedTensor] = []
    copied: list[Copied] = []
    shared = _memory_groups(origin.tensors.values())
    for key, name in names.items():
        entries = tuple(tensors_of[key] for tensors_of in by_name)
        group = shared[name]
        reason = _reason_by_group(entries[-1], group, include, exclude) or _reason_to_copy(entries, origin)
        if reason:
            copied.append(Copied(name, reason))
        else:
            _check_shapes(name, entries, snapshots)
            aligned.append(AlignedTensor(name, entries))
    copied += [Copied(*item) for item in origin.beside]
    if not aligned:
        raise SnapshotError(
            f"{origin.path}: nothing to forecast: all {len(copied)} tensors are copied ({copied[0].reason})"
            if copied
            else f"{origin.path}: it holds no tensors",
            hint="loosen --include and --exclude" if include or exclude else "",
        )
    return Alignment(tuple(aligned), tuple(copied))


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
    """Every tensor's group, by name; most are alone in theirs."""
    groups: list[list[TensorEntry]] = []
    end = 0
    for entry in sorted(entries, key=lambda e: (str(e.path), e.offset, -e.num_bytes)):
        if groups and groups[-1][0].path == entry.path and entry.offset < end and entry.num_bytes:
            groups[-1].append(entry)
            end = max(end, entry.offset + entry.num_bytes)
        else:
            groups.append([entry])
            end = entry.offset + entry.num_bytes
    return {entry.name: group for members in groups for group in [_MemoryGroup(tuple(members))] for entry in members}


def _reason_by_group(entry: TensorEntry, group: _MemoryGroup, include: Sequence[str], exclude: Sequence[str]) -> str:
    """Why a tensor is not forecast by itself, from what the user chose and from whom it shares its memory with."""
    if _matches(entry.name, exclude):
        return "excluded"
    left_out = next((member.name for member in group.members if _matches(member.name, exclude)), None)
    if left_out:
        return f"tied to {left_out}, which is excluded"
    if include and not any(_matches(member.name, include) for member in group.members):
        return "not included"
    owner = group.owner
    if owner is None:
        other = next(member.name for member in group.members if member.name != entry.name)
        return f"shares part of its memory with {other}"
    if owner.name != entry.name:
        return f"tied to {owner.name}" if owner.num_bytes == entry.num_bytes else f"part of {owner.name}"
    return ""


def _by_canonical_name(snapshot: Snapshot) -> dict[str, TensorEntry]:
    """Tensors under names without wrappers' prefixes; under their own where that would make two the same."""
    found = {canonical_name(name): entry for name, entry in snapshot.tensors.items()}
    return found if len(found) == len(snapshot.tensors) else dict(snapshot.tensors)


def _check_same_model(snapshot: Snapshot, names: object, origin: Snapshot, expected: object) -> None:
    if names == expected:
        return
    odd = sorted(set(names) ^ set(expected))  # type: ignore[call-overload]
    has, lacks = (snapshot, origin) if odd[0] in set(names) else (origin, snapshot)  # type: ignore[call-overload]
    raise MixedRunsError(
        f"{lacks.path}: {len(odd)} tensors differ from {has.path.name}'s: expected {odd[0]!r}, found no such tensor",
        hint="these are two models: keep one run in the folder, or choose its steps with --steps A:B",
    )


def _check_shapes(name: str, entries: Sequence[TensorEntry], snapshots: Sequence[Snapshot]) -> None:
    expected = entries[-1].shape
    for entry, snapshot in zip(entries, snapshots, strict=True):
        if entry.shape != expected:
            raise MixedRunsError(
                f"{snapshot.path}: tensor {name!r} has shape {list(entry.shape)}, expected {list(expected)}"
                f" as in {snapshots[-1].path.name}",
                hint=f"--exclude '{name}' copies it from the last snapshot; --steps A:B takes the later part of the run",
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _reason_to_copy(entries: Sequence[TensorEntry], origin: Snapshot) -> str:
    """Why a tensor's values cannot be forecast."""
    for entry in entries:
        if entry.dtype.name not in FORECASTABLE:
            return f"{entry.dtype.name} is not forecast"
    if not entries[-1].num_elements:
        return "empty"
    if entries[-1].name in origin.not_streamable or len({entry.strides for entry in entries}) > 1:
        return "not stored as one stretch in the same order in every snapshot"
    return ""
