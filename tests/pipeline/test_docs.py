"""The first example of these rooms' pages runs as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "said"),
    [("pipeline.md", "32.0 2.0 5"), ("eplb.md", "replicas move"), ("trace.md", "under compute")],
)
def test_the_pages_example_runs(page: str, said: str) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.group(1)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said in done.stdout
