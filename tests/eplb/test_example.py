"""The example prints what its reader is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_eplb.py"


def test_the_example_prints_its_known_output() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "layer 0: utilisation 0.855, at best 0.880",
        "layer 1: utilisation 0.805, at best 0.840",
        "experts of GPU 0, layer 0: [2, 4]",
        "layer 0: 0.537 -> 0.826, 1 moves",
        "layer 1: 0.514 -> 0.755, 2 moves",
    ]
