"""The epoch as the unit of a run: what names and files tell of it, for runs of whose steps nothing tells."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from farcast_cli.errors import StepConflictError
from farcast_cli.trainers.base import Evidence, Snapshot, is_step, tree_of
from farcast_cli.trainers.names import find_epoch_in_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import EvidenceKind

_COUNTED: tuple[EvidenceKind, ...] = ("trainer state", "payload", "adam step", "metadata")
"""Evidence that a trainer counted itself; a number in a name may count anything."""


def in_epochs(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots with the evidence for their epochs in place of that for their steps."""
    return [replace(one, evidence=tuple(_evidence(one)), unit="epoch") for one in snapshots]


def _evidence(snapshot: Snapshot) -> Iterator[Evidence]:
    epoch, found = epoch_in(snapshot), find_epoch_in_name(snapshot.path.name)
    if epoch is not None:
        yield Evidence("payload", "epoch", epoch)
    if found:
        yield Evidence("name", snapshot.path.name, int(found[1]))
    elif epoch is None:  # a number without a word may be that of the epoch
        yield from (item for item in snapshot.evidence if item.source == "name")


def epoch_in(snapshot: Snapshot) -> int | None:
    """The epoch at the top of a payload."""
    trees = (tree_of(part) for part in snapshot.parts if part.role == "state")
    found = next((tree.get("epoch") for tree in trees if isinstance(tree, dict)), None)
    return found if is_step(found) else None


def known_steps(snapshots: Sequence[Snapshot], directory: Path) -> StepConflictError | None:
    """The conflict of a run that counts its steps, which tell more than its epochs.

    A count counts if every snapshot has it and it rises with the epochs.

    Args:
        snapshots: with the evidence for their steps.
    """
    epochs = [one.evidence[0].step if one.evidence else -1 for one in in_epochs(snapshots)]
    ordered = [snapshot for _, snapshot in sorted(zip(epochs, snapshots, strict=True), key=lambda pair: pair[0])]
    for kind in _COUNTED:
        items = [next((item for item in one.evidence if item.source == kind), None) for one in ordered]
        steps = [item.step for item in items if item]
        if len(steps) == len(snapshots) > 1 and all(early < late for early, late in pairwise(steps)):
            where = items[0].where if items[0] else kind
            return StepConflictError(
                f"{directory}: --unit epoch: the snapshots contain their steps, {where} = {steps[0]} to {steps[-1]}",
                hint="leave --unit out: a forecast in steps moves every counter exactly, the epochs too",
            )
    return None
