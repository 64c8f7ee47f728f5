"""The example and the page's first code run as they are written, with the output they promise."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

from whalefall.data.graysort import make_records

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_prints_what_it_should() -> None:
    lines = run(str(ROOT / "examples" / "05_smallpond.py")).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["ticker", "min(price)", "max(price)"],
        ["AMZN", "100", "106"],
        ["GOOG", "100", "106"],
        ["MSFT", "100", "106"],
    ]
    assert lines[4] == (
        "[{'ticker': 'MSFT', 'name': 'Microsoft'}, {'ticker': 'GOOG', 'name': '?'}]"
    )
    total = sum(zlib.crc32(row) for row in make_records(1_000_000))
    assert lines[5] == f"1000000 records, checksum {total:x}, in order: True"


def test_the_first_code_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    out = run("-c", code)
    assert "[{'city': 'A', 'total':" in out
    assert "SqlEngineNode" in out and "HashPartitionNode" in out
