"""FP8 products and casts on CUDA tensors: dense, grouped contiguous, grouped masked.

One program computes a BLOCK_M x BLOCK_N tile of D; each 128 of K is one FP8 dot into fresh sums
(wgmma on sm_90a), scaled and added in fp32 registers: the two-level accumulation. Rows of one tile
belong to one group, as the original's contiguous layout guarantees (128-row alignment). Whatever a
layout holds, nothing outside the arrays is read: rows of a group that there is not, or of another
than their tile's first row, become 0, and a mask's counts end at 0 and M (nobody looks at them
before the kernel does; a CPU refuses them).
Checked in Triton's interpreter and compiled for sm_90a; not run on a GPU.
Source: DeepGEMM `fp8_gemm_nt`, `m_grouped_fp8_gemm_nt_*`, `per_token_cast_to_fp8`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from whalefall.arguments import flag, shown, whole
from whalefall.dtypes import View, refuse_gradient
from whalefall.dtypes.written import refuse_overlap, refuse_shared
from whalefall.errors import DtypeError, ShapeError, UnsupportedError
from whalefall.gemm.operands import value_pair

__all__ = [
    "cast_kernel",
    "e4m3_bits",
    "fp8_gemm_kernel",
    "fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "per_token_cast_to_fp8",
]

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 128
DENSE, CONTIGUOUS, MASKED = 0, 1, 2
_GROUPS = {CONTIGUOUS: "grouped_layout", MASKED: "masked_m"}
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(("a", "b"), (torch.float8_e4m3fn,)),
    **dict.fromkeys(("scale of a", "scale of b"), (torch.float32,)),
    "d": (torch.float32, torch.bfloat16),
}


@triton.jit
def fp8_gemm_kernel(  # type: ignore[no-untyped-def]
    a, sa, b, sb, d, groups,
    m, n, k, num_groups,
    a_group, a_row, sa_group, sa_row, sa_k, b_group, b_row, sb_group, sb_row, d_group, d_row,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D = A · Bᵀ with scales sa [m, k / 128] and sb [n / 128, k / 128].

    `groups`: contiguous: int32 [m], the group of each row, -1: zeros; masked: int32 [G], the valid
    rows of each group (program axis 2); dense: unused.
    """
    tile_n, tile_m, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tile_m * BLOCK_M
    rows = m
    group = batch
    if KIND == 2:
        rows = tl.minimum(tl.load(groups + batch), m)
        if first >= rows:
            return
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    has_m, has_n = offs_m < rows, offs_n < n
    at_m = offs_m.to(tl.int64)
    out = d + batch * d_group + at_m[:, None] * d_row + offs_n[None, :]
    if KIND == 1:
        group = tl.load(groups + first).to(tl.int64)
        has_m = has_m & (tl.load(groups + offs_m, mask=has_m, other=-1) == group)
        if (group < 0) | (group >= num_groups):
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            tl.store(
                out,
                zeros.to(d.dtype.element_ty),
                mask=(offs_m < rows)[:, None] & has_n[None, :],
            )
            return
    a_at = a + batch * a_group + at_m[:, None] * a_row + offs_k[None, :]
    b_at = b + group * b_group + offs_n.to(tl.int64)[:, None] * b_row + offs_k[None, :]
    sa_at = sa + batch * sa_group + at_m * sa_row
    sb_at = sb + group * sb_group + (offs_n // 128) * sb_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.cdiv(k, BLOCK_K)):
        has_k = block * BLOCK_K + offs_k < k
        x = tl.load(a_at, mask=has_m[:, None] & has_k[None, :], other=0.0)
        w = tl.load(b_at, mask=has_n[:, None] & has_k[None, :], other=0.0)
        x_scale = tl.load(sa_at + block * sa_k, mask=has_m, other=0.0)
        w_scale = tl.load(sb_at + block, mask=has_n, other=0.0)
        total += tl.dot(x, tl.trans(w)) * (x_scale[:, None] * w_scale[None, :])
        a_at += BLOCK_K
        b_at += BLOCK_K
    tl.store(out, total.to(d.dtype.element_ty), mask=(offs_m < rows)[:, None] & has_n[None, :])


@triton.jit
def e4m3_bits(v):  # type: ignore[no-untyped-def]
    """The code of the nearest E4M3 (ties to even) of v, by integers; NaN and above 464: 0x7F.

    Not `.to(tl.float8e4nv)`: Triton's interpreter drops the carry into the exponent there.
    """
    bits = v.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = size.to(tl.float32, bitcast=True) + 16384.0  # whose last bit is 2^-9
    subnormal = small.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)
    code = tl.where(size > 0x43E80000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def cast_kernel(  # type: ignore[no-untyped-def]
    x, values, scales, n, x_row, values_row, scales_row,
    UE8M0: tl.constexpr, GRAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GRAN columns of a row: scale = max(|x|, 1e-4) / 448, values = x · (1 / scale) in E4M3.

    BLOCK: a power of two, at least GRAN.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    columns = block * GRAN + place
    inside = (columns < n) & (place < GRAN)
    part = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(part)
    broken = tl.max((size != size).to(tl.int32)) > 0
    largest = tl.maximum(tl.max(tl.where(size == size, size, 0.0)), 1e-4)
    scale = tl.math.div_rn(largest, 448.0)  # `/` is rounded otherwise on a GPU
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, 1), 254)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    scale = tl.where(broken, float("nan"), scale)
    inverse = tl.math.div_rn(1.0, scale)
    tl.store(
        values + row * values_row + columns,
        e4m3_bits(part * inverse),
        mask=inside,
    )
    tl.store(scales + row * scales_row + block, scale)


