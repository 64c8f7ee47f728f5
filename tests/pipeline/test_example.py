"""The example prints what its reader is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_dualpipe.py"


@pytest.mark.ranks
def test_the_example_prints_its_known_output() -> None:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "losses: 4; gradients equal one process's: True"
