"""A picture as a part of a page: matplotlib's SVG without its ids and fonts, with the page's colours and a text alternative."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LINK = re.compile(r"url\(#([^)]+)\)|^#(.+)$")
_FONT = re.compile(r"font: (?:bold |700 )?([\d.]+)px [^;]*")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_DROPPED = {"metadata", "style", "width", "height", "version"}


def inlined(svg: str, name: str, *, title: str, description: str, colours: Mapping[str, str]) -> str:
    """The element `svg` for an HTML page.

    Args:
        name: begins every id, so that several pictures fit on one page.
        description: what the picture shows, for readers who do not see it.
        colours: the names of the page's variables, by the colour that stands for each.
    """
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib has just written it
    for element in root.iter():
        _make_plain(element)
    for parent in list(root.iter()):
        for child in [one for one in parent if one.tag in _DROPPED]:
            parent.remove(child)
    _rename_ids(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{name}-title {name}-text"}
    for place, (tag, key, text) in enumerate((("title", "title", title), ("desc", "text", description))):
        element = ET.Element(tag, {"id": f"{name}-{key}"})
        element.text = text
        root.insert(place, element)
    text = ET.tostring(root, encoding="unicode", short_empty_elements=False)
    for colour, variable in colours.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def _make_plain(element: ET.Element) -> None:
    """An element as HTML spells it: without namespaces, in the page's font, with short numbers."""
    element.tag = element.tag.rpartition("}")[2]
    plain = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    element.attrib = {key: _LONG.sub(_rounded, _FONT.sub(r"font-size: \1px", value)) for key, value in plain.items()}
    for key in _DROPPED & element.attrib.keys() if element.tag == "svg" else ():
        del element.attrib[key]


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _rename_ids(root: ET.Element, name: str) -> None:
    """Drop the ids that nothing refers to; begin the others with a name."""
    used = {found for _, _, found in _links(root)}
    for element in root.iter():
        known = element.attrib.pop("id", None)
        if known in used:
            element.attrib["id"] = f"{name}-{known}"
    for element, key, found in list(_links(root)):
        element.attrib[key] = element.attrib[key].replace(f"#{found}", f"#{name}-{found}")


def _links(root: ET.Element) -> Iterator[tuple[ET.Element, str, str]]:
    """Every attribute that refers to an id: its element, its name, and the id."""
    for element in root.iter():
        for key, value in element.attrib.items():
            match = _LINK.search(value)
            if match:
                yield element, key, match[1] or match[2]
