"""The worked example of docs/tune.md, in a small setting: the new text gains, anchors keep more of the old one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conftest import CallCli

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "tune_example.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("tune_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune_example"] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def test_a_character_model_is_tuned_to_another_text_and_anchors_keep_the_old_one(tmp_path: Path, call_cli: CallCli) -> None:
    made = example()
    (old, old_test), (new, new_test) = made.windows_of(made.old_text()), made.windows_of(made.new_text())
    model = made.train(old, hidden=256, steps=300)
    made.save_model(model, tmp_path / "step_400.safetensors")
    made.save_rows(model, new.some(512, seed=1), tmp_path / "rows.npz")
    made.save_rows(model, old.some(64, seed=2), tmp_path / "anchors.npz")
    tests = old_test.some(4000, seed=3), new_test.some(4000, seed=3)
    before = [made.loss_of(model, windows) for windows in tests]
    call = made.command(tmp_path, "--data", str(tmp_path / "rows.npz"))
    losses = {}
    for name, more in (("tuned", ()), ("anchored", ("--anchor", str(tmp_path / "anchors.npz")))):
        done = call_cli(*call, *more, "-o", tmp_path / f"{name}.safetensors")
        assert done.returncode == 0, done
        after = made.load_model(tmp_path / f"{name}.safetensors")
        losses[name] = [made.loss_of(after, windows) for windows in tests]
    assert losses["tuned"][1] < before[1] - 0.5
    assert losses["anchored"][1] < before[1] - 0.3
    assert before[0] < losses["anchored"][0] < losses["tuned"][0]
