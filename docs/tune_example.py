"""The worked example of docs/tune.md: a character model trained on one text, one layer of it tuned to another.

    python docs/tune_example.py FOLDER            train, write FOLDER/step_400.safetensors and the rows, tune, compare
    python docs/tune_example.py FOLDER --quick    a small model, some seconds

The old text is the prose in docstrings of Python's own library, the new text is code of the same library without them: nothing is
downloaded.
The model reads 6 characters and gives the next one: 768 - hidden - hidden - 128, ReLU.
"""
# ruff: noqa: INP001, T201 - a script beside the page that it belongs to

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXT, LETTERS = 6, 128
MODULES = (
    *("argparse", "ast", "codecs", "csv", "datetime", "decimal", "difflib", "doctest", "email", "fractions", "functools"),
    *("heapq", "inspect", "json", "logging", "mailbox", "optparse", "pickle", "pprint", "random", "statistics", "string"),
    *("subprocess", "tarfile", "textwrap", "threading", "turtle", "typing"),
)
CODE = (
    *("calendar", "configparser", "copy", "dis", "gettext", "glob", "imaplib", "locale", "mimetypes", "pdb", "shutil"),
    *("smtplib", "socket", "ssl", "tokenize", "zipfile"),
)
KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Windows:
    """Contexts (n, 6) of characters and the one that follows each, (n,)."""

    contexts: torch.Tensor
    following: torch.Tensor

    def some(self, count: int, seed: int) -> Windows:
        chosen = torch.randperm(len(self.following), generator=torch.Generator().manual_seed(seed))[:count]
        return Windows(self.contexts[chosen], self.following[chosen])


def old_text() -> str:
    """Docstrings of Python's library, one behind the other: their prose, without signs and digits."""
    whole = "\n".join(text for name in MODULES for text in docstrings(name))
    return " ".join(re.sub(r"[^A-Za-z.,'\s]+", " ", whole).split())


def new_text() -> str:
    """Code of Python's library without docstrings and comments."""
    return "\n".join(code(name) for name in CODE)


def docstrings(module: str) -> Iterator[str]:
    found = (ast.get_docstring(node) for node in ast.walk(tree_of(module)) if isinstance(node, KINDS))
    return (text for text in found if text)


def code(module: str) -> str:
    tree = tree_of(module)
    for node in ast.walk(tree):
        if isinstance(node, KINDS) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def tree_of(module: str) -> ast.Module:
    place = Path(sysconfig.get_path("stdlib")) / module
    return ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text())


def windows_of(text: str) -> tuple[Windows, Windows]:
    """All windows of a text: of its first four fifths, and of the rest, which is for tests."""
    codes = torch.tensor([min(ord(letter), LETTERS - 1) for letter in text])
    cut = len(codes) * 4 // 5
    return _windows(codes[:cut]), _windows(codes[cut:])


def _windows(codes: torch.Tensor) -> Windows:
    return Windows(codes.unfold(0, CONTEXT, 1)[:-1], codes[CONTEXT:])


def make_model(hidden: int) -> nn.Sequential:
    inner = nn.Linear(CONTEXT * LETTERS, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    return nn.Sequential(*inner, nn.Linear(hidden, LETTERS))


def one_hot(contexts: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(contexts, LETTERS).flatten(1).float()


def train(text: Windows, *, hidden: int, steps: int, seed: int = 0) -> nn.Sequential:
    """Adam on batches of 256 windows."""
    torch.manual_seed(seed)
    model = make_model(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = text.some(256, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(one_hot(batch.contexts)), batch.following).backward()
        optimizer.step()
    return model


@torch.no_grad()
def loss_of(model: nn.Sequential, windows: Windows) -> float:
    """Mean cross-entropy in nats per character."""
    chunks = zip(windows.contexts.split(4096), windows.following.split(4096), strict=True)
    sums = [nn.functional.cross_entropy(model(one_hot(c)), f, reduction="sum").item() for c, f in chunks]
    return sum(sums) / len(windows.following)


@torch.no_grad()
def save_rows(model: nn.Sequential, windows: Windows, path: Path) -> None:
    """The inputs of the second layer, and the characters that follow as labels."""
    np.savez(path, x=model[:2](one_hot(windows.contexts)).numpy(), y=windows.following.numpy())


def save_model(model: nn.Sequential, path: Path) -> None:
    save_file(model.state_dict(), path, metadata={"format": "pt"})


def load_model(path: Path) -> nn.Sequential:
    weights = load_file(path)
    model = make_model(len(weights["0.weight"]))
    model.load_state_dict(weights)
    return model


def command(folder: Path, *more: str) -> list[str]:
    """The call of farcast that tunes the second layer, `2.weight`, behind which come ReLU and the head, `4.weight`."""
    layer = ["--layer", "2.weight", "--bias", "2.bias", "--activation", "relu", "--head", "4.weight", "--head-bias", "4.bias"]
    return ["tune", str(folder / "step_400.safetensors"), *layer, "--loss", "cross-entropy", *more]


def main(folder: Path, *, quick: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hidden, steps, num_rows, num_anchors = (64, 200, 256, 32) if quick else (1024, 400, 512, 256)
    (old, old_test), (new, new_test) = windows_of(old_text()), windows_of(new_text())
    model = train(old, hidden=hidden, steps=steps)
    save_model(model, folder / "step_400.safetensors")
    save_rows(model, new.some(num_rows, seed=1), folder / "rows.npz")
    save_rows(model, old.some(num_anchors, seed=2), folder / "anchors.npz")
    print(f"before: {loss_of(model, old_test):.3f} on the old text, {loss_of(model, new_test):.3f} on the new")
    for name, more in (("tuned", []), ("anchored", ["--anchor", str(folder / "anchors.npz")])):
        out = folder / f"{name}.safetensors"
        call = command(folder, "--data", str(folder / "rows.npz"), "-o", str(out), *more)
        print("farcast", *call)
        subprocess.run([sys.executable, "-m", "farcast_cli", *call], check=True)  # noqa: S603 - our own command
        after = load_model(out)
        print(f"{name}: {loss_of(after, old_test):.3f} on the old text, {loss_of(after, new_test):.3f} on the new")


if __name__ == "__main__":
    main(Path(sys.argv[1]), quick="--quick" in sys.argv[2:])
