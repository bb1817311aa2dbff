"""What pyproject.toml cannot say: the kernel, which is built where there is a C compiler, and README.md for an index.

FARCAST_ENGINE=numpy leaves the kernel out, FARCAST_ENGINE=native makes it an error that it cannot be built. An index shows
README.md without the links and pictures that lead nowhere there.
"""

import os
import re
from pathlib import Path

from setuptools import Extension, setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:)[^)]*\)")
PICTURE = re.compile(r"<img\b[^>]*>\s*")
ENGINE = os.environ.get("FARCAST_ENGINE", "")
EXACT = ["-ffp-contract=off", "-fno-fast-math"]  # every operation rounds by itself
FAST = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-g0"]
KERNEL = Extension(
    "farcast_cli.engine._kernel",
    ["farcast_cli/engine/_kernel.c"],
    py_limited_api=True,
    optional=ENGINE != "native",
    extra_compile_args=["/O2", "/fp:precise", "/std:c11"] if os.name == "nt" else [*EXACT, *FAST],
)

setup(
    long_description=RELATIVE_LINK.sub(r"\1", PICTURE.sub("", README)),
    long_description_content_type="text/markdown",
    ext_modules=[] if ENGINE == "numpy" else [KERNEL],
    options={} if ENGINE == "numpy" else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
