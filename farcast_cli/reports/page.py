"""The report as one HTML file: no network, no script; light and dark, for a phone, a wide screen and paper."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.errors import visible
from farcast_cli.reports.figures import DARK, LIGHT, figures
from farcast_cli.reports.panels import CASES, facts, headline, panels, short_name
from farcast_cli.reports.svg import inlined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.reports.panels import Numbers, Panel
    from farcast_cli.reports.story import Story

_COMMAND = re.compile(r"(farcast .*?)( writes the .*| is supported .*)?")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OPACITIES = ((0.9, 0.75, 0.65), (0.9, 0.15, 0.05), (0.08, 0.05, 0.08))
"""Of small heat maps that show each of `CASES`: cells that lie one, two and three moves apart."""


def page(story: Story) -> str:
    """The whole file."""
    drawn = figures(story)
    said = headline(story)
    body = "\n".join([_head(story), *(_section(panel, drawn) for panel in panels(story)), _facts(story)])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="farcast {__version__}">
<title>{_text(said.title)} · {_text(short_name(story))}</title>
<style>{_variables()}{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    """A text from anywhere, as HTML shows it: no markup, no direction marks, no bytes that are no character."""
    return html.escape(visible(text))


def _prose(text: str) -> str:
    """The same, with options that no line break cuts."""
    return _OPTION.sub(r'<span class="option">\g<0></span>', _text(text))


def _head(story: Story) -> str:
    said = headline(story)
    sure = f'<p class="sure">{_text(said.sure)}</p>' if said.sure else ""
    cells = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)} <small>{_text(remark)}</small></dd></div>"
        for name, value, remark in said.figures
    )
    numbers = f'<dl class="numbers">{cells}</dl>' if cells else ""
    return f"""<header>
<p class="kicker">farcast report · <span>{_text(short_name(story))}</span> · {story.fitted.rule.unit} {story.fitted.steps[-1]}</p>
<h1>{_text(said.title)}</h1>
<p class="why">{_prose(said.why)}</p>
{sure}
{numbers}
<div class="next"><span>Next</span> {_next(said.next_step)}</div>
</header>"""


def _next(text: str) -> str:
    """What to do: one command, or several ways."""
    ways = [_way(part) for part in text.split("; ")]
    return ways[0] if len(ways) == 1 else f"<ul>{''.join(f'<li>{way}</li>' for way in ways)}</ul>"


def _way(text: str) -> str:
    """A way to go on, with its command set apart."""
    match = _COMMAND.fullmatch(text)
    return f"<code>{_text(match[1])}</code>{_prose(match[2] or '')}" if match else _prose(text)


def _section(panel: Panel, drawn: dict[str, str]) -> str:
    figure = ""
    if panel.name in drawn:
        colours = {colour: name for name, colour in LIGHT.items()}
        svg = inlined(
            drawn[panel.name], panel.name, title=visible(panel.title), description=visible(panel.message), colours=colours
        )
        key = _key() if panel.name == "moves" else ""
        figure = f"""<figure>{svg}{key}<figcaption>{_text(f"{panel.reading} {panel.picture}".strip())}</figcaption></figure>
<details><summary>Table of the numbers</summary>{_table(panel.table)}</details>"""
    return f"""<section id="{panel.name}">
<h2>{_text(panel.title)}</h2>
<p>{_prose(panel.message)}</p>
{figure}
</section>"""


def _key() -> str:
    items = (f"<li>{_glyph(apart)} {_text(words)}</li>" for words, apart in zip(CASES, OPACITIES, strict=True))
    return f'<ul class="key">{"".join(items)}</ul>'


def _glyph(apart: Sequence[float]) -> str:
    """A heat map of four moves."""
    cells = (
        f'<rect x="{9 * column}" y="{9 * row}" width="9" height="9"'
        + (' fill="var(--rule)"' if row == column else f' fill="var(--warm)" fill-opacity="{apart[abs(row - column) - 1]}"')
        + "></rect>"
        for row in range(4)
        for column in range(4)
    )
    return f'<svg viewBox="0 0 36 36" aria-hidden="true">{"".join(cells)}</svg>'


def _table(table: Numbers) -> str:
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.headings)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _facts(story: Story) -> str:
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts(story))
    return f"""<section id="facts">
