"""A MosaicML Composer checkpoint, `ep5-ba160-rank0.pt`: everything lies under `state`, and `timestamp` counts.

A step is a batch: Composer steps its optimizers once for each. Its timestamp counts batches, samples and tokens over the run
and since the epoch began. On resuming it spins the data loader to where the timestamp stands, in mid-epoch too; so the counts
within the epoch must be right, and a horizon need not end on an epoch. The payload does not hold `max_duration`.

Source: composer/core/state.py, `state_dict`; composer/core/time.py, `Timestamp`; composer/trainer/trainer.py, `_train_loop`, 0.32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import NoWeightsError, UnsafeFileError
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import iter_tensors
from farcast_cli.formats.tree import at, find
from farcast_cli.trainers.base import Evidence, Layout, Network, Part, Snapshot, Trainer, holds_text, name_evidence, weights_of
from farcast_cli.trainers.by_content import TORCH_ENDINGS, is_torch
from farcast_cli.trainers.names import MAX_DIGITS
from farcast_cli.trainers.torch_payload import adam_evidence, other_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath

    Counts = dict[str, Any]

MARK = "composer_env_info"
WEIGHTS = ("state", "model")
_STAMP = ("state", "timestamp", "Timestamp")
_DATA = ("state", "dataset_state")
_OVER_RUN = ("epoch", "batch", "sample")
_IN_EPOCH = ("batch_in_epoch", "sample_in_epoch")
_WEIGHTS_ONLY = "saved with the weights only: Composer can load it only with load_weights_only=True"


def _recognises(path: Path) -> bool:
    """By its content: users name their files, and only Composer writes its environment into one."""
    if path.suffix in TORCH_ENDINGS - {".pt"} or not is_torch(path):
        return False
    try:
        return holds_text(path, MARK)
    except UnsafeFileError:
        return False  # to be refused as any torch file is


def _read(path: Path) -> Snapshot:
    file = read_torch_file(path)
    state, weights = find(file.tree, WEIGHTS[:1]), find(file.tree, WEIGHTS)
    if not isinstance(state, dict) or not any(True for _ in iter_tensors(weights)):
        raise NoWeightsError(f"{path}: a Composer checkpoint whose {'.'.join(WEIGHTS)!r} holds no tensors")
    tensors, rough = weights_of(file, weights)
    optimizers = {key: value for key, value in state.items() if key == "optimizers"}
    others = {key: value for key, value in state.items() if key != "optimizers"}
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "state", file, networks=(Network(WEIGHTS),)),),
        tensors,
        (*_batch(file.tree), *adam_evidence(file, optimizers.get("optimizers")), *name_evidence(path)),
        not_streamable=rough,
        beside=tuple(other_weights(others, WEIGHTS[1:])),
        notes=() if _stamp(file.tree) and optimizers else (_WEIGHTS_ONLY,),
    )


def _batch(tree: object) -> tuple[Evidence, ...]:
    batch = _stamp(tree).get("batch")
    return (Evidence("trainer state", "timestamp batch", batch),) if batch is not None and 0 <= batch < 10**MAX_DIGITS else ()


def _stamp(tree: Any) -> Counts:
    """The timestamp's counts; none where they are not laid out as Composer does it."""
    stamp = find(tree, _STAMP) or {}
    counts = {key: value for key, value in stamp.items() if isinstance(value, int) and not isinstance(value, bool)}
    return counts if counts.keys() >= {*_OVER_RUN, *_IN_EPOCH} else {}


# --- the clock -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Epochs:
    """How a run goes through its data. What the timestamps do not tell is None."""

    batches: int | None
    samples: int | None
    """Of an epoch."""
    batch_size: int | None
    """Samples of every batch but the last of an epoch, which may be smaller."""
    tokens: int | Fraction | None
    """Of a sample, where all samples have as many."""
    is_at_ends: bool
    """Whether the origin was saved behind its epoch, and not behind its last batch."""

    def place_after(self, origin: Counts, horizon: int) -> tuple[int, int]:
        """The epoch and the batch within it, so many batches on."""
        epoch, batch = origin["epoch"], origin["batch_in_epoch"] + horizon
        if not self.batches:
            return epoch, batch
        ended = batch // self.batches if self.is_at_ends else (batch - 1) // self.batches
        return epoch + ended, batch - ended * self.batches

    def samples_into(self, batch: int) -> int | None:
        """Samples of an epoch up to a batch."""
        if batch in {0, self.batches}:
            return self.samples if batch else 0
        return None if self.batch_size is None else batch * self.batch_size


def read_epochs(stamps: Sequence[Counts]) -> Epochs:
    """How a run goes through its data, by its timestamps, the origin last."""
    origin = stamps[-1]
    batches, samples = _each(stamps, "batch"), _each(stamps, "sample")
    return Epochs(batches, samples, _batch_size(stamps, batches, samples), _tokens(stamps), origin["batch_in_epoch"] == 0)


