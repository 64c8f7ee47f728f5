"""Times the GPU paths beside the card's own limits: `make gpu`, needs numpy, torch and Triton.

Copy bandwidth and cuBLAS BF16 are measured in the same run. Published for an H800: 1,350 to 1,550
TFLOPS (DeepGEMM FP8), 3,000 GB/s and 580 to 660 TFLOPS (FlashMLA decode).
"""

from __future__ import annotations

import torch
from triton.testing import do_bench

from whalefall.gemm import triton as kernels


def limits() -> float:
    """Prints the card's copy bandwidth and cuBLAS rate; returns the latter in TFLOPS."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    print(f"copy: {2 * x.numel() / do_bench(lambda: y.copy_(x)) / 1e6:.0f} GB/s")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / do_bench(lambda: a @ a) / 1e9
    print(f"cuBLAS bf16 8192^3: {rate:.0f} TFLOPS")
    return rate


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


if __name__ == "__main__":
    gemm(limits())
