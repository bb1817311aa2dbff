"""torch.distributed.checkpoint folders, as FSDP trainers and torchtitan write them: `step-1000/` with `.metadata`.

Lightning and Fabric put all but the weights and the optimizer into a torch file beside it, meta.pt. OLMo and loops of one's
own put one or more such folders into the snapshot's: `step1000/model_and_optim/`, `step_1000/model/` and `step_1000/optim/`.

Source: torch/distributed/checkpoint; pytorch/torchtitan, components/checkpoint.py, for the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.errors import NoWeightsError
from farcast_cli.formats.dcp_file import DcpFile, read_dcp
from farcast_cli.formats.tree import at
from farcast_cli.trainers.base import Layout, Snapshot, name_evidence
from farcast_cli.trainers.dcp_parts import inner_checkpoints, is_dcp, parts_of, weights_in_dcp
from farcast_cli.trainers.fsdp import has_fsdp
from farcast_cli.trainers.side_files import beside, counted_steps, side_parts
from farcast_cli.trainers.torch_payload import adam_evidence, payload_evidence
from farcast_cli.trainers.weights_folder import Weights, as_one

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import Evidence, Part
    from farcast_cli.trainers.networks import Networks


def _recognises(path: Path) -> bool:
    return is_dcp(path) or (path.is_dir() and not has_fsdp(path) and bool(inner_checkpoints(path)))


def _read(path: Path, chosen: Sequence[str] = ()) -> Snapshot:
    found = [read_dcp(folder) for folder in ([path] if is_dcp(path) else inner_checkpoints(path))]
    read = [_with_weights(one, path, chosen, alone=len(found) == 1) for one in found]
    weights = as_one(path, (one for one, _ in read))
    others, notes = side_parts(path, weights.parts)
    name = name_evidence(path)
    counted = tuple(item for one in found for item in payload_evidence(one.as_torch.tree, one.as_torch))[:1]
    told = (one for _, networks in read if networks for one in networks.told)
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights.parts, *others),
        weights.tensors,
        (*(counted or counted_steps(others, name)), *_adam(weights.parts), *name),
        not_streamable=weights.rough,
        beside=(*told, *beside(others)),
        notes=notes,
    )


def _with_weights(found: DcpFile, path: Path, chosen: Sequence[str], *, alone: bool) -> tuple[Weights, Networks | None]:
    """A checkpoint of the snapshot's; one without weights holds the optimizer, if it is not the only one."""
    is_optimizer = found.folder.name.startswith("optim")
    try:
        if alone or not is_optimizer:
            return weights_in_dcp(found, path, chosen=chosen)
    except NoWeightsError:
        if alone:
            raise
    return Weights(parts_of(found, path, "optimizer" if is_optimizer else "side-state"), {}), None


def _adam(parts: tuple[Part, ...]) -> tuple[Evidence, ...]:
    """The step as an optimizer has counted it, beside the weights or in a checkpoint of its own."""
    trees = ((part, part.content.as_torch) for part in parts if isinstance(part.content, DcpFile))
    found = (adam_evidence(file, at(file.tree, part.networks[0].path[:-1])) for part, file in trees)
    return next((item for item in found if item), ())


LAYOUT = Layout("dcp", _recognises, _read, read_chosen=_read)
