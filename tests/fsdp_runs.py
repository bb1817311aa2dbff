"""One of two processes of a Hugging Face Trainer under FSDP2 on the CPU: `python -m tests.fsdp_runs OUT`.

Trains and saves `OUT/sharded/checkpoint-N` and `OUT/full/checkpoint-N`, forecasts each run into `OUT/{kind}-forecast`, resumes
from that and writes what it then has to `OUT/{kind}.json`. The environment says which process it is, as torchrun does.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.test_in_trainer import language_model, texts
from tests.tiny import fit_run, predict_run

KINDS = {"sharded": "SHARDED_STATE_DICT", "full": "FULL_STATE_DICT"}
EVERY, LAST, END = 5, 30, 400


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends the training at a step, and remembers the state that the first step begins with."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.seen: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:  # noqa: ARG002
        if not self.seen:
            optimizer = parts["optimizer"].optimizer
            steps = {float(one["step"]) for one in optimizer.state.values()}
            rates = [group["lr"] for group in optimizer.param_groups]
            weights = {name: value.full_tensor().flatten()[:8].tolist() for name, value in parts["model"].named_parameters()}
            self.seen = {"step": state.global_step, "adam": sorted(steps), "rates": rates, "weights": weights}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        control.should_training_stop = state.global_step >= self.last


def train(out: Path, kind: str, resumed: int) -> Watch:
    AcceleratorState._reset_state(reset_partial_state=False)
    arguments = TrainingArguments(
        str(out / kind),
        max_steps=END,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        save_steps=EVERY,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        disable_tqdm=True,
        fsdp=True,  # type: ignore[arg-type, unused-ignore]
        fsdp_config={"state_dict_type": KINDS[kind], "transformer_layer_cls_to_wrap": ["GPT2Block"]},
    )
    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate itself never asks on a CPU
    trainer = Trainer(model=language_model(), args=arguments, train_dataset=texts())
    assert trainer.is_fsdp_enabled
    watch = Watch(resumed + 2 if resumed else LAST)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(out / f"{kind}-forecast" / f"checkpoint-{resumed}") if resumed else None)
    return watch


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for kind in KINDS:
        train(out, kind, 0)
        if os.environ["RANK"] == "0":
            (outcome,) = predict_run(fit_run(out / kind), f"{out / kind}-forecast/", horizons=[EVERY])
            assert outcome.notes == ()
        torch.distributed.barrier()
        watch = train(out, kind, LAST + EVERY)
        if os.environ["RANK"] == "0":
            (out / f"{kind}.json").write_text(json.dumps(watch.seen))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while another is still ending


if __name__ == "__main__":
    main()
