"""Pages say what is there: the first example of each runs, the maps match the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from whalefall import env

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def first_example(page: Path) -> str | None:
    found = re.search(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return found.group(1) if found else None


WITH_EXAMPLE = [page for page in PAGES if first_example(page)]


@pytest.mark.parametrize("page", WITH_EXAMPLE, ids=lambda page: page.stem)
def test_the_first_example_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "example.py"  # a file: examples may start processes that import it
    script.write_text(first_example(page) or "", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_readme_lists_exactly_the_rooms_there_are() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text("utf-8"), re.M))
    packages = {p.parent.name for p in (ROOT / "src/whalefall").glob("*/__init__.py")}
    assert listed == packages - {"cli", "compat", "testing"}


def test_every_room_has_a_page_that_the_readme_links() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    links = set(re.findall(r"\]\((docs/[\w/.]+|CONTRIBUTING\.md|examples/)\)", text))
    missing = sorted(link for link in links if not (ROOT / link).exists())
    assert not missing


def test_the_environment_page_is_the_table() -> None:
    assert env.markdown() in (ROOT / "docs/environment.md").read_text("utf-8")


def test_nothing_names_a_machines_path_or_a_registry() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    # Built of parts, so that this file does not name what it looks for.
    forbidden = re.compile("|".join(["/" + "work/", "/" + "root/", "pypi" + r"\.org"]))
    found = []
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".cpp", ".h", ".json", ".txt", ".yaml", ""}:
            text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
            found += [f"{name}: {hit}" for hit in set(forbidden.findall(text))]
    assert not found


def test_make_and_the_docs_name_the_compilers_that_are_tried() -> None:
    from whalefall.jit.compiler import NAMES

    assert f"the first of {', '.join(NAMES)} and the ziglang" in env.markdown()
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(f"command -v {name} " in makefile for name in NAMES)


def test_readme_names_the_extra_of_each_example_that_needs_one() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    (row,) = [line for line in readme.splitlines() if "whalefall.compat --device" in line]
    assert "'.[torch]'" in row
    assert "`04_dualpipe.py` needs `pip install -e '.[torch]'`" in readme
    assert "`05_smallpond.py` needs `'.[data]'`" in readme
