"""No access outside the caller's arrays: the fuzzer on plain units, and under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whalefall import jit

ROOT = Path(__file__).parents[2]


def fuzz(rounds: int, *flags: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fuzz.py"), str(rounds), *flags],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("passed\n")


def test_a_short_fuzz_of_every_entry() -> None:
    fuzz(8)


@pytest.mark.slow
@pytest.mark.parametrize("level", jit.levels())
def test_a_long_fuzz_under_sanitizers(level: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++'s sanitizer libraries")
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
    fuzz(
        60, *flags,
        LD_PRELOAD=":".join(libraries), ASAN_OPTIONS="detect_leaks=0", WHALEFALL_ISA=level,
    )  # fmt: skip
