"""A folder whose weights are a torch file of a usual name, litgpt's `step-00000500/lit_model.pth` and its kin, or its only one.

The file holds the weights and the state of the loop (litgpt, Fabric), or bare weights with the state in torch files
beside it, as OLMo's `model.pt`, `optim.pt` and `train.pt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.errors import NoWeightsError
from farcast_cli.trainers import torch_payload
from farcast_cli.trainers.base import Layout, Snapshot, Trainer
from farcast_cli.trainers.by_content import lone_file
from farcast_cli.trainers.run_end import end_of
from farcast_cli.trainers.side_files import adam_steps, beside, by_trust, counted_steps, named_steps, side_parts
from farcast_cli.trainers.weights_folder import Weights, as_one

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import Evidence, EvidenceKind

NAMES = (
    *("lit_model.pth", "lit_model.pth.lora"),
    *("checkpoint.pt", "checkpoint.pth", "ckpt.pt", "ckpt.pth"),
    *("model.pt", "model.pth", "pytorch_model.pt", "weights.pt", "weights.pth", "consolidated.00.pth"),
)
"""Files that may hold the weights; the first that does is the snapshot's."""


def _recognises(path: Path) -> bool:
    return path.is_dir() and bool(_sources(path))


def _sources(path: Path) -> list[Path]:
    """The files that may hold the weights."""
    usual = [path / name for name in NAMES if (path / name).is_file()]
    alone = None if usual else lone_file(path, "torch")
    return [alone] if alone else usual


def _read(path: Path, chosen: Sequence[str] = ()) -> Snapshot:
    layout = torch_payload.LAYOUT.choosing(chosen)
    payload = _payload(path, layout)
    ranks = sorted(path.glob("consolidated.*.pth")) if payload.path.name.startswith("consolidated.") else [payload.path]
    inner = [payload, *(layout.read(file) for file in ranks if file != payload.path)]
    weights = as_one(path, (_weights(one, path, f"{rank}." if rank else "") for rank, one in enumerate(inner)))
    others, notes = side_parts(path, weights.parts)
    name = named_steps(path)
    counted = _of("payload", payload) or counted_steps(others, name)
    adam = _of("adam step", payload) or adam_steps(others)
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights.parts, *others),
        weights.tensors,
        (*counted, *by_trust(adam, name)),
        not_streamable=weights.rough,
        beside=(*payload.beside, *beside(others)),
        notes=notes,
    )


def _payload(path: Path, layout: Layout) -> Snapshot:
    """The first file that holds weights, as the snapshot that it would be by itself."""
    without: list[NoWeightsError] = []
    for file in _sources(path):
        try:
            return layout.read(file)
        except NoWeightsError as error:
            without.append(error)
    raise without[0]


def _weights(one: Snapshot, folder: Path, prefix: str) -> Weights:
    found = Weights(one.parts, dict(one.tensors), one.not_streamable)
    return found.under(prefix, folder)


def _of(source: EvidenceKind, payload: Snapshot) -> tuple[Evidence, ...]:
    return tuple(item for item in payload.evidence if item.source == source)


LAYOUT = Layout("torch-folder", _recognises, _read, names_are_steps=False, trainer=Trainer(end=end_of), read_chosen=_read)
