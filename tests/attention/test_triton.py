"""The Triton kernel: in Triton's interpreter against float64, and compiled for sm_90a offline."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

INTERPRETED = """
    import numpy as np, torch
    from tests.attention.closeness import close_decode
    from tests.attention.problems import dense, dense_expected, fp8_rows, sparse_expected
    from whalefall.attention import dequantize_kv_cache
    from whalefall.attention.triton import decode

    tensor = torch.from_numpy  # float16: the interpreter's dot knows no bfloat16

    for heads, causal, fp8, long in [(3, True, False, 70), (20, False, True, 70)]:
        p = dense(2, 2, long, heads, 1, True, dtype=np.float16)
        p.table[p.table > 1 << 20] = 0
        cache, plain = p.cache, None
        if fp8:
            cache = fp8_rows(np.random.default_rng(0), p.cache.shape[:3])
            plain = dequantize_kv_cache(cache)
        given = torch.from_numpy(cache) if fp8 else tensor(cache)
        out, lse = decode(tensor(p.q), given, torch.from_numpy(p.table),
                          torch.from_numpy(p.lengths), 576**-0.5, causal, fp8)
        want, want_lse = dense_expected(p, 512, 576**-0.5, causal, plain)
        close_decode(out.float().numpy(), want, lse.numpy(), want_lse)

    p = dense(1, 2, 64, 4, 1, False, dtype=np.float16)
    index = np.array([[[0, 5, -1, 9, 5, 2**31 - 1], [7, 1, 2, 3, 4, 5]]], np.int32)
    rows = p.cache.reshape(-1, 576)
    rows[np.isnan(rows.astype(np.float32)).any(axis=1)] = 0
    sink = np.array([0.5, -np.inf, np.inf, 1], np.float32)
    out, lse = decode(tensor(p.q), tensor(p.cache), torch.from_numpy(index),
                      torch.tensor([5], dtype=torch.int32), 0.1, sparse=True,
                      attn_sink=torch.from_numpy(sink))
    keys = [rows[[0, 5, 9, 5]], rows[[7, 1, 2, 3, 4]]]
    want, _, want_lse = sparse_expected(p.q[0], keys, 512, 0.1, sink)
    close_decode(out[0].float().numpy(), want, lse[0].T.numpy(), want_lse)
    print("agrees")
"""

COMPILED = """
    import os, re, subprocess, sys, tempfile
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from whalefall.attention.triton import mla_decode_kernel

    fp8 = sys.argv[1] == "fp8"
    pointers = {"q": "*bf16", "latent": "*u8" if fp8 else "*bf16",
                "scales": "*fp32" if fp8 else "*bf16", "rope": "*bf16", "where": "*i32",
                "lengths": "*i32", "out": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    constants = {"FP8": fp8, "SPARSE": False, "BLOCK_H": 64, "BLOCK_N": 32, "LATENT": 512,
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
    # FP8: one register goes to the stack, once; BF16: none
    assert spills and max(spills) <= (4 if fp8 else 0), words
    assert done.metadata.shared <= 227 * 1024, done.metadata.shared
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_the_kernel_agrees_with_float64_in_the_interpreter() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1").endswith("agrees\n")


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_the_kernel_compiles_for_sm_90a_with_wgmma_and_next_to_no_spills(kind: str) -> None:
    assert "registers" in run(COMPILED, kind)
