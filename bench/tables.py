"""Numbers, tables and sections of the report, in Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def section(title: str, text: str, *tables: str) -> str:
    return "\n".join([f"## {title}\n", text.strip() + "\n", *tables]) if any(tables) else ""


def number(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range: `0.61 (0.40..0.80)`; the range where there are several."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return NOTHING
    mean = number(float(np.mean(finite)), digits)
    return f"{mean} ({number(min(finite), digits)}..{number(max(finite), digits)})" if len(finite) > 1 else mean
