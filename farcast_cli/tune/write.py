"""Writing a tuned checkpoint or the delta alone, and reading back what was written before it is published.

Rounding can undo a tuning: a change far below a weight's last digit does not survive the nearest bfloat16. So what was
written is read again, and the losses are computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.checkpoint.pieces import Rewrite
from farcast_cli.checkpoint.plan import plan_outputs, with_modes
from farcast_cli.engine.batch import Inputs
from farcast_cli.engine.linear import LinearMap
from farcast_cli.engine.reader import Resources
from farcast_cli.engine.write import Engine, write_forecasts
from farcast_cli.errors import OutputError, UsageError, shell_word
from farcast_cli.files.place import check_place, check_sidecar_ours, sidecar_of
from farcast_cli.files.staged import staging
from farcast_cli.run.alignment import Alignment
from farcast_cli.run.trajectory import open_snapshot, run_of
from farcast_cli.sidecar import files_of, write_sidecar
from farcast_cli.state.advance import advance, told_as_damage
from farcast_cli.tune.delta import maps_of
from farcast_cli.tune.weight import find_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.checkpoint.pieces import OutputFile, ValueMap
    from farcast_cli.records import TuneSidecar
    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.delta import Delta, Rounded
    from farcast_cli.tune.record import Place
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

ROUNDING_SHARE = 0.05
"""Of what a tuning gained, that rounding may take. float32 takes some 1e-6 of it; bfloat16 took 10 % where it did harm."""


def check_place_of(place: Place, snapshot: Snapshot) -> None:
    """See that an output may be written at a place, or is there already, and that its name ends as it should.

    Raises:
        UsageError: it is the checkpoint, lies inside it, or its name ends otherwise.
        OutputError: it lies in the checkpoint's run, or something lies there that is no such output.
    """
    path, option = place.path, place.option
    real, own = path.resolve(), snapshot.path.resolve()
    if real == own or real.is_relative_to(own):
        where = "is the checkpoint itself" if real == own else f"lies inside the checkpoint {snapshot.path}"
        raise UsageError(f"{option} {path}: {where}", hint="farcast never changes its input: choose another place")
    has_sidecar = place.is_file and not place.is_delta
    check_place(path, run=run_of(snapshot), existing=place.check_record, has_sidecar_beside=has_sidecar, option=option)
    ending = ".safetensors" if place.is_delta else snapshot.path.suffix if place.is_file else ""
    if not path.name.endswith(ending):
        raise UsageError(
            f"{option} {path}: expected a name that ends in {ending}", hint=f"{option} {shell_word(f'{path}{ending}')}"
        )


@dataclass(frozen=True, slots=True)
class Writing:
    """Where and how a checkpoint is written, and what must hold before it is published."""

    place: Place
    rounded: Rounded
    about: TuneSidecar
    """The provenance, but for the files."""
    check: Callable[[Sequence[Weight]], None]
    """Raises where the layers, as they were written, are not what they should be."""
    num_threads: int = 1


def write_tuned(
    snapshot: Snapshot,
    changes: Sequence[tuple[Weight, Delta]],
    writing: Writing,
    progress: Callable[[str, int], Callable[[int], None]],
) -> tuple[int, int]:
    """Write the checkpoint with some layers changed; publish it when they have been read back and seen to be right.

    Returns:
        the bytes that were read and written.
    """
    maps: dict[str, ValueMap] = {}
    for weight, delta in changes:
        maps |= maps_of(delta, weight, writing.rounded)
    with told_as_damage(snapshot):
        moved = advance([snapshot], 0, optimizer="copy", counters="keep")
    plan = with_modes(plan_outputs(snapshot, moved, Rewrite({}, mapped=maps)), snapshot)
    told = progress("write", sum(output.num_bytes for output in plan))
    with staging() as outputs:
        hidden = outputs.add(writing.place.path, check=writing.place.check)
        beside = None
        if snapshot.path.is_file():
            beside = outputs.add(sidecar_of(writing.place.path, is_file=True), check=check_sidecar_ours)
        num_read, num_written = _write_plan(plan, hidden, num_threads=writing.num_threads, told=told)
        again = open_snapshot(hidden)
        layers = [find_weight(again, one.name, one.bias_name, is_transposed=one.is_transposed) for one, _ in changes]
        writing.check(layers)
        write_sidecar(hidden, beside, writing.about.model_copy(update={"files": files_of(hidden)}))
    return num_read + sum(layer.bytes_read for layer in layers), num_written


def _write_plan(plan: Sequence[OutputFile], place: Path, *, num_threads: int, told: Callable[[int], None]) -> tuple[int, int]:
    """One pass of the engine over a plan without forecast tensors."""
    nothing = LinearMap(np.zeros((1, 0, 1)), np.zeros((1, 0)), np.zeros((1, 0)), 0)
    engine = Engine(Inputs(Alignment((), ()), nothing), Resources(num_workers=num_threads))
    tally = write_forecasts([plan], [place], engine, progress=told)
    return tally.bytes_read, tally.bytes_written


def check_kept(losses: tuple[Array, Array, Array], shares: Array, what: str) -> None:
    """See that the losses of some rows, as written, are what they should be.

    Args:
        losses: before, as they should be, and as written, (n,) each.
        shares: (n,) the rows' weights, which sum to 1.

    Raises:
        OutputError: rounding took more than a share of the gain.
    """
    before, expected, found = (float(one @ shares) for one in losses)
    if not found - expected <= ROUNDING_SHARE * max(before - expected, 0.0):
        raise _rounded_away(f"loss of the {what} rows {before:.4g} -> {expected:.4g}, but {found:.4g} as it would be written")


def check_moved(base: Array, expected: Array, found: Array, name: str) -> None:
    """The same where no losses are known: of the change of the pre-activations, squared, as a quadratic loss sees it."""
    size = float(np.linalg.norm(expected - base))
    share = float(np.linalg.norm(found - expected)) / size if size else 0.0
    if not share**2 <= ROUNDING_SHARE:
        raise _rounded_away(f"{name}: rounding changes the outputs by {share:.0%} of what the tuning does")


def _rounded_away(what: str) -> OutputError:
    return OutputError(
        f"nothing written: rounding to the stored type loses the change: {what}",
        hint="--round stochastic keeps its mean; --delta-out FILE keeps the change in a separate file",
    )
