"""What must take no time: CPU seconds of what was once slow on input of many parts, against a limit.

    python bench/limits.py      exits with 1 where a limit is passed

The limits are some five times what was measured, and for what takes no time a fifth of a second. Tests see that the results are
right: test_hub.py, test_marks.py, test_formats.py, test_by_content.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.card import _added
from farcast_cli.forecast.state_ledger import known_leaps
from farcast_cli.formats.safetensors_file import encode_header
from farcast_cli.run.selection import Selection, inspect
from farcast_cli.run.trajectory import discover
from farcast_cli.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLE = Path(__file__).resolve().parent.parent / "sample_checkpoints" / "huggingface"
BEGIN = "<!-- farcast: begin -->"
NUM_MARKS = 20_000
NUM_SNAPSHOTS = 7
NUM_VALUES = 600  # of each tensor
ENDINGS = (".png", ".txt", ".dat", "")


def card_of(text: str) -> Callable[[], object]:
    """A section is added to a model card that says this."""
    return lambda: _added(f"# Mine\n{text}", "the section", "")


def marked_run(folder: Path) -> Callable[[], object]:
    """The leaps of a run are found in a Trainer's log of thousands of marks."""
    run = Path(shutil.copytree(SAMPLE, folder / "run"))
    state = discover(run).origin.path / "trainer_state.json"
    marks = [{"step": one, "farcast_leap_from": one, "farcast_leap_to": one + 1} for one in range(NUM_MARKS)]
    state.write_text(json.dumps(json.loads(state.read_text()) | {"log_history": marks}))
    trajectory = discover(run)
    return lambda: known_leaps(None, trajectory)


def large_run(folder: Path, num_tensors: int, num_others: int) -> Callable[[], object]:
    """A run of many small tensors is inspected, each snapshot with metadata of its own, and files of other programs beside them."""
    run = folder / f"run-{num_tensors}-{num_others}"
    run.mkdir()
    shapes = [(f"layer.{index:06d}.bias", DTYPES["bfloat16"], (NUM_VALUES,)) for index in range(num_tensors)]
    for step in range(1, NUM_SNAPSHOTS + 1):
        header = encode_header(shapes, {"step": str(step)})
        (run / f"step_{step}.safetensors").write_bytes(header + bytes([step, 0x3C]) * (NUM_VALUES * num_tensors))
    for index in range(num_others):
        (run / f"sample_{index}{ENDINGS[index % len(ENDINGS)]}").write_bytes(b"no checkpoint " * 50)
    return lambda: inspect(Selection(run))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "a card of 10,000 marks": (card_of(BEGIN * 10_000), 0.2),
            "a card of 100,000 empty lines": (card_of("\n" * 100_000 + "x"), 0.2),
            f"a log of {NUM_MARKS:,} marks": (marked_run(Path(folder)), 1.0),
            "7 snapshots of 50,000 tensors": (large_run(Path(folder), 50_000, 0), 8.0),
            "7 snapshots beside 20,000 other files": (large_run(Path(folder), 10, 20_000), 8.0),
        }
        slow = 0
        for what, (action, limit_s) in cases.items():
            started = time.process_time()
            action()
            spent = time.process_time() - started
            slow += spent > limit_s
            sys.stdout.write(f"{what}: {spent:.2f} s of CPU time (limit {limit_s:g} s)\n")
    sys.exit(int(slow > 0))


if __name__ == "__main__":
    main()
