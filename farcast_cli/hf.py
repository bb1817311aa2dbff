"""Leaps in a Hugging Face Trainer: `trainer.add_callback(LeapCallback(trainer))`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from farcast_cli.live.leaps import Leaps
from farcast_cli.live.weights import LiveModel, refuse_shards, sharded
from farcast_cli.trainers.hf_trainer import MARK, marks_in

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from farcast_cli.live.leaps import Landed

_REASON = "farcast_reason"


class LeapCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Leaps after the Trainer's saves. Weights move ahead; the step, the schedule and the optimizer's state stay.

    The Trainer logs the figures of each call. The entry of a leap in its log is the mark of the leap, which all later
    checkpoints carry on.

    Args:
        trainer: logs the figures, and knows how its weights are spread over processes.
        options: those of `Leaps`. With `every=N`, the Trainer saves at each multiple of N steps, and a leap follows.

    Example:
        trainer.add_callback(LeapCallback(trainer, every=200))
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        self._trainer: Any = trainer
        self._leaps = Leaps(**options)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._refuse()
        run = Path(args.output_dir or "")
        self._log(self._leaps.after_resume(self._live(), run, state.global_step, marks_in(state.log_history)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if self._leaps.every is not None and self._leaps.is_due(state.global_step):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if self._leaps.is_due(state.global_step):
            run, num_steps = Path(args.output_dir or ""), state.max_steps
            self._log(self._leaps.after_save(self._live(), run, state.global_step, num_steps=num_steps))

    def _refuse(self) -> None:
        """Refuse weights that no process has as a whole.

        Raises:
            UsageError: they are in shards.
        """
        trainer = self._trainer
        for name in ("deepspeed", "fsdp", "fsdp_xla", "tp"):
            if getattr(trainer, f"is_{name}_enabled", False):
                raise sharded(f"a Trainer with {name}")
        refuse_shards(trainer.model, "a Trainer with shards")

    def _live(self) -> LiveModel:
        """The model by the names of the checkpoints: PEFT saves adapters by names of its own."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return LiveModel.of(model, {**model.state_dict(), **_adapters(model)})

    def _log(self, landed: Landed | None) -> None:
        if landed is None:
            return
        mark = landed.mark
        marked = (
            dict(zip(MARK[1:], (mark.origin_step, mark.valid_step), strict=True)) if mark else {}
        )  # the Trainer adds the step
        self._trainer.log({**landed.numbers, **marked})
        self._trainer.state.log_history[-1][_REASON] = landed.reason  # TensorBoard takes numbers only


def _adapters(model: Any) -> dict[str, Any]:
    """The tensors of a PEFT model's adapters, by the names that PEFT gives them in files."""
    names = getattr(model, "peft_config", None)
    if not names:
        return {}
    from peft import get_peft_model_state_dict

    found = {}
    for name in names:
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        found.update({key if name == "default" else f"{name}.{key}": tensor for key, tensor in own.items()})
    return found
