"""The example runs as written; options and metrics that docs/serve.md names exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from whalefall.serve.units.metrics import COUNTERS, UnitsCollector

ROOT = Path(__file__).parents[3]
EXAMPLE = """\
units lost on the way: 1
same tokens: True
same logprobs, bit for bit: True
prompt tokens that decode units computed: 0
tar - an archiving utility
"""


@pytest.mark.ranks
def test_the_example_says_what_it_should() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "06_inference.py")],
        capture_output=True, text=True, timeout=200, env={**os.environ, "WHALEFALL_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == EXAMPLE, done.stderr


def section() -> str:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    return text[text.index("## Units") :]


def test_the_options_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`?(--[a-z-]+)", section()))
    done = subprocess.run(
        [sys.executable, "-m", "whalefall", "serve", "--help"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert {name for name in named if name not in done.stdout} == set()


def test_the_metrics_that_the_page_names_exist() -> None:
    source = Path(sys.modules[UnitsCollector.__module__].__file__ or "").read_text()
    source += (ROOT / "src/whalefall/serve/metrics.py").read_text()
    for name in re.findall(r"`whalefall_(\w+)`", section()):
        stem = name.removesuffix("_total").removeprefix("unit_")
        known = stem in COUNTERS or f'"{stem}"' in source or f"whalefall_{stem}" in source
        assert known or stem.startswith("expert_balance_"), name
