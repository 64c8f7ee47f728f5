"""Day 3, DeepGEMM: an FP8 product, a grouped one for a mixture of experts, and a linear layer."""

import numpy as np

from whalefall import gemm

rng = np.random.default_rng(0)
m, n, k, experts = 256, 384, 1024, 4
x = rng.standard_normal((m, k)).astype(np.float32)
weights = rng.standard_normal((experts, n, k)).astype(np.float32)

# FP8 values with one scale for each 128 of a row of x, and for each 128 x 128 block of a weight.
a = gemm.per_token_cast_to_fp8(x, use_ue8m0=False)
blocks = [gemm.per_block_cast_to_fp8(w, use_ue8m0=False) for w in weights]
print("values", a[0].dtype, a[0].shape, "scales", a[1].shape, "and", blocks[0][1].shape)

# D = A · Bᵀ, written into memory of the caller's; then the same again, added.
d = np.empty((m, n), np.float32)
gemm.fp8_gemm_nt(a, blocks[0], d)
print(f"dense: difference from the unquantised product {gemm.calc_diff(d, x @ weights[0].T):.0e}")
twice = d.copy()
gemm.fp8_gemm_nt(a, blocks[0], twice, c=twice)
print("accumulated:", np.array_equal(twice, d + d))

# Grouped: rows sorted by expert; rows of no expert (-1) become zero.
index = np.repeat(np.array([0, 1, -1, 3], np.int32), m // 4)
b = (np.stack([v for v, _ in blocks]), np.stack([s for _, s in blocks]))
gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, index)
wanted = np.concatenate([x[index == e] @ weights[e].T for e in (0, 1, 3)])
print(f"grouped: {gemm.calc_diff(d[index >= 0], wanted):.0e}, zeros: {not d[index < 0].any()}")

# A linear layer over a checkpoint's own FP8 weight; within a form a row's bits do not depend on M.
y = gemm.fp8_linear(x, *blocks[0], form="few")
alone = gemm.fp8_linear(x[7:8], *blocks[0], form="few")
print("a row alone has the same bits:", np.array_equal(alone[0], y[7]))
