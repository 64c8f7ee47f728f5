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
LINE = re.compile(r"^\| `(test_\w+\.py)`(?: `(\w+)`)?(,[^|]*)? \| (\d+|–) \| (passes|fails)", re.M)


def promised(page: str) -> dict[str, str]:
    """`script function, part` → passes or fails, as the page says."""
    found = {}
    for script, function, part, _, verdict in LINE.findall((ROOT / "docs" / page).read_text()):
        found[f"{script} {function}".strip() + part] = verdict
    return found


@pytest.mark.parametrize("page", ["gemm.md", "attention.md", "ep.md"])
def test_the_pages_have_a_table(page: str) -> None:
    assert len(promised(page)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "variable", "runner"),
    [
        ("gemm.md", "DEEPGEMM_CHECKOUT", "originals.py"),
        ("attention.md", "FLASHMLA_CHECKOUT", "originals.py"),
        ("ep.md", "DEEPEP_CHECKOUT", "originals_ep.py"),
    ],
)
def test_the_originals_scripts_pass_and_fail_as_the_page_says(
    page: str, variable: str, runner: str
) -> None:
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"{variable} names no checkout of the original")
    command = [sys.executable, f"tests/compat/{runner}", str(Path(checkout) / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line[4:].split(" | ") for line in done.stdout.splitlines() if line.startswith("ROW ")]
    seen = {name: "passes" if said == "passed" else "fails" for name, _, said in rows}
    assert seen == promised(page), rows
