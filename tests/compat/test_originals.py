"""The tables of docs/gemm.md, attention.md and ep.md say what the originals' own tests say.

Where the originals are: the folders named by DEEPGEMM_CHECKOUT, FLASHMLA_CHECKOUT, DEEPEP_CHECKOUT.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"^\| `(test_\w+\.py)`(?: `(\w+)`)?(,[^|]*)? \| (\d+|–) \| (passes|fails|no case)", re.M
)
Rows = dict[str, tuple[str, str]]  # script function, part: cases, verdict


def promised(page: str) -> Rows:
    """What the page says; cases of what fails are not told."""
    found = {}
    for script, function, part, cases, verdict in LINE.findall((ROOT / "docs" / page).read_text()):
        name = f"{script} {function}".strip() + part
        found[name] = ("–" if verdict == "fails" else cases, verdict)
    return found


def seen_in(printed: str) -> Rows:
    """The same of what a runner printed."""
    found = {}
    for line in printed.splitlines():
        if line.startswith("ROW "):
            name, cases, said = line[4:].split(" | ", 2)
            verdict = {"passed": "passes", "no case": "no case"}.get(said, "fails")
            found[name] = ("–" if verdict == "fails" else cases, verdict)
    return found


@pytest.mark.parametrize("page", ["gemm.md", "attention.md", "ep.md"])
def test_the_pages_have_a_table(page: str) -> None:
    assert len(promised(page)) >= 5


GENERATORS = """
def enumerate_sf_layout():
    for mn in range(40):
        yield 8 * mn, 1024, False

def generate_normal():
    pass
"""
SCRIPT = """
from generators import enumerate_sf_layout, generate_normal

def test_sf_layout_kernels():
    cases = list(enumerate_sf_layout())
    assert [case[0] for case in cases] == list(range(4, 40, 5)), cases

def test_k_grouped_sf_layout_kernels():
    pass

def test_k_grouped_psum_sf_layout_kernels():
    generate_normal()
    generate_normal()
"""


def test_each_script_gets_the_enumerations_cut_once(tmp_path: Path) -> None:
    """And a function that looks at no case has not passed."""
    (tmp_path / "generators.py").write_text(GENERATORS)
    (tmp_path / "test_lazy_init.py").write_text("def original_main(): pass")
    (tmp_path / "test_layout.py").write_text(SCRIPT)
    scripts = ["test_layout.py", "test_lazy_init.py", "test_layout.py"]
    command = [sys.executable, "tests/compat/originals.py", str(tmp_path), *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    first = [row.removeprefix("ROW test_layout.py ") for row in rows[:3]]
    assert first == [
        "test_sf_layout_kernels | 8 | passed",
        "test_k_grouped_sf_layout_kernels | 0 | no case",
        "test_k_grouped_psum_sf_layout_kernels | 2 | passed",
    ], done.stderr
    assert rows[3] == "ROW test_lazy_init.py | – | passed"
    assert rows[4:] == rows[:3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "variable", "runner"),
    [
        ("gemm.md", "DEEPGEMM_CHECKOUT", "originals.py"),
        ("attention.md", "FLASHMLA_CHECKOUT", "originals.py"),
        ("ep.md", "DEEPEP_CHECKOUT", "originals_ep.py"),
    ],
)
def test_the_originals_scripts_run_as_many_cases_and_end_as_the_page_says(
    page: str, variable: str, runner: str
) -> None:
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"{variable} names no checkout of the original")
    command = [sys.executable, f"tests/compat/{runner}", str(Path(checkout) / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert seen_in(done.stdout) == promised(page), done.stdout[-4000:]
