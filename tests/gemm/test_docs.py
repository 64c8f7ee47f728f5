"""The page's first example, the example program and the figure, as written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from whalefall.gemm.commands import app

ROOT = Path(__file__).parents[2]
EXAMPLE = """\
values float8_e4m3fn (256, 1024) scales (256, 8) and (3, 8)
dense: difference from the unquantised product 7e-04
accumulated: True
grouped: 7e-04, zeros: True
a row alone has the same bits: True
"""


def output(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_first_example_of_the_page_prints_what_it_says() -> None:
    page = (ROOT / "docs/gemm.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    assert output("-c", code[1]) == "True\n(1, 256)\n"


def test_the_example_program_prints_what_it_says() -> None:
    assert output(str(ROOT / "examples/03_deep_gemm.py")) == EXAMPLE


def test_the_figure_shows_two_levels_below_a_fifth_of_one(tmp_path: Path) -> None:
    path = tmp_path / "curves.svg"
    done = CliRunner().invoke(app, ["accumulation", "--svg", str(path), "--json"])
    assert done.exit_code == 0
    last = json.loads(done.stdout)[-1]
    assert last["k"] == 16384
    assert last["two_level"] * 5 <= last["one_level"]
    assert path.read_text(encoding="utf-8").startswith("<svg")
