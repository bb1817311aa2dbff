"""A hook of mkdocs: the site also has the pages that stand beside docs/, with README.md as its start page."""
# ruff: noqa: INP001 - a script beside the pages that it serves

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}


def within_site(markdown: str) -> str:
    """A page's text with its links and pictures as the site has them, all in one folder."""
    markdown = markdown.replace('src="docs/', 'src="')
    return re.sub(r"\]\((?:docs/|\.\./)?(README\.md)?", lambda match: "](" + ("index.md" if match[1] else ""), markdown)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Mend the links of every page."""
    return within_site(markdown)
