"""The Triton kernel: in Triton's interpreter, compiled for sm_90a, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHECKS = str(Path(__file__).parent / "triton_checks.py")

COMPILED = """
    import os, re, subprocess, sys, tempfile
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from whalefall.attention.triton import mla_decode_kernel

    fp8, sparse = "fp8" in sys.argv[1], "sparse" in sys.argv[1]
    pointers = {"q": "*bf16", "latent": "*u8" if fp8 else "*bf16",
                "scales": "*fp32" if fp8 else "*bf16", "rope": "*bf16", "where": "*i32",
                "lengths": "*i32", "out": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    constants = {"FP8": fp8, "SPARSE": sparse, "BLOCK_H": 64, "BLOCK_N": 32, "LATENT": 512,
                 "ROPE": 64, "RUNS": 16, "PAGE": 64}
    names = mla_decode_kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    multiples = [n for n in names[:16] if n not in ("lengths", "where")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples}
    source = ASTSource(mla_decode_kernel, signature, constants, attributes)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    done = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 8, "num_stages": 2})
    ptx = done.asm["ptx"]
    assert "wgmma.mma_async" in ptx, "no wgmma"
    tool = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ran = subprocess.run([tool, "-v", "--gpu-name=sm_90a", file.name, "-o", file.name + ".o"],
                             capture_output=True, text=True)
    words = ran.stdout + ran.stderr
    assert ran.returncode == 0, words
    print(re.search(r"Used \\d+ registers", words)[0], "shared", done.metadata.shared)
    spills = [int(n) for n in re.findall(r"(\\d+) bytes spill", words)]
    # FP8: one register goes to the stack, once; BF16: none; by indices: 23
    assert spills and max(spills) <= (96 if sparse else 4 if fp8 else 0), words
    assert done.metadata.shared <= 227 * 1024, done.metadata.shared
"""


def run(*arguments: str, limit: float | None = None, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], timeout=limit,
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_the_kernel_agrees_with_float64_in_the_interpreter() -> None:
    assert run(CHECKS, "cpu", TRITON_INTERPRET="1").endswith("passed\n")


@pytest.mark.gpu
def test_the_kernel_agrees_with_float64_on_the_gpu() -> None:
    assert run(CHECKS, "cuda", limit=180).endswith("passed\n")


@pytest.mark.parametrize("kind", ["bf16", "fp8", "sparse bf16", "sparse fp8"])
def test_the_kernel_compiles_for_sm_90a_with_wgmma_and_few_spills(kind: str) -> None:
    assert "registers" in run("-c", textwrap.dedent(COMPILED), kind)
