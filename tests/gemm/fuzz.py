"""Run as a script: random shapes, strides, groups and codes through every native entry.

`python fuzz.py ROUNDS FLAGS…` builds the units with the compiler FLAGS (a sanitizer's).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ml_dtypes
import numpy as np

from tests.gemm.operands import bf16, error, fp8
from whalefall import gemm, jit

build = jit.build


def padded(rng: np.random.Generator, array: Any) -> Any:
    """The same values, rows further apart, starting at any byte."""
    extra = int(rng.integers(0, 5))
    memory = np.zeros((*array.shape[:-1], array.shape[-1] + extra), array.dtype)
    view = memory[..., : array.shape[-1]]
    view[...] = array
    return view


def activations(rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    """Fp32, or bf16, which other instructions multiply where the machine has them."""
    return rng.standard_normal(shape).astype([np.float32, ml_dtypes.bfloat16][rng.integers(2)])


def dense(rng: np.random.Generator, size: Any) -> None:
    m, n, k = size()
    layout = rng.choice(["nt", "nn", "tn", "tt"])
    recipe = [(1, 128, 128), (1, 1, 128), (1, 1, 32)][rng.integers(3)]
    a, exact_a = fp8(rng, (m, k), (recipe[0], recipe[2]))
    b, exact_b = fp8(rng, (n, k), (recipe[1], recipe[2]))
    left = (a[0].T.copy(), a[1].T) if layout[0] == "t" else (padded(rng, a[0]), a[1])
    right = (b[0].T.copy(), b[1].T) if layout[1] == "n" else (padded(rng, b[0]), b[1])
    d = padded(rng, rng.standard_normal((m, n)).astype(np.float32))
    c = d.copy()
    getattr(gemm, f"fp8_gemm_{layout}")(left, right, d, c=d, recipe=recipe)
    assert error(d, exact_a, exact_b, c) < 2e-6


def grouped(rng: np.random.Generator, size: Any) -> None:
    m, n, k = size()
    groups = int(rng.integers(1, 5))
    index = np.sort(rng.integers(-1, groups, m)).astype(np.int32)
    a, exact_a = fp8(rng, (m, k))
    b, exact_b = fp8(rng, (groups, n, k), (128, 128))
    d = np.full((m, n), 3, np.float32)
    gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, index)
    for g in range(groups):
        assert error(d[index == g], exact_a[index == g], exact_b[g]) < 2e-6
    assert not d[index < 0].any()


def linears(rng: np.random.Generator, size: Any) -> None:
    m, n, k = size()
    (w, scale), exact = fp8(rng, (n, k), (128, 128))
    x = padded(rng, activations(rng, (m, k)))
    for form in ("few", "many"):
        y = gemm.fp8_linear(x, w, scale, form, out_dtype="float32")
        assert error(y, x.astype(np.float64), exact) < 2e-6
        gemm.fp8_linear(x, w, scale, form, quantize_activations=True)
        plain = bf16(rng, (n, k))
        y = gemm.linear(x, plain, form, out_dtype="float32")
        assert error(y, x.astype(np.float64), plain.astype(np.float64)) < 2e-6


def experts(rng: np.random.Generator, size: Any) -> None:
    tokens, width, hidden = size()
    count, topk = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    weights = []
    for _ in range(count):
        w1, w3 = fp8(rng, (width, hidden), (128, 128))[0], fp8(rng, (width, hidden), (128, 128))[0]
        w2 = fp8(rng, (hidden, width), (128, 128))[0]
        weights.append(gemm.ExpertWeights(w1[0], w3[0], w2[0], w1[1], w3[1], w2[1]))
    x = activations(rng, (tokens, hidden))
    x *= x.dtype.type(1e-3)
    idx = rng.integers(-1, count, (tokens, topk)).astype(np.int32)
    few = gemm.fused_experts(x, weights, idx, "few", out_dtype="float32")
    many = gemm.fused_experts(x, weights, idx, "many", out_dtype="float32")
    assert np.abs(few - many).max() <= 1e-3 * max(np.abs(few).max(), 1e-30)
    assert not few[idx < 0].any()


def main(rounds: int, flags: tuple[str, ...]) -> None:
    os.environ.pop("LD_PRELOAD", None)  # the sanitizer is for this process, not for the compiler
    jit.build = lambda source, *a, **k: build(source, *a, **{**k, "flags": flags})
    rng = np.random.default_rng(0)

    def size() -> tuple[int, int, int]:
        return tuple(int(v) for v in rng.integers(1, [40, 150, 420]))  # type: ignore[return-value]

    for _ in range(rounds):
        for case in (dense, grouped, linears, experts):
            case(rng, size)
    print("passed")


if __name__ == "__main__":
    main(int(sys.argv[1]), tuple(sys.argv[2:]))
