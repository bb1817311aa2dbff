"""JSON of somebody else's: parsed within limits of size, number and depth.

`json` makes some 20 bytes of memory of one byte of `[[],[],...`, and what is nested deep ends whatever walks it later.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_DEPTH = 64
MAX_CONTAINERS = 1_500_000  # half a million tensors in a safetensors header
MAX_ITEMS = 8_000_000

Pairs = list[tuple[str, Any]]


def parse_json(raw: bytes, *, made_of: Callable[[Pairs], dict[str, Any]] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        made_of: makes an object of its pairs; `dict` by default.

    Raises:
        ValueError: not JSON, or more of it than any checkpoint has.
    """
    num_containers = raw.count(b"{") + raw.count(b"[")
    if num_containers > MAX_CONTAINERS or raw.count(b",") > MAX_ITEMS:
        raise ValueError(f"more than {MAX_CONTAINERS} objects and lists, or than {MAX_ITEMS} items")
    try:
        value = json.loads(raw, object_pairs_hook=made_of)
    except RecursionError:
        value = None
    if value is None or _is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} deep, or nothing")
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [child for children in inner for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
