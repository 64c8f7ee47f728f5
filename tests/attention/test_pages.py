"""The example and the first code of the docs page run and say what they should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_says_what_it_should() -> None:
    assert run("examples/01_flash_mla.py").splitlines() == [
        "out (2, 1, 16, 512) lse (2, 16, 1)",
        "agrees with the definition: True",
        "same bits alone: True",
    ]


def test_the_first_code_of_the_page_runs() -> None:
    page = (ROOT / "docs/attention.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    assert run("-c", code[1]) == "(1, 1, 16, 512) (1, 16, 1)\n"
