"""Run as a script: the Triton kernels against float64; in the interpreter, or on a GPU.

`TRITON_INTERPRET=1 python triton_checks.py` computes tiny shapes on the CPU; `python
triton_checks.py compile` compiles for sm_90a without a GPU and looks at the code.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


def operand(rng: np.random.Generator, shape: tuple[int, ...], block: bool, device: str) -> Any:
    """((values, scales), float64) of random normals."""
    from whalefall.gemm import per_block_cast_to_fp8, per_token_cast_to_fp8
    from whalefall.gemm.reference import dequantize

    cast = per_block_cast_to_fp8 if block else per_token_cast_to_fp8
    flat = [cast(torch.from_numpy(x), False) for x in rng.standard_normal(shape).astype("f4")]
    values = torch.stack([v for v, _ in flat])
    scales = torch.stack([s for _, s in flat])
    exact = dequantize(values, scales, 128 if block else 1, 128)
    return (values.to(device), scales.to(device)), exact


def check(device: str, m: int, n: int, k: int) -> None:
    """All kernels of gemm/triton.py at one size."""
    from whalefall.gemm import triton as kernels
    from whalefall.gemm.reference import calc_diff

    rng = np.random.default_rng(0)
    (a, sa), exact_a = operand(rng, (2, m, k), False, device)
    (b, sb), exact_b = operand(rng, (2, n, k), True, device)
    wanted = exact_a @ exact_b.swapaxes(1, 2)

    d = torch.empty(m, n, dtype=torch.float32, device=device)
    kernels.fp8_gemm_nt((a[0], sa[0]), (b[0], sb[0]), d)
    assert calc_diff(d.cpu(), wanted[0]) < 1e-6

    tall = torch.full((2 * 128, n), 7.0, dtype=torch.bfloat16, device=device)
    rows = torch.zeros(256, k, dtype=torch.float8_e4m3fn, device=device)
    rows[:m], rows[128 : 128 + m] = a[0], a[1]
    scales = torch.ones(256, sa.shape[-1], device=device)
    scales[:m], scales[128 : 128 + m] = sa[0], sa[1]
    index = torch.full((256,), -1, dtype=torch.int32, device=device)
    index[:m], index[128 : 128 + m] = 1, 0
    swapped = (b.flip(0).contiguous(), sb.flip(0).contiguous())
    kernels.m_grouped_fp8_gemm_nt_contiguous((rows, scales), swapped, tall, index)
    assert calc_diff(tall[:m].float().cpu(), wanted[0]) < 1e-4
    assert calc_diff(tall[128 : 128 + m].float().cpu(), wanted[1]) < 1e-4
    assert bool((tall[index < 0] == 0).all())

    masked = torch.full((2, m, n), 7.0, dtype=torch.float32, device=device)
    counts = torch.tensor([m - 1, 0], dtype=torch.int32, device=device)
    kernels.m_grouped_fp8_gemm_nt_masked((a, sa), (b, sb), masked, counts, m)
    assert calc_diff(masked[0, : m - 1].cpu(), wanted[0, : m - 1]) < 1e-6
    assert bool((masked[1] == 7).all())
    assert bool((masked[0, m - 1] == 7).all()) or m % 128 != 0

    check_casts(device)
    check_wild(device)
    check_refusals(device)


def check_casts(device: str) -> None:
    """Bit for bit those of the CPU, NaN and infinities too."""
    from whalefall import gemm
    from whalefall.gemm import triton as kernels

    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 200)).astype("f4"))
    x[1, 150], x[2, 20] = float("nan"), float("inf")
    for ue8m0, gran in ((False, 128), (True, 128), (False, 96), (True, 1)):
        for given in (x, x.bfloat16(), x.T.contiguous().T):
            values, scales = kernels.per_token_cast_to_fp8(given.to(device), ue8m0, gran)
            exact_values, exact_scales = gemm.per_token_cast_to_fp8(given, ue8m0, gran)
            ours, exact = values.cpu().float(), exact_values.float()
            assert torch.equal(torch.nan_to_num(ours, 999), torch.nan_to_num(exact, 999))
            assert torch.equal(
                torch.nan_to_num(scales.cpu(), 999), torch.nan_to_num(exact_scales, 999)
            )


def check_wild(device: str) -> None:
    """No layout leads out of the arrays: rows of a group that there is not become 0."""
    from whalefall.gemm import triton as kernels
    from whalefall.gemm.reference import calc_diff

    rng = np.random.default_rng(2)
    (a, sa), exact_a = operand(rng, (1, 256, 130), False, device)
    (b, sb), exact_b = operand(rng, (2, 40, 130), True, device)
    for wild in (2, 5, 1_000_000, 2**31 - 1, -2, -(2**31)):
        d = torch.full((256, 40), 7.0, device=device)
        index = torch.ones(256, dtype=torch.int32, device=device)
        index[:128], index[130] = wild, wild
        kernels.m_grouped_fp8_gemm_nt_contiguous((a[0], sa[0]), (b, sb), d, index)
        wanted = exact_a[0] @ exact_b[1].T
        wanted[:128], wanted[130] = 0, 0
        assert bool((d[:128] == 0).all()) and bool((d[130] == 0).all())
        assert calc_diff(d.cpu(), wanted) < 1e-6
        many = torch.full((2, 256, 40), 7.0, device=device)
        counts = torch.tensor([wild if wild > 5 else 256, -abs(wild)], dtype=torch.int32)
        twice = a.repeat_interleave(2, 0), sa.repeat_interleave(2, 0)
        kernels.m_grouped_fp8_gemm_nt_masked(twice, (b, sb), many, counts.to(device), 5)
        assert calc_diff(many[0].cpu(), exact_a[0] @ exact_b[0].T) < 1e-6
        assert bool((many[1] == 7).all())


def check_refusals(device: str) -> None:
    """Operands of unequal group counts, other shapes, dtypes and devices."""
    from whalefall.errors import WhalefallError
    from whalefall.gemm import triton as kernels

    def fp8(*shape: int) -> Any:
        blocks = -(-shape[-1] // 128)
        values = torch.zeros(shape, device=device).to(torch.float8_e4m3fn)
        return values, torch.ones(*shape[:-1], blocks, device=device)

    def weights(*shape: int) -> Any:
        lead, n, k = shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)
        return fp8(*shape)[0], torch.ones(*lead, n, k, device=device)

    def d(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=device)

    def counts(n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.int32, device=device)

    masked, rows = kernels.m_grouped_fp8_gemm_nt_masked, kernels.m_grouped_fp8_gemm_nt_contiguous
    dense, cast = kernels.fp8_gemm_nt, kernels.per_token_cast_to_fp8
    a, b, over = fp8(8, 256), weights(64, 256), d(512 + 15)
    dense(a, b, over[:512].view(8, 64))  # beside what follows
    for call, *given in (
        (masked, fp8(3, 8, 256), weights(1, 64, 256), d(1, 8, 64), counts(3), 5),
        (masked, fp8(3, 8, 256), weights(3, 64, 256), d(1, 8, 64), counts(3), 5),
        (masked, fp8(3, 8, 256), weights(2, 64, 256), d(3, 8, 64), counts(3), 5),
        (masked, (fp8(3, 8, 256)[0], a[1]), weights(3, 64, 256), d(3, 8, 64), counts(3), 5),
        (masked, fp8(3, 8, 256), (weights(3, 64, 256)[0], b[1]), d(3, 8, 64), counts(3), 5),
        (masked, a, b, d(8, 64), counts(8), 5),
        (rows, a, b, d(8, 64), counts(8)),
        (rows, a, weights(2, 64, 256), d(8, 64), counts(7)),
        (rows, a, (weights(2, 64, 256)[0], weights(1, 64, 256)[1]), d(8, 64), counts(8)),
        (dense, a, weights(1, 64, 256), d(8, 64)),
        (dense, a, weights(64, 128), d(8, 64)),
        (dense, a, b, d(8, 63)),
        (dense, a, b, d(8, 64).half()),
        (dense, a[0], b, d(8, 64)),
        (dense, a, b, torch.zeros(8, 64, device="meta")),
        (dense, a, b, None),
        (dense, a, b, torch.empty(1, 64, device=device).expand(8, 64)),
        (dense, (a[0], None), b, d(8, 64)),
        (dense, a, (b[0], [1.0]), d(8, 64)),
        (dense, a, (b[0], b[1].clone().requires_grad_()), d(8, 64)),
        (dense, (a[0], over[:16].view(8, 2)), b, over[15 : 15 + 512].view(8, 64)),
        (rows, a, weights(2, 64, 256), d(8, 64), None),
        (rows, a, weights(2, 64, 256), d(8, 64), [0] * 8),
        (rows, a, weights(2, 64, 256), over[:512].view(8, 64), over[:8].view(torch.int32)),
        (masked, fp8(3, 8, 256), weights(3, 64, 256), d(3, 8, 64), None, 5),
        (masked, fp8(3, 8, 256), weights(3, 64, 256), d(3, 8, 64), counts(3), "x"),
        (cast, None, False),
        (cast, np.zeros((3, 4), np.float32), False),
        (cast, torch.zeros(3, device=device), False),
        (cast, torch.zeros(3, 4, device=device).int(), False),
        (cast, torch.zeros(3, 4, device=device), False, 0),
        (cast, torch.zeros(3, 4, device=device), "yes"),
    ):
        try:
            call(*given)
        except WhalefallError as error:
            text = str(error)
            assert text.startswith(f"{call.__name__}: "), text
            assert text.partition("; ")[2] and "\n" not in text, text
        else:
            raise AssertionError([getattr(each, "shape", each) for each in given])


def compile_for_hopper() -> None:
    """Compile every kernel for sm_90a; assert wgmma in the PTX and no spills in the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from whalefall.gemm import triton as kernels

    names = kernels.fp8_gemm_kernel.arg_names
    kinds = {"a": "*fp8e4nv", "b": "*fp8e4nv", "sa": "*fp32", "sb": "*fp32", "groups": "*i32"}
    tools = triton.knobs.nvidia  # from 3.9 on, the newer assembler serves Hopper too
    newer = getattr(tools, "ptxas_blackwell", None)
    ptxas = max(
        (t for t in (tools.ptxas, newer) if t), key=lambda t: [int(x) for x in t.version.split(".")]
    ).path
    for kind in (kernels.DENSE, kernels.CONTIGUOUS, kernels.MASKED):
        constants = {"KIND": kind, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
        signature = {
            n: "constexpr" if n in constants else "*bf16" if n == "d" else kinds.get(n, "i32")
            for n in names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants
        }
        source = ASTSource(kernels.fp8_gemm_kernel, signature, constants, aligned)
        built = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3}
        )
        ptx = built.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert "e4m3.e4m3" in ptx
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(ptx)
            command = [ptxas, "-v", "-arch=sm_90a", str(path), "-o", str(path) + ".cubin"]
            words = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in words, words
        print(
            "kind", kind, [line for line in words.splitlines() if "registers" in line][-1].strip()
        )


def compile_casts() -> None:
    """The cast, for sm_90a: divisions rounded as on a CPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from whalefall.gemm import triton as kernels

    kinds = {"x": "*bf16", "values": "*u8", "scales": "*fp32"}
    for ue8m0 in (False, True):
        constants = {"UE8M0": ue8m0, "GRAN": 128, "BLOCK": 128}
        names = kernels.cast_kernel.arg_names
        signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
        source = ASTSource(kernels.cast_kernel, signature, constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "div.rn.f32" in ptx or "rcp.rn.f32" in ptx
        assert "div.full.f32" not in ptx


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        compile_for_hopper()
        compile_casts()
    elif sys.argv[1:2] == ["gpu"]:
        check("cuda", *map(int, sys.argv[2:]))
    else:
        check("cpu", 5, 130, 200)
    print("passed")