def _each(stamps: Sequence[Counts], what: str) -> int | None:
    """Batches or samples of an epoch, alike in all epochs that have ended."""
    sizes = {
        Fraction(one[what] - one[f"{what}_in_epoch"], one["epoch"]) for one in stamps if one["epoch"]
    }  # a snapshot behind the first epoch tells
    size = sizes.pop() if len(sizes) == 1 else Fraction(0)
    return int(size) if size > 0 and size.denominator == 1 else None


def _batch_size(stamps: Sequence[Counts], batches: int | None, samples: int | None) -> int | None:
    """Samples of a batch: as seen in mid-epoch, else the one size that makes as many batches of an epoch's samples."""
    seen = {
        Fraction(one["sample_in_epoch"], one["batch_in_epoch"])
        for one in stamps
        if one["batch_in_epoch"] and one["batch_in_epoch"] != batches
    }
    if not seen and batches and samples:
        first = -(-samples // batches)
        seen = {Fraction(size) for size in (first, first + 1) if -(-samples // size) == batches}
    size = seen.pop() if len(seen) == 1 else Fraction(0)
    return int(size) if size > 0 and size.denominator == 1 else None


def _tokens(stamps: Sequence[Counts]) -> int | Fraction | None:
    rates = {Fraction(one.get("token", 0), one["sample"]) for one in stamps if one["sample"]}
    return rates.pop() if len(rates) == 1 else None


@dataclass(frozen=True, slots=True)
class TimestampClock:
    """From the origin's timestamp to the valid step's."""

    epochs: Epochs
    origin: Counts
    horizon: int

    paths = (_STAMP, _DATA)
    epoch_ends = ()  # Composer goes on in mid-epoch

    @property
    def place(self) -> tuple[int, int]:
        return self.epochs.place_after(self.origin, self.horizon)

    def counts(self) -> Counts:
        """The timestamp's counts at the valid step, of those that are known."""
        epoch, batch = self.place
        new = {"epoch": epoch, "batch": self.origin["batch"] + self.horizon, "batch_in_epoch": batch}
        ended, begun = epoch - self.origin["epoch"], self.epochs.samples_into(batch)
        if begun is not None and (self.epochs.samples is not None or not ended):
            moved = ended * (self.epochs.samples or 0) + begun - self.origin["sample_in_epoch"]
            new |= {"sample": self.origin["sample"] + moved, "sample_in_epoch": begun}
            if self.epochs.tokens is not None:
                tokens = (self.epochs.tokens * count for count in (new["sample"], begun))
                new |= {key: int(count) for key, count in zip(("token", "token_in_epoch"), tokens, strict=True)}
        if not self.origin.get("iteration"):  # which nobody has told Composer the length of
            within = {"epoch_in_iteration": "epoch", "token_in_iteration": "token"}
            new |= {key: new[of] for key, of in within.items() if of in new}
        return {key: value for key, value in new.items() if key in self.origin}

    def move(self, tree: Any) -> list[tuple[str, int, int]]:
        """Set the counts; the times by the clock on the wall stay."""
        stamp, new = at(tree, _STAMP), self.counts()
        changes = [(f"timestamp.{key}", stamp[key], value) for key, value in new.items() if stamp[key] != value]
        stamp.update(new)
        return changes

    def notes(self, _: str, tree: Any) -> Iterator[str]:
        """What is not known, and stays."""
        if self.epochs.batches is None:
            yield (
                "timestamp: no snapshot tells how many batches an epoch has: the present one counts as not ended at step"
                f" {self.origin['batch'] + self.horizon}"
            )
        if left := sorted(self.origin.keys() - self.counts().keys() - {"iteration"}):
            yield f"timestamp: {', '.join(left)} stay at the origin's values: the snapshots do not show how they rise"
        if (tree["state"].get(_DATA[-1]) or {}).get("train"):
            yield "dataset_state: the data loader's state stays at the origin, so the data continues from there"

    def schedule_count(self, _: TreePath) -> None:
        """By its own rate: Composer steps its schedules with the batches, or with the epochs."""
        return

    def optimizer_count(self, _: float) -> None:
        """By its own rate."""
        return


def _clock(states: Sequence[tuple[int, Any]], target: int) -> TimestampClock | None:
    stamps = [stamp for _, tree in states if (stamp := _stamp(tree))]
    origin = _stamp(states[-1][1])
    return TimestampClock(read_epochs(stamps), origin, target - states[-1][0]) if origin else None


def _rename(name: str, tree: object, horizon: int) -> str:
    """A name that tells an epoch beside the batch, `ep3-ba60-rank0.pt`, with the later one, as wide as before."""
    stamp = _stamp(tree)
    epochs = read_epochs([stamp]) if stamp else None
    if epochs is None or epochs.batches is None:
        return name
    epoch, _ = epochs.place_after(stamp, horizon)
    return re.sub(r"(?<![a-z])ep(\d+)(?=[-_])", lambda old: f"ep{epoch:0{len(old[1])}}", name)


def _wrote(tree: object) -> bool:
    return bool(_stamp(tree))


TRAINER = Trainer(
    wrote=_wrote,
    clock=_clock,
    rename=_rename,
    needs_optimizer="Composer cannot load a checkpoint without optimizers",
)
LAYOUT = Layout("composer", _recognises, _read, names_are_steps=False, trainer=TRAINER)
