"""How much memory the whole command takes on a checkpoint whose layer is 1 GiB: read, tune, judge, write, read back.

The command runs as a program of its own; what all its processes hold is added up every few hundredths of a second.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from speed import FARCAST, measure

from farcast_cli.formats.safetensors_file import encode_header
from farcast_cli.tensors import DTYPES

NUM_ROWS, NUM_OUTPUTS, NUM_DIRECTIONS = 128, 8, 6
LAYER = ["--layer", "w", "--activation", "relu", "--head", "head", "--data", "rows.npz", "--loss", "mse"]
CALLS = {
    "-o": [*LAYER, "-o", "tuned.safetensors"],
    "-o, one thread": [*LAYER, "-o", "tuned_1.safetensors", "--threads", "1"],
    "-o, gradient descent": [*LAYER, "--method", "gradient-descent", "-o", "tuned_gd.safetensors"],
    "-o, stochastic rounding": [*LAYER, "--round", "stochastic", "-o", "tuned_sr.safetensors"],
    "--delta-out": [*LAYER, "--delta-out", "delta.safetensors"],
    "--apply": ["--apply", "delta.safetensors", "-o", "applied.safetensors"],
}


def make(folder: Path, width: int) -> None:
    """A checkpoint with one layer, square, and its head; rows in few directions, so that what some teach holds for others."""
    random = np.random.default_rng(0)
    with (folder / "step_1.safetensors").open("wb") as file:
        tensors = [("w", DTYPES["float32"], (width, width)), ("head", DTYPES["float32"], (NUM_OUTPUTS, width))]
        file.write(encode_header(tensors, {"format": "pt"}))
        for start in range(0, width, 256):
            shape = min(256, width - start), width
            file.write((random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(width))).data)
        file.write((random.standard_normal((NUM_OUTPUTS, width), dtype=np.float32) / np.float32(np.sqrt(width))).data)
    places = random.standard_normal((NUM_ROWS, NUM_DIRECTIONS))
    inputs = (places @ random.standard_normal((NUM_DIRECTIONS, width))).astype(np.float32)
    np.savez(folder / "rows.npz", x=inputs, y=np.tanh(places @ random.standard_normal((NUM_DIRECTIONS, NUM_OUTPUTS))))


def memory(width: int = 16384) -> list[dict[str, Any]]:
    """Peak MiB and seconds of each call; a call that did not write what it should is an error."""
    found = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make(folder, width)
        for name, call in CALLS.items():
            used = measure([*FARCAST, "tune", "step_1.safetensors", *call, "-q"], folder)
            out = folder / call[max(call.index(option) for option in ("-o", "--delta-out") if option in call) + 1]
            size = out.stat().st_size / 2**20
            if name != "--delta-out":
                out.unlink()
            found.append({"call": name, "peak_mib": used.peak_mib, "wall_s": used.wall_s, "cpu_s": used.cpu_s, "out_mib": size})
            print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(memory(*map(int, sys.argv[1:])), indent=2))
