"""The notebook in docs/: its cells run in their order, and print what it shows."""

from __future__ import annotations

import json
import tempfile
from typing import TYPE_CHECKING, Any

from tests.test_docs import DOCS, ROOT

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_notebook_runs_and_prints_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    space: dict[str, Any] = {}
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(shown) == 5
    for cell in shown:
        exec("".join(cell["source"]), space)  # noqa: S102 - that is what a notebook is for
        assert capsys.readouterr().out == "".join(text for output in cell["outputs"] for text in output["text"])
