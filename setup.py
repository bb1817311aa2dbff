"""What pyproject.toml cannot say: an index shows README.md without the links and pictures that lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:)[^)]*\)")
PICTURE = re.compile(r"<img\b[^>]*>\s*")

setup(long_description=RELATIVE_LINK.sub(r"\1", PICTURE.sub("", README)), long_description_content_type="text/markdown")
