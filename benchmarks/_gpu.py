"""Times the GPU paths beside the card's own limits: `make gpu`, needs numpy, torch and Triton.

Copy bandwidth and cuBLAS BF16 are measured in the same run. Published for an H800: 1,350 to 1,550
TFLOPS (DeepGEMM FP8), 3,000 GB/s and 580 to 660 TFLOPS (FlashMLA decode).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.testing import do_bench

from whalefall.attention import flash_mla_with_kvcache
from whalefall.gemm import triton as kernels


def limits() -> tuple[float, float]:
    """Prints the card's copy bandwidth and cuBLAS rate; returns them in GB/s and TFLOPS."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copied = 2 * x.numel() / do_bench(lambda: y.copy_(x)) / 1e6
    print(f"copy: {copied:.0f} GB/s")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / do_bench(lambda: a @ a) / 1e9
    print(f"cuBLAS bf16 8192^3: {rate:.0f} TFLOPS")
    return copied, rate


def gemm(cublas: float) -> None:
    """The original's dense shapes at M = 4096."""
    for n, k in [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)]:
        m = 4096
        a = kernels.per_token_cast_to_fp8(torch.randn(m, k, device="cuda"), False)
        b = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
        scales = torch.ones(-(-n // 128), k // 128, device="cuda")
        d = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

        def call(a=a, b=b, scales=scales, d=d) -> None:  # type: ignore[no-untyped-def]
            kernels.fp8_gemm_nt(a, (b, scales), d)

        rate = 2 * m * n * k / do_bench(call) / 1e9
        share = rate / cublas
        print(f"fp8_gemm_nt {m}x{n}x{k}: {rate:.0f} TFLOPS, {share:.2f} of cuBLAS bf16")


def decode(copied: float, cublas: float) -> None:
    """MLA decode over BF16 pages and 656-byte FP8 rows: 1 head (memory), 128 heads (arithmetic)."""
    for heads, batch, keys, fp8 in [(1, 128, 8192, 0), (128, 128, 4096, 0), (128, 128, 4096, 1)]:
        blocks = batch * keys // 64
        q = torch.randn(batch, 1, heads, 576, device="cuda", dtype=torch.bfloat16)
        cache: Any = torch.randn(blocks, 64, 1, 576, device="cuda", dtype=torch.bfloat16)
        if fp8:
            cache = torch.zeros(blocks, 64, 1, 656, device="cuda", dtype=torch.uint8)
        table = torch.randperm(blocks, device="cuda").int().view(batch, -1)
        lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)

        def call(q=q, cache=cache, table=table, lengths=lengths, fp8=bool(fp8)) -> None:  # type: ignore[no-untyped-def]
            flash_mla_with_kvcache(q, cache, table, lengths, 512, None, is_fp8_kvcache=fp8)

        ms = do_bench(call)
        speed = cache.numel() * cache.element_size() / ms / 1e6
        rate = 2 * heads * batch * keys * (576 + 512) / ms / 1e9
        print(
            f"MLA decode {'fp8' if fp8 else 'bf16'}, {heads} heads, {batch} x {keys}: "
            f"{speed:.0f} GB/s, {speed / copied:.2f} of copy; "
            f"{rate:.0f} TFLOPS, {rate / cublas:.2f} of cuBLAS bf16"
        )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("benchmarks/_gpu.py: torch sees no CUDA device; run it where nvidia-smi lists one")
        sys.exit(2)
    card = limits()
    gemm(card[1])
    decode(*card)
