"""Answers `ask.py`: the loss of a checkpoint on data that no reported loss is taken of.

A real loop would start its own evaluation. Here the model is in memory already, so a thread answers in its place.
"""

from __future__ import annotations

import shlex
import socketserver
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from store import HERE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def judging(loss: Callable[[Path], float], folder: Path) -> Iterator[str]:
    """An evaluation command for `--eval-cmd`, which works while the block runs.

    Args:
        loss: of a checkpoint at a path. Called in a thread of its own, one call at a time.
        folder: where the socket goes.
    """

    class Handler(socketserver.StreamRequestHandler):
        """One question: a path; the answer is a number."""

        def handle(self) -> None:
            path = self.rfile.readline().decode().strip()
            self.wfile.write(f"{loss(Path(path))!r}\n".encode())

    place = folder / "judge.sock"
    with socketserver.UnixStreamServer(str(place), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [sys.executable, "-S", str(HERE / "ask.py"), str(place)]
        try:
            yield f"{shlex.join(words)} {{ckpt}}"
        finally:
            server.shutdown()
