"""What `Accelerator.save_state` writes: model.safetensors, optimizer.bin, scheduler.bin, random_states_0.pkl, the rest.

Everything that training needs lies in files of their own, numbered where there are several: model_1.safetensors,
optimizer_1.bin. Nothing says the step but the optimiser's own count; `checkpoint_3` is the third save, not a step.
Source: accelerate/checkpointing.py, `save_accelerator_state`; accelerate/accelerator.py, `save_state`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from farcast_cli.errors import NoWeightsError
from farcast_cli.trainers.averages import is_average, with_averages
from farcast_cli.trainers.base import ADAPTER_FILES, WEIGHT_FILES, Layout, Snapshot, Trainer, find_weights
from farcast_cli.trainers.deepspeed import counted, read_states, states_in
from farcast_cli.trainers.fsdp import has_fsdp, read_fsdp
from farcast_cli.trainers.run_end import end_by_schedules
from farcast_cli.trainers.side_files import adam_steps, beside, by_trust, named_steps, scheduled_steps, side_parts
from farcast_cli.trainers.weights_folder import WeightFile, Weights, read_weights

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.trainers.base import Evidence, Part

_MODEL = re.compile(r"(?:pytorch_)?model_(\d+)\.(?:safetensors|bin)")
_HOOKED = ("pytorch_lora_weights.safetensors", *ADAPTER_FILES)
"""What the save hooks of diffusers' and PEFT's scripts write in place of model.safetensors."""


def _recognises(path: Path) -> bool:
    return path.is_dir() and ((path / "optimizer.bin").is_file() or any(path.glob("random_states_*.pkl")) or has_fsdp(path))


def _sources(path: Path) -> list[WeightFile]:
    """Every model of the run: numbered files; else what a save hook wrote, into the folder or into one for each model."""
    first = find_weights(path, (*WEIGHT_FILES, *_HOOKED))
    if first:
        return [WeightFile(first), *_further_models(path)]
    models = [folder for folder in sorted(path.iterdir()) if not is_average(folder)]
    inner = [(find_weights(folder, (*WEIGHT_FILES, *_HOOKED)), folder.name) for folder in models]
    return [WeightFile(file, f"{name}.") for file, name in inner if file]


def _further_models(path: Path) -> list[WeightFile]:
    """The second model and those after it, as safetensors where both forms are there."""
    numbers = sorted({int(found[1]) for file in path.iterdir() if (found := _MODEL.fullmatch(file.name))})
    files = [find_weights(path, (f"model_{n}.safetensors", f"pytorch_model_{n}.bin")) for n in numbers]
    return [WeightFile(file, f"model_{n}.") for file, n in zip(files, numbers, strict=True) if file]


def _read(path: Path) -> Snapshot:
    weights = _weights(path)
    if not weights.tensors:
        raise NoWeightsError(
            f"{path}: an accelerate save_state folder without a model's weights: expected model.safetensors",
            hint="farcast does not find weights under another name (a save hook?): save them under the usual name",
        )
    others, notes = side_parts(path, weights.parts)
    averages = with_averages(path, others, weights)
    others = averages.parts
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights.parts, *others),
        weights.tensors,
        _evidence(path, (*weights.parts, *others)),
        not_streamable=weights.rough,
        beside=(*beside(others), *averages.beside),
        notes=(*notes, *averages.notes),
    )


def _weights(path: Path) -> Weights:
    if has_fsdp(path):
        return read_fsdp(path)
    return read_states(path) if states_in(path) else read_weights(path, _sources(path))


def _evidence(path: Path, others: tuple[Part, ...]) -> tuple[Evidence, ...]:
    """Adam's count, or a name that says `step`; where there is neither, the schedule's count, then the save's number."""
    engine = tuple(counted(others)) if states_in(path) else ()
    return engine or by_trust(adam_steps(others), named_steps(path, glued=True)) or scheduled_steps(others) or named_steps(path)


TRAINER = Trainer(
    end=end_by_schedules, needs_optimizer="accelerate cannot load a checkpoint with a missing file", loads_shards=False
)
LAYOUT = Layout("accelerate", _recognises, _read, names_are_steps=False, trainer=TRAINER)
