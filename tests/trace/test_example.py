"""The example prints what its reader is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_trace.py"


def test_the_example_prints_its_known_output() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "kernels: {'dispatch': 3, 'mlp': 3}",
        "faults: 0",
        "more than half of the communication is hidden: True",
    ]
