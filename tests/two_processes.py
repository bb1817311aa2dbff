"""One of two processes of a training on the CPU, with leaps: `python -m tests.two_processes trainer|lightning OUT`.

The environment says which one it is, as torchrun does. Each writes what it has at the end to `OUT/rank-N.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def digest(module: torch.nn.Module) -> str:
    """Of the parameters: BatchNorm's statistics are those of each process's own data."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        whole.update(name.encode() + tensor.detach().numpy().tobytes())
    return whole.hexdigest()


def by_trainer() -> tuple[str, Any]:
    from farcast_cli.hf import LeapCallback
    from tests.test_in_trainer import language_model, marks, texts, trainer_of

    trainer = trainer_of(language_model(), texts(), ddp_backend="gloo")
    assert trainer.args.world_size == 2
    trainer.add_callback(LeapCallback(trainer, every=10))
    trainer.train()
    return digest(trainer.model), marks(trainer.state.log_history)


def by_lightning() -> tuple[str, Any]:
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy

    from farcast_cli.lightning import LeapCallback
    from tests.test_in_lightning import EVERY, Tied, data, marks

    torch.manual_seed(0)
    trainer: Any = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=100,
        callbacks=[LeapCallback(), ModelCheckpoint("run", every_n_train_steps=EVERY, save_top_k=1)],
    )
    module = Tied()
    trainer.fit(module, data())
    return digest(module), marks(trainer)


def main() -> None:
    kind, out = sys.argv[1:]
    os.chdir(out)
    torch.set_num_threads(1)
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("farcast").addHandler(handler)
    weights, leaps = by_trainer() if kind == "trainer" else by_lightning()
    told = {"weights": weights, "leaps": leaps, "warned": warned}
    Path(f"rank-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(told))
    torch.distributed.barrier()  # one that ends first can abort the other's threads
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
