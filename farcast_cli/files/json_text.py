"""JSON of somebody else's: parsed within limits of size, number and depth, and written back.

`json` makes some 20 bytes of memory of one byte of `[[],[],...`, and what is nested deep ends whatever walks it later.
A log that grows with the run is passed over: it is checked a few entries at a time, left in its file, and copied from there.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from json.decoder import JSONDecoder
from typing import TYPE_CHECKING, Any

from farcast_cli.files.reading import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_DEPTH = 64
MAX_CONTAINERS = 1_500_000  # half a million tensors in a safetensors header
MAX_ITEMS = 4_000_000  # eight for each of them
MAX_KEYS = 2_500_000
_BATCH_CHARS = 1 << 16
_TAIL_BYTES = 1 << 12  # of a list, to find its last entry's end
_ENTRY_CHARS = (_BATCH_CHARS, 1 << 20)  # of one entry of a log: as most are, and at most
_DECODER = JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")

Pairs = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class UnreadList:
    """A list that was checked and left in its file: where its text lies."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LongerList:
    """A list that was left in its file, with one entry more."""

    kept: UnreadList
    """The text of the list up to its last entry."""
    added: bytes
    """The rest: the new entry and the end of the list."""


def with_entry(log: UnreadList, entry: dict[str, Any]) -> LongerList:
    """A list in its file with an entry at its end, as a Trainer indents it.

    Raises:
        ValueError: what lies at its place does not end as a list does.
    """
    num_tail = min(log.num_bytes, _TAIL_BYTES)
    tail = read_bytes(log.path, log.offset + log.num_bytes - num_tail, num_tail).decode()
    kept = tail.removesuffix("]").rstrip(" \t\n\r")
    if kept == tail or not kept:
        raise ValueError("a list that does not end")
    text = json.dumps(entry, indent=2, sort_keys=True).replace("\n", "\n    ")
    separator = "" if kept == "[" and num_tail == log.num_bytes else ","
    left_out = len(tail) - len(kept)
    return LongerList(replace(log, num_bytes=log.num_bytes - left_out), f"{separator}\n    {text}\n  ]".encode())


def parse_json(raw: bytes, *, made_of: Callable[[Pairs], dict[str, Any]] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        made_of: makes an object of its pairs; `dict` by default.

    Raises:
        ValueError: not JSON, or more of it than any checkpoint has.
    """
    refuse_huge(raw)
    try:
        value = json.loads(raw, object_pairs_hook=made_of)
    except RecursionError:
        value = None
    if value is None or _is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} deep, or nothing")
    return value


def refuse_huge(raw: bytes) -> None:
    """Refuse a JSON text that would take too much memory.

    Raises:
        ValueError: it has more objects, lists, items or keys than any checkpoint has.
    """
    num_containers = raw.count(b"{") + raw.count(b"[")
    if num_containers > MAX_CONTAINERS or raw.count(b",") > MAX_ITEMS or raw.count(b":") > MAX_KEYS:
        raise ValueError(f"more than {MAX_CONTAINERS} objects and lists, {MAX_ITEMS} items or {MAX_KEYS} keys")


def parse_json_beside(raw: bytes, log: str, path: Path) -> Any:
    """The value of a JSON file's text, with an `UnreadList` in place of the list under one key at its top.

    Where the text is not as trainers write it (plain ASCII, the key once), it is parsed whole, within the limits.
    Memory: the text twice.

    Raises:
        ValueError: as `parse_json`, or an entry of the list is larger than a megabyte.
    """
    begin = re.search(rb'"' + re.escape(log.encode()) + rb'"[ \t\n\r]*:[ \t\n\r]*(?=\[)', raw)
    if begin is None or not raw.isascii():
        return parse_json(raw)
    text = raw.decode("ascii")
    end = _list_end(text, begin.end())
    stand_in = f"unread from {begin.end()} to {end}"
    value = parse_json(f'{text[: begin.end()]}"{stand_in}"{text[end:]}'.encode())
    if not isinstance(value, dict) or value.get(log) != stand_in:
        return parse_json(raw)
    return value | {log: UnreadList(path, begin.end(), end - begin.end())}


def encode_json(tree: dict[str, Any]) -> list[bytes | UnreadList]:
    """The text of an object as a Trainer writes it: stretches of it, and the lists between them that were left unread."""
    unread = {key: value for key, value in tree.items() if isinstance(value, (UnreadList, LongerList))}
    rest = json.dumps(tree | {key: [] for key in unread}, indent=2, sort_keys=True) + "\n"
    made: list[bytes | UnreadList] = []
    for key in sorted(unread):
        place = f"\n  {json.dumps(key)}: "  # with this indent at the top alone: a string holds no line breaks
        before, _, rest = rest.partition(f"{place}[]")
        log = unread[key]
        made += [f"{before}{place}".encode(), *((log.kept, log.added) if isinstance(log, LongerList) else (log,))]
    return [*made, rest.encode()]


def _list_end(text: str, begin: int) -> int:
    """Where a list ends that begins at `begin`, its entries having been checked a few at a time."""
    at = _skip_space(text, begin + 1)
    while text[at : at + 1] != "]":
        at = _skip_space(text, _several(text, at) or _one_by_one(text, at))
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError(f"a list that does not end: at character {at}")
    return at + 1


def _several(text: str, begin: int) -> int:
    """Where the last of several whole entries ends; 0 where that cannot be told."""
    for mark, kept in (("},", 1), (",", 0)):  # entries are records as trainers write them, or else anything
        end = text.rfind(mark, begin, begin + _BATCH_CHARS) + kept
        with suppress(json.JSONDecodeError, RecursionError):  # it was cut within an entry
            if end > begin and not _is_deep(json.loads(f"[{text[begin:end]}]")):
                return end
    return 0


def _one_by_one(text: str, begin: int) -> int:
    """Where the last of the entries ends that lie in a batch, or the first one if that is longer."""
    for count in _ENTRY_CHARS:
        end = _whole_entries(text[begin : begin + count], is_last=begin + count >= len(text))
        if end:
            return begin + end
    raise ValueError(f"an entry of a list is no JSON, nested deep or longer than a megabyte: at character {begin}")


def _whole_entries(chunk: str, *, is_last: bool) -> int:
    """Where the last whole entry of a stretch of a list ends; 0 where there is none."""
    at = done = 0
    with suppress(json.JSONDecodeError, RecursionError):
        while True:
            entry, end = _DECODER.raw_decode(chunk, at)
            if _is_deep(entry) or not (end < len(chunk) or is_last):  # a number may go on behind the stretch
                break
            done, at = end, _skip_space(chunk, end)
            if chunk[at : at + 1] != ",":
                break
            at = _skip_space(chunk, at + 1)
    return done


def _skip_space(text: str, begin: int) -> int:
    found = _SPACE.match(text, begin)
    return found.end() if found else begin


def _is_deep(value: object) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [child for children in inner for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
