"""A small run that saves torch.distributed.checkpoint folders, alone or sharded by FSDP2 over processes.

`python -m tests.dcp_runs RANK WORLD STORE SAVE_TO [LOAD_FROM] [--hidden N]` is one process of a sharded run.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

STEPS = tuple(range(10, 101, 10))
TOTAL = 200


class Run:
    """A model, AdamW, a cosine schedule and a count of steps; the same numbers every time."""

    def __init__(self, *, flat: bool = False, sharded: bool = False, hidden: int = 16) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.inputs, self.outputs = torch.randn(64, 8), torch.randn(64, 2)
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=TOTAL)
        self.step = 0
        self.options = StateDictOptions(flatten_optimizer_state_dict=flat)
        self.flat = flat

    def train(self, until: int) -> list[float]:
        """Full-batch steps; returns the learning rate after each."""
        rates = []
        while self.step < until:
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(self.inputs), self.outputs).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            rates.append(float(self.scheduler.get_last_lr()[0]))
        return rates

    def state(self) -> dict[str, Any]:
        """What is saved: nested as torch's recipes have it, or flat with torchtitan's keys."""
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        rest = {
            "optimizer": optimizer,
            "lr_scheduler": self.scheduler.state_dict(),
            "train_state": {"step": torch.tensor(self.step, dtype=torch.int32), "ntokens_seen": 64 * self.step},
        }
        return {**weights, **rest} if self.flat else {"model": weights, **rest}

    def save(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(self.state(), checkpoint_id=str(folder))

    def load(self, folder: Path) -> None:
        """As a trainer resumes: every key must be there, of the right shape."""
        state = self.state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(state, checkpoint_id=str(folder))
        rest = {key: state.pop(key) for key in ("optimizer", "lr_scheduler", "train_state")}
        weights = state if self.flat else state["model"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=weights,
            optim_state_dict=rest["optimizer"],
            options=self.options,
        )
        self.scheduler.load_state_dict(rest["lr_scheduler"])
        self.step = int(rest["train_state"]["step"])

    def whole(self) -> dict[str, torch.Tensor]:
        """The weights, gathered from all processes."""
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in self.model.state_dict().items()
        }


def make_run(folder: Path, *, flat: bool = False) -> Path:
    """Snapshots `step-10` to `step-100` of a run in one process."""
    run = Run(flat=flat)
    for step in STEPS:
        run.train(step)
        run.save(folder / f"step-{step}")
    return folder


def _main(asked: argparse.Namespace) -> None:
    store = f"file://{asked.store}"
    dist.init_process_group("gloo", init_method=store, rank=asked.rank, world_size=asked.world)
    run = Run(sharded=True, hidden=asked.hidden)
    if asked.load_from is None:
        for step in STEPS:
            run.train(step)
            run.save(asked.save_to / f"step-{step}")
    else:
        run.load(asked.load_from)
        loaded = run.whole()
        adam = run.optimizer.state_dict()["state"][0]["step"]
        said = {"step": run.step, "adam": float(adam), "lr": run.optimizer.param_groups[0]["lr"]}
        said["rates"] = run.train(run.step + 5)
        if asked.rank == 0:
            torch.save(loaded, asked.save_to.with_suffix(".pt"))
            asked.save_to.with_suffix(".json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("store", type=Path)
    parser.add_argument("save_to", type=Path)
    parser.add_argument("load_from", type=Path, nargs="?")
    parser.add_argument("--hidden", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(_asked())
    os._exit(0)  # gloo's threads may abort a process that ends while another is still ending