def _check(where: str, given: dict[str, Any], kind: int) -> None:
    """DtypeError, ShapeError or UnsupportedError for operands that don't fit each other.

    Args:
        given: by name, the values and scales of a and b, d, and what says whose rows are whose.
    """
    for name, tensor in given.items():
        _check_tensor(f"{where}: {name}", tensor, _DTYPES.get(name, (torch.int32,)))
    for name, tensor in given.items():
        if tensor.device != given["d"].device:
            raise UnsupportedError(
                f"{where}: {name} is on {tensor.device}, wanted {given['d'].device} as d is; move "
                "it with .to(d.device)"
            )
    refuse_gradient(where, list(given.values()), names=list(given))
    _check_shapes(where, given, kind)
    views = {name: _view(tensor) for name, tensor in given.items()}
    result = views.pop("d")
    refuse_shared(result, f"{where}: d")
    refuse_overlap(where, "d", result, tuple(views.values()))


def _check_tensor(what: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(f"{what} is {shown(tensor)}, wanted a tensor; torch.as_tensor makes one")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise DtypeError(f"{what} is {tensor.dtype}, wanted {wanted}; convert it")


def _view(tensor: torch.Tensor) -> View:
    """Where a tensor lies, on any device: for comparisons of addresses only."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return View(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)


def _check_shapes(where: str, given: dict[str, Any], kind: int) -> None:
    av, sa, bv, sb, d, *groups = given.values()
    axes = {DENSE: "222", CONTIGUOUS: "232", MASKED: "333"}[kind]  # of a, b, d
    for name, tensor, scale, count in (("a", av, sa, axes[0]), ("b", bv, sb, axes[1])):
        if {tensor.dim(), scale.dim()} != {int(count)} or tensor.shape[:-2] != scale.shape[:-2]:
            raise ShapeError(
                f"{where}: {name} is {list(tensor.shape)} with scales {list(scale.shape)}, wanted "
                f"{count} axes and as many groups in both; reshape it"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ShapeError(
                f"{where}: {name} has strides {tensor.stride()}, wanted K-major; call .contiguous()"
            )
    m, k = av.shape[-2:]
    n, blocks = bv.shape[-2], triton.cdiv(k, 128)
    lead = tuple(bv.shape[:1]) if kind == MASKED else ()
    if (
        (bv.shape[-1], d.shape, av.shape[:-2]) != (k, (*lead, m, n), lead)
        or (n > 1 and d.stride(-1) != 1)
    ):  # fmt: skip
        raise ShapeError(
            f"{where}: a {list(av.shape)}, b {list(bv.shape)}, d {list(d.shape)}, wanted "
            f"{[*lead, 'M', 'K']}, [.., N, K], {[*lead, 'M', 'N']} with stride 1 along N; make d "
            "by torch.empty"
        )
    if sa.shape[-2:] != (m, blocks) or sb.shape[-2:] != (triton.cdiv(n, 128), blocks):
        raise ShapeError(
            f"{where}: scales of a {list(sa.shape)} and of b {list(sb.shape)}, wanted [.., {m}, "
            f"{blocks}] and [.., {triton.cdiv(n, 128)}, {blocks}]; per_token_cast_to_fp8 and "
            "per_block_cast_to_fp8 make them"
        )
    for tensor in groups:
        if tensor.shape != av.shape[:1]:
            raise ShapeError(
                f"{where}: {_GROUPS[kind]} has shape {list(tensor.shape)}, wanted "
                f"{list(av.shape[:1])}; give one number for each "
                f"{'row of a' if kind == CONTIGUOUS else 'group'}"
            )


def _launch(
    where: str, a: Any, b: Any, d: torch.Tensor, groups: torch.Tensor | None, kind: int
) -> None:
    (av, sa), (bv, sb) = value_pair(where, "a", a), value_pair(where, "b", b)
    operands = {"a": av, "scale of a": sa, "b": bv, "scale of b": sb, "d": d}
    if kind != DENSE:
        operands[_GROUPS[kind]] = groups
    _check(where, operands, kind)
    m, k = av.shape[-2:]
    n = bv.shape[-2]
    if sb.stride(-1) != 1:
        sb = sb.contiguous()
    if 0 in d.shape:
        return
    if kind == CONTIGUOUS and bv.shape[0] == 0:
        d.zero_()
        return

    def lead(tensor: torch.Tensor) -> int:
        return tensor.stride(0) if tensor.dim() == 3 else 0

    batches = av.shape[0] if kind == MASKED else 1
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M), batches)
    fp8_gemm_kernel[grid](
        av, sa, bv, sb, d, groups.contiguous() if groups is not None else sa,
        m, n, k, bv.shape[0],
        lead(av), av.stride(-2), lead(sa), sa.stride(-2), sa.stride(-1),
        lead(bv), bv.stride(-2), lead(sb), sb.stride(-2), lead(d), d.stride(-2),
        KIND=kind, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=8, num_stages=3,
    )  # fmt: skip


def fp8_gemm_nt(a: Any, b: Any, d: torch.Tensor) -> None:
    """D = A · Bᵀ; a: (float8_e4m3fn [M, K], fp32 [M, K / 128]), b: ([N, K], [N / 128, K / 128]).

    Raises: ShapeError, DtypeError.
    """
    _launch("fp8_gemm_nt", a, b, d, None, DENSE)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Any, b: Any, d: torch.Tensor, grouped_layout: torch.Tensor
) -> None:
    """Rows of 128-row tiles times their group's matrix; rows of -1 become 0.

    Raises: ShapeError, DtypeError, UnsupportedError.
    """
    where = "m_grouped_fp8_gemm_nt_contiguous"
    _launch(where, a, b, d, grouped_layout, CONTIGUOUS)


def m_grouped_fp8_gemm_nt_masked(
    a: Any, b: Any, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int
) -> None:
    """D[g] = A[g] · B[g]ᵀ for the first masked_m[g] rows; `expected_m` changes no result.

    Raises: ShapeError, DtypeError, UnsupportedError.
    """
    where = "m_grouped_fp8_gemm_nt_masked"
    whole(f"{where}: expected_m", expected_m, 1)
    _launch(where, a, b, d, masked_m, MASKED)


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [m, n] float8_e4m3fn and scales [m, ceil(n / gran_k)] of a CUDA tensor.

    Raises: ShapeError, DtypeError; ConfigError unless 1 <= gran_k <= 65536.
    """
    where = "per_token_cast_to_fp8"
    gran_k = whole(f"{where}: gran_k", gran_k, 1, 1 << 16)
    use_ue8m0 = flag(f"{where}: use_ue8m0", use_ue8m0)
    _check_tensor(f"{where}: x", x, (torch.float32, torch.bfloat16, torch.float16))
    if x.dim() != 2:
        raise ShapeError(f"{where}: x has shape {list(x.shape)}, wanted 2 axes; reshape it")
    x = x.contiguous()
    m, n = x.shape
    blocks = triton.cdiv(n, gran_k)
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(m, blocks, dtype=torch.float32, device=x.device)
    if m and n:
        cast_kernel[(m, blocks)](
            x, values.view(torch.uint8), scales, n, x.stride(0), values.stride(0), scales.stride(0),
            UE8M0=use_ue8m0, GRAN=gran_k, BLOCK=triton.next_power_of_2(gran_k), num_warps=1,
        )  # fmt: skip
    return values, scales