<h2>The run in facts</h2>
<dl class="facts">{rows}</dl>
</section>"""


def _variables() -> str:
    return f"\n:root {{{_colours(LIGHT)}}}\n@media screen and (prefers-color-scheme: dark) {{:root {{{_colours(DARK)}}}}}"


def _colours(theme: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())


STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 16px 56px; display: grid; grid-template-columns: minmax(0, 1fr);
  gap: 44px 64px; }
header, #facts { grid-column: 1 / -1; min-width: 0; }
section { min-width: 0; }
p, h1, h2, dl, dd, figure, ul { margin: 0; }
.kicker, .why, .sure, .next, section p, dd, figcaption, td { overflow-wrap: anywhere; }
.kicker { color: var(--muted); font-size: 14px; }
h1 { font-size: clamp(40px, 9vw, 68px); line-height: 1.08; letter-spacing: -0.025em; margin: 10px 0 16px; text-wrap: balance; }
.why { font-size: 19px; max-width: 46em; }
.sure { font-size: 19px; max-width: 40em; color: var(--muted); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 16px 20px; margin-top: 26px;
  border-top: 1px solid var(--rule); padding-top: 16px; }
.numbers dt { color: var(--muted); font-size: 14px; }
.numbers dd { font-size: 26px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.numbers small { display: block; font-size: 13px; color: var(--muted); }
.next { margin-top: 20px; }
.next ul { padding-left: 18px; margin-top: 4px; }
.next li { padding: 2px 0; }
.next span { color: var(--muted); margin-right: 6px; }
code { font: 15px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--zone); border-radius: 4px;
  padding: 3px 7px; }
h2 { font-size: 19px; line-height: 1.3; margin-bottom: 6px; }
section p { margin-bottom: 14px; }
figure > svg { display: block; width: 100%; max-width: 460px; height: auto; overflow: visible; }
.option { white-space: nowrap; }
#moves figure > svg path { shape-rendering: crispEdges; }
figure > svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: 14px; margin-top: 8px; }
.key { list-style: none; padding: 0; margin-top: 10px; display: grid; gap: 6px; font-size: 14px; }
.key li { display: flex; align-items: center; gap: 10px; }
.key svg { width: 26px; height: 26px; flex: none; outline: 1px solid var(--rule); }
details { margin-top: 10px; font-size: 14px; }
summary { color: var(--muted); cursor: pointer; }
.scroll { overflow-x: auto; max-height: 420px; overflow-y: auto; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 0 4px 12px; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.facts { border-top: 1px solid var(--rule); font-size: 15px; }
.facts div { display: grid; grid-template-columns: 8.5em minmax(0, 1fr); gap: 12px; padding: 6px 0;
  border-bottom: 1px solid var(--rule); }
.facts dt { color: var(--muted); }
@media (min-width: 860px) { main { grid-template-columns: repeat(2, minmax(0, 1fr)); padding-top: 56px; }
  main { grid-template-rows: auto auto auto 1fr; } #tensors { grid-row: span 2; } }
@media print { main { padding: 0; gap: 26px 36px; grid-template-columns: repeat(2, minmax(0, 1fr)); } details { display: none; }
  section, .numbers { break-inside: avoid; } body { font-size: 12px; } h1 { font-size: 40px; } h2 { font-size: 14px; }
  .why, .sure { font-size: 14px; } .numbers dd { font-size: 18px; } figcaption, .key, .facts, .kicker { font-size: 11px; }
  .facts div { padding: 2px 0; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
