"""The GPU kernels: in Triton's interpreter, compiled for sm_90a, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments: str, **variables: str) -> str:
    script = str(Path(__file__).parent / "triton_checks.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_the_kernels_agree_with_float64_in_the_interpreter() -> None:
    assert run(TRITON_INTERPRET="1").endswith("passed\n")


def test_the_kernels_compile_for_sm_90a_with_wgmma_and_no_spills() -> None:
    assert run("compile").endswith("passed\n")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["5 130 200", "128 576 7168", "100 2112 1536"])
def test_the_kernels_agree_with_float64_on_the_gpu(shape: str) -> None:
    assert run("gpu", *shape.split()).endswith("passed\n")
