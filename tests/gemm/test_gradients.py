"""Products have no backward: where torch would record one they are refused, remembered or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from whalefall import gemm
from whalefall.errors import UnsupportedError

torch = pytest.importorskip("torch")
G, M, N, K = 2, 128, 128, 128
Call = Callable[..., None]
Arrays = dict[str, Any]


def half(*shape: int) -> Any:
    return torch.ones(shape, dtype=torch.bfloat16)


def codes(*shape: int) -> tuple[Any, Any]:
    """Values in one-block tiles of 1 x 128 along the last axis, and their scales."""
    return torch.ones(shape).to(torch.float8_e4m3fn), torch.ones(*shape[:-1], shape[-1] // 128)


def block_codes(*shape: int) -> tuple[Any, Any]:
    return torch.ones(shape).to(torch.float8_e4m3fn), torch.ones(*shape[:-2], 1, 1)


def k_codes(rows: int) -> tuple[Any, Any]:
    return torch.ones(K, rows).to(torch.float8_e4m3fn), torch.ones(1, rows)


def flat_codes(rows: int) -> tuple[Any, Any]:
    return torch.ones(rows * K).to(torch.float8_e4m3fn), torch.ones(rows, 1)


def fp8(call: Call, a: tuple[Any, Any], b: tuple[Any, Any], *shape: int, **rest: Any) -> Any:
    """The call with arrays by name; scales are the ones that can need a gradient in earnest."""
    given: Arrays = {"a": a[0], "sa": a[1], "b": b[0], "sb": b[1], "d": torch.zeros(shape)}

    def run(arrays: Arrays) -> None:
        pairs = (arrays["a"], arrays["sa"]), (arrays["b"], arrays["sb"])
        more = {"c": arrays["c"]} if "c" in arrays else {}
        call(*pairs, arrays["d"], **rest, **more)

    return run, given


def plain(call: Call, a: Any, b: Any, *shape: int, **rest: Any) -> Any:
    def run(arrays: Arrays) -> None:
        more = {"c": arrays["c"]} if "c" in arrays else {}
        call(arrays["a"], arrays["b"], arrays["d"], **rest, **more)

    return run, {"a": a, "b": b, "d": torch.zeros(shape)}


GROUPS, COUNTS = torch.zeros(M, dtype=torch.int32), torch.tensor([K], dtype=torch.int32)
MASK = torch.ones(G, dtype=torch.int32)
CONTIGUOUS, MASKED = {"grouped_layout": GROUPS}, {"masked_m": MASK, "expected_m": 1}
BY_K = {"ks_cpu": [K], "grouped_layout": COUNTS}
PRODUCTS = {
    **{
        f"bf16_gemm_{turn}": plain(getattr(gemm, f"bf16_gemm_{turn}"), half(M, K), half(N, K), M, N)
        for turn in ("nt", "nn", "tn", "tt")
    },
    "cublaslt_gemm_nt": plain(gemm.cublaslt_gemm_nt, half(M, K), half(N, K), M, N),
    "fp8_gemm_nt": fp8(gemm.fp8_gemm_nt, codes(M, K), block_codes(N, K), M, N),
    "fp8_gemm_nn": fp8(gemm.fp8_gemm_nn, codes(M, K), block_codes(K, N), M, N),
    "fp8_gemm_nt_skip_head_mid": fp8(
        gemm.fp8_gemm_nt_skip_head_mid,
        *(codes(M, K), block_codes(N, K), M, 2 * N),
        head_splits=(64, 128, 64),
    ),
    "m_grouped_fp8_gemm_nt_contiguous": fp8(
        gemm.m_grouped_fp8_gemm_nt_contiguous, codes(M, K), block_codes(G, N, K), M, N, **CONTIGUOUS
    ),
    "m_grouped_fp8_gemm_nn_contiguous": fp8(
        gemm.m_grouped_fp8_gemm_nn_contiguous, codes(M, K), block_codes(G, K, N), M, N, **CONTIGUOUS
    ),
    "m_grouped_fp8_gemm_nt_masked": fp8(
        gemm.m_grouped_fp8_gemm_nt_masked, codes(G, M, K), block_codes(G, N, K), G, M, N, **MASKED
    ),
    "m_grouped_bf16_gemm_nt_contiguous": plain(
        gemm.m_grouped_bf16_gemm_nt_contiguous, half(M, K), half(G, N, K), M, N, **CONTIGUOUS
    ),
    "m_grouped_bf16_gemm_nt_masked": plain(
        gemm.m_grouped_bf16_gemm_nt_masked, half(G, M, K), half(G, N, K), G, M, N, **MASKED
    ),
    "k_grouped_bf16_gemm_tn_contiguous": plain(
        gemm.k_grouped_bf16_gemm_tn_contiguous, half(K, M), half(K, N), 1, M, N, **BY_K
    ),
    "k_grouped_fp8_gemm_tn_contiguous": fp8(
        gemm.k_grouped_fp8_gemm_tn_contiguous, k_codes(M), k_codes(N), 1, M, N, **BY_K
    ),
    "k_grouped_fp8_gemm_nt_contiguous": fp8(
        gemm.k_grouped_fp8_gemm_nt_contiguous, flat_codes(M), flat_codes(N), 1, M, N, **BY_K
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_refused_while_a_gradient_is_wanted(name: str) -> None:
    run, given = PRODUCTS[name]
    added = {} if "m_grouped" in name or "skip" in name else {"c": torch.zeros(given["d"].shape)}
    given = {key: tensor.clone() for key, tensor in {**given, **added}.items()}
    for wanted in given:
        run(given)
        given[wanted].requires_grad_(True)
        with torch.no_grad():
            run(given)  # the second time as remembered, where a product is
            run(given)
        with pytest.raises(UnsupportedError, match=f"^{name}: .* needs a gradient.*no_grad"):
            run(given)
        with torch.no_grad():
            given[wanted].requires_grad_(False)
