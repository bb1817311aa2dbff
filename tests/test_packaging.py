"""The source distribution holds what `make test` needs, the wheel the package alone, and the site every page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import farcast_cli

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "docs", "farcast_cli", "sample_checkpoints", "tests")
FILES = (
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Containerfile", "LICENSE", "MANIFEST.in", "Makefile", "README.md"),
    *("SECURITY.md", "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py"),
)
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "*.egg-info", "*.py[cod]", "*.so", "__pycache__", "build", "demo", "dist", "out", "site"
)
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="the kernel needs a C compiler")
STEM = f"farcast-{farcast_cli.__version__}"


@dataclass(frozen=True, slots=True)
class Distributions:
    """A source distribution, unpacked, and the wheel that was built from it."""

    source: Path
    wheel: Path

    def names_in_wheel(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as file:
            return file.namelist()

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as file:
            return message_from_string(file.read(f"{STEM}.dist-info/METADATA").decode())


def build(kind: str, *, source: Path, output: Path, env: Mapping[str, str] | None = None) -> Path:
    """What pip and build do with the backend of pyproject.toml, without a network or an environment of its own."""
    call = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    environment = os.environ | (env or {})
    subprocess.run([sys.executable, "-c", call, str(output)], cwd=source, check=True, capture_output=True, env=environment)
    return next(path for path in output.iterdir() if path.suffix == {"sdist": ".gz", "wheel": ".whl"}[kind])


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCE)
    with tarfile.open(build("sdist", source=folder / "checkout", output=folder)) as file:
        file.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)  # from Python 3.11.4 on
        file.extractall(folder)  # noqa: S202 - it is our own
    wheel = build("wheel", source=folder / STEM, output=folder, env={"FARCAST_ENGINE": "numpy"})
    return Distributions(source=folder / STEM, wheel=wheel)


def kernels_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return [name for name in file.namelist() if name.startswith("farcast_cli/engine/_kernel")]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_holds_every_file_that_the_tests_and_the_makefile_need(distributions: Distributions) -> None:
    checkout = distributions.source.parent / "checkout"
    for name in FOLDERS:
        assert files_below(checkout / name) == files_below(distributions.source / name)
    assert [name for name in FILES if not (distributions.source / name).is_file()] == []


def test_scripts_of_the_source_distribution_can_be_run(distributions: Distributions) -> None:
    assert (distributions.source / "farcast_cli/scripts/periodic.sh").stat().st_mode & 0o111


def test_the_wheel_holds_the_package_and_nothing_else(distributions: Distributions) -> None:
    names = distributions.names_in_wheel()
    assert {name.split("/")[0] for name in names} == {"farcast_cli", f"{STEM}.dist-info"}
    package = {name.removeprefix("farcast_cli/") for name in names if name.startswith("farcast_cli/")}
    assert package == files_below(distributions.source / "farcast_cli") - {"engine/_kernel.c"}


@NEEDS_COMPILER
def test_the_kernel_is_built_where_there_is_a_compiler_for_every_python_from_3_11_on(
    distributions: Distributions, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(distributions.source, tmp_path / "source"))
    wheel = build("wheel", source=source, output=tmp_path, env={"FARCAST_ENGINE": ""})
    assert kernels_in(wheel) == ["farcast_cli/engine/_kernel.abi3.so"]
    assert "-cp311-abi3-" in wheel.name


def test_a_machine_without_a_compiler_builds_the_package_without_the_kernel(
    distributions: Distributions, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(distributions.source, tmp_path / "source"))
    assert kernels_in(build("wheel", source=source, output=tmp_path, env={"CC": "false", "FARCAST_ENGINE": ""})) == []


def test_a_build_that_must_have_the_kernel_fails_without_a_compiler(distributions: Distributions, tmp_path: Path) -> None:
    source = Path(shutil.copytree(distributions.source, tmp_path / "source"))
    with pytest.raises(subprocess.CalledProcessError):
        build("wheel", source=source, output=tmp_path, env={"CC": "false", "FARCAST_ENGINE": "native"})


def test_the_wheel_says_that_the_package_is_typed_and_under_which_licence(distributions: Distributions) -> None:
    names = distributions.names_in_wheel()
    assert {"farcast_cli/py.typed", f"{STEM}.dist-info/licenses/LICENSE"} <= set(names)
    metadata = distributions.metadata()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_description_of_the_wheel_is_the_readme_without_links_that_lead_nowhere(distributions: Distributions) -> None:
    metadata, readme = distributions.metadata(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown"
    described = metadata.get_payload()
    assert [link for link in re.findall(r"\]\(([^)]*)\)", str(described)) if not link.startswith("https://")] == []
    assert "<img" not in str(described)
    text = re.sub(r"<img[^>]*>\s*", "", readme)
    assert re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).strip() == str(described).strip()


def test_the_wheel_has_the_topics_and_scripts(distributions: Distributions) -> None:
    assert {"farcast_cli/topics/resume.md", "farcast_cli/scripts/periodic.sh"} <= set(distributions.names_in_wheel())


def test_the_newest_release_in_the_changelog_is_the_version_of_the_package() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == farcast_cli.__version__
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", headings[1][1])


def test_the_wheel_installs_the_command(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as file:
        assert "farcast = farcast_cli.__main__:main" in file.read(f"{STEM}.dist-info/entry_points.txt").decode()


def test_the_navigation_of_the_site_names_every_page_once() -> None:
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(named) == sorted([*pages, "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "index.md"])


def test_the_citation_names_the_version_of_the_package() -> None:
    assert f"\nversion: {farcast_cli.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
