"""A second network beside the weights is counted by its tensors, in every trainer's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from farcast_cli.run.alignment import align
from farcast_cli.run.trajectory import open_snapshot
from tests.conftest import weights_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OTHER = {"w": torch.zeros(4, 4), "b": torch.zeros(4), "c": torch.zeros(3)}


def _lightning(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "state_dict": weights,
        "teacher": OTHER,
        "pytorch-lightning_version": "2.5.0",
        "global_step": 7,
        "epoch": 0,
        "loops": {},
    }


def _composer(weights: dict[str, Any]) -> dict[str, Any]:
    timestamp = {"Timestamp": {"batch": 7, "epoch": 0}}
    return {
        "state": {"model": weights, "teacher": OTHER, "timestamp": timestamp},
        "rng": [],
        "metadata": {"composer_env_info": {}},
    }


@pytest.mark.parametrize(("make", "name"), [(_lightning, "epoch=0-step=7.ckpt"), (_composer, "ep0-ba7.pt")])
def test_a_second_network_counts_by_its_tensors(
    make: Callable[[dict[str, Any]], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    torch.save(make(weights_at(7)), tmp_path / name)
    snapshot = open_snapshot(tmp_path / name)
    assert snapshot.layout == make.__name__[1:]
    assert sum(one.num_tensors for one in align([snapshot]).copied if one.name == "teacher.*") == len(OTHER)
