"""The lowest version of every run-time dependency that pyproject.toml allows, a pin a line: `make lowest` tests with them.

The optional ones are among them.
torch is left out: its old versions come with gigabytes of GPU libraries. `make lowest` takes the version of constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
LEFT_OUT = {"torch"}


def pins(dependencies: list[str]) -> list[str]:
    """`numpy>=2.0,<3` becomes `numpy==2.0`; a dependency without a lower bound is an error.

    >>> pins(["numpy>=2.0", "torch>=2.6", "rich>=13.7,<99"])
    ['numpy==2.0', 'rich==13.7']
    """
    found = []
    for dependency in dependencies:
        bound = re.match(r"([\w.-]+)>=([\w.]+)", dependency)
        if bound is None:
            raise SystemExit(f"pyproject.toml: {dependency!r} names no lowest version")
        name, version = bound.groups()
        if name not in LEFT_OUT:
            found.append(f"{name}=={version}")
    return found


if __name__ == "__main__":
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    sys.stdout.write("\n".join(pins([*project["dependencies"], *optional["hub"], *optional["torch"]])) + "\n")
