"""The GPU kernels: in Triton's interpreter, compiled for sm_90a, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHECKS = str(Path(__file__).parent / "triton_checks.py")

DRY = """
import sys, time, torch
from benchmarks import _gpu
results = []
def clock(call):
    results.append(call())
    return 0.5
later = time.monotonic() + 3600
assert _gpu.report(_gpu.every("cpu", torch.float16, 64), clock, later) == 0
decoded = [r for r in results if isinstance(r, tuple) and r[0].shape[-1] == 512]
assert len(decoded) == 6 and all(x.isfinite().all() and (x != 0).any() for r in decoded for x in r)
assert _gpu.report(_gpu.limits("cpu", 16), clock, 0) == 2
"""


def run(*arguments: str, limit: float | None = None, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], timeout=limit,
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_the_kernels_agree_with_float64_in_the_interpreter() -> None:
    assert run(CHECKS, TRITON_INTERPRET="1").endswith("passed\n")


def test_the_kernels_compile_for_sm_90a_with_wgmma_and_no_spills() -> None:
    assert run(CHECKS, "compile").endswith("passed\n")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["5 130 200", "128 576 7168", "100 2112 1536"])
def test_the_kernels_agree_with_float64_on_the_gpu(shape: str) -> None:
    assert run(CHECKS, "gpu", *shape.split(), limit=120).endswith("passed\n")


def test_the_timings_of_make_gpu_run_dry() -> None:
    """At tiny sizes in the interpreter, by a clock that calls once: all rows, then the deadline."""
    rows = run("-c", DRY, TRITON_INTERPRET="1").splitlines()
    for kernel, count in (
        *(("fp8_gemm_nt ", 5), ("m_grouped contiguous", 1), ("m_grouped masked", 1)),
        *(("per_token_cast_to_fp8", 2), ("MLA decode bf16", 3), ("MLA decode fp8", 1)),
        *(("MLA decode sparse bf16", 1), ("MLA decode sparse fp8", 1), ("torch bf16", 2)),
    ):
        assert sum(row.startswith(kernel) for row in rows) == count, (kernel, rows)
    assert sum("not timed: past the deadline" in row for row in rows) == 2
    assert sum("410 TFLOPS" in row for row in rows) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("sys.modules['torch'] = None", "no torch: "),
        ("sys.modules['triton'] = None", "no triton: "),
        ("import torch; torch.cuda.is_available = lambda: False", "no CUDA device: "),
    ],
)
def test_make_gpu_says_in_a_line_what_is_missing(spoil: str, words: str) -> None:
    script = f"import sys; {spoil}; from benchmarks import _gpu; print(_gpu.main())"
    line, code = run("-c", script).splitlines()
    assert line.startswith(f"benchmarks/_gpu.py: {words}") and code == "2"
