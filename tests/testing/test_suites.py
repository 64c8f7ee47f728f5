"""Our own rooms pass the public suites, and the suites catch what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.serve.conftest import Running, served
from whalefall import eplb, gemm
from whalefall.attention import flash_mla_with_kvcache
from whalefall.engine import Engine, EngineConfig
from whalefall.serve import Settings
from whalefall.serve.commands import bundled_path
from whalefall.testing import ChatServerSuite, Fp8GemmSuite, MlaDecodeSuite, PlacementSuite


class TestAttention(MlaDecodeSuite):
    @pytest.fixture
    def decode(self) -> Callable[..., Any]:
        return flash_mla_with_kvcache


class TestGemm(Fp8GemmSuite):
    @pytest.fixture
    def gemm_nt(self) -> Callable[..., Any]:
        return gemm.fp8_gemm_nt


class TestEplb(PlacementSuite):
    @pytest.fixture
    def rebalance_experts(self) -> Callable[..., Any]:
        return eplb.rebalance_experts


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with served(Engine(bundled_path(), EngineConfig()), Settings("bundled")) as server:
        yield server


class TestServer(ChatServerSuite):
    @pytest.fixture
    def url(self, running: Running) -> str:
        return running.url


def test_attention_that_sees_one_key_too_many_fails() -> None:
    def wrong(q: Any, cache: Any, table: Any, lengths: Any, *more: Any, **options: Any) -> Any:
        return flash_mla_with_kvcache(q, cache, table, lengths + 1, *more, **options)

    with pytest.raises(AssertionError, match="request 0, token 0: out: diff is"):
        MlaDecodeSuite().test_it_is_attention_over_shuffled_pages(wrong, [50], 1, 4, False)
    with pytest.raises(AssertionError):
        MlaDecodeSuite().test_what_lies_behind_the_last_key_is_never_read(wrong)


def test_a_product_that_forgets_c_or_a_scale_fails() -> None:
    def forgets_c(a: Any, b: Any, d: Any, c: Any = None) -> None:
        gemm.fp8_gemm_nt(a, b, d)

    def forgets_scale(a: Any, b: Any, d: Any, c: Any = None) -> None:
        gemm.fp8_gemm_nt((a[0], np.ones_like(a[1])), b, d, c)

    with pytest.raises(AssertionError, match="d = a bᵀ"):
        Fp8GemmSuite().test_it_adds_c(forgets_c)
    suite = Fp8GemmSuite()
    with pytest.raises(AssertionError, match="33 x 130 x 256"):
        suite.test_it_is_the_product_of_the_dequantised_operands(forgets_scale, 33, 130, 256)


def test_a_placement_that_ignores_load_fails() -> None:
    def idle(weight: Any, slots: int, *_: int) -> Any:
        return eplb.rebalance_experts(np.ones_like(weight), slots, 1, 1, 8)

    with pytest.raises(AssertionError):
        PlacementSuite().test_replicas_make_the_busiest_gpu_lighter(idle)
