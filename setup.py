"""What pyproject.toml cannot say: the description on a package index is README.md without the links that lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:)[^)]*\)")

setup(long_description=RELATIVE_LINK.sub(r"\1", README), long_description_content_type="text/markdown")
