"""What many tensors or snapshots have in common, said once."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from farcast_cli.errors import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from farcast_cli.run.alignment import Copied

MAX_KINDS = 6
MAX_ALIKE = 3  # problems
_NUMBERS = re.compile(r"\d+")


def by_kind(items: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by what is said of them."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, kind in items:
        found[kind].append(name)
    return found


def like_each_other(problems: Sequence[str]) -> Iterator[str]:
    """Of many problems that are equal but for their numbers, the first, with the count of the others; a few as they are."""
    for alike in by_kind((problem, _NUMBERS.sub("#", problem)) for problem in problems).values():
        few = len(alike) <= MAX_ALIKE
        yield from alike if few else [f"{alike[0]} (and {len(alike) - 1} more like this: -v shows all)"]


def copied_texts(copied: Sequence[Copied], *, verbose: bool) -> Iterator[str]:
    """What is copied, by the kinds of reasons, the commonest first, and averages, which move; one by one where asked."""
    if verbose:
        for one in copied:
            yield f"  {'copied ' if one.num_tensors else ''}{one.name}: {one.reason}"
        return
    alone = [one for one in copied if one.num_tensors]
    kinds = sorted(by_kind((c.name, c.kind) for c in alone).items(), key=lambda kind: -len(kind[1]))
    more = f", and {len(kinds) - MAX_KINDS} more reasons (-v lists all)" if len(kinds) > MAX_KINDS else ""
    if kinds:
        count = sum(one.num_tensors for one in alone)
        told = "; ".join(f"{kind} ({_named(names)})" for kind, names in kinds[:MAX_KINDS])
        yield f"{count} tensor{'s' * (count != 1)} copied: {told}{more}"
    for reason, names in by_kind((c.name, c.reason) for c in copied if not c.num_tensors).items():
        yield f"{listed(names, most=MAX_KINDS)}: {reason}"


def _named(names: Sequence[str]) -> str:
    """How many there are, and the first; a group of tensors by its name alone."""
    return names[0] if len(names) == 1 and names[0].endswith(".*") else f"{len(names)}, as {names[0]}"
