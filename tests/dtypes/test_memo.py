"""A remembered call is found for the same arrays only."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from whalefall import attention, gemm, jit
from whalefall.dtypes import CallMemo
from whalefall.errors import ShapeError


def test_the_same_arrays_are_found_and_others_are_not() -> None:
    memo, x, y = CallMemo(), np.zeros((2, 3)), np.zeros((2, 3))
    memo.keep((x, y), "rest", "value")
    assert memo.find((x, y), "rest") == "value"
    assert memo.find((y, x), "rest") is None
    assert memo.find((x, y), "other") is None
    assert memo.find((x, y), ["unhashable"]) is None
    memo.keep((x, y), ["unhashable"], "value")  # not remembered, nor an error


def test_a_memory_mapped_array_is_an_array(tmp_path: Path) -> None:
    memo = CallMemo()
    weight = np.memmap(tmp_path / "w", np.float32, "w+", shape=(4, 8))
    memo.keep((weight,), None, 1)
    assert memo.find((weight,), None) == 1
    x, d = np.ones((2, 8), np.float32).astype(ml_dtypes.bfloat16), np.zeros((2, 4), np.float32)
    weight[:] = 1
    kept = np.memmap(tmp_path / "b", ml_dtypes.bfloat16, "w+", shape=(4, 8))
    kept[:] = weight
    for _ in range(2):
        gemm.bf16_gemm_nt(x, kept, d)
        assert (d == 8).all()


def test_an_array_whose_shape_changed_in_place_is_another() -> None:
    memo, x, t = CallMemo(), np.zeros((2, 3)), torch.zeros(6)
    memo.keep((x, t), None, 1)
    x.shape = (3, 2)
    assert memo.find((x, t), None) is None
    memo.keep((x, t), None, 2)
    t.set_(torch.ones(6).untyped_storage())
    assert memo.find((x, t), None) is None


def test_a_new_array_at_an_old_ones_place_is_another() -> None:
    memo = CallMemo()
    for _ in range(100):  # ids come back soon
        x = np.zeros(3)
        assert memo.find((x,), None) is None
        memo.keep((x,), None, 1)
        del x


@pytest.mark.parametrize("name", ["strides", "dtype"])
def test_an_array_read_differently_is_another(name: str) -> None:
    memo, x = CallMemo(), np.zeros((2, 2), np.float32)
    memo.keep((x,), None, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        setattr(x, name, (4, 8) if name == "strides" else np.dtype(np.int32))
    assert memo.find((x,), None) is None


def test_a_tensor_whose_storage_was_resized_is_another() -> None:
    memo, w = CallMemo(), torch.zeros(64)
    memo.keep((w,), None, 1)
    w.untyped_storage().resize_(0)
    assert memo.find((w,), None) is None
    w.untyped_storage().resize_(256)
    memo.keep((w,), None, 2)
    assert memo.find((w,), None) == 2
    large = torch.zeros(64)
    small, seen = torch.from_numpy(large.numpy()[:32]), large[:8]
    memo.keep((seen,), None, 3)
    seen.set_(small.untyped_storage(), 0, (8,), (1,))  # as if the allocator gave the old address
    assert seen.data_ptr() == large.data_ptr()
    assert memo.find((seen,), None) is None


def test_a_repeated_product_refuses_a_freed_weight() -> None:
    x, w = torch.ones(4, 64).bfloat16(), torch.ones(16, 64).bfloat16()
    d = torch.empty(4, 16)
    for _ in range(2):
        gemm.bf16_gemm_nt(x, w, d)
        w.untyped_storage().resize_(0)
        with pytest.raises(ShapeError, match=r"b: a tensor .* holds 0 bytes, wanted 2048"):
            gemm.bf16_gemm_nt(x, w, d)
        w.untyped_storage().resize_(2048)
        w.fill_(1)
    d.untyped_storage().resize_(0)
    with pytest.raises(ShapeError, match=r"d: a tensor .* holds 0 bytes, wanted 256"):
        gemm.bf16_gemm_nt(x, w, d)


def test_an_array_that_is_remembered_cannot_move() -> None:
    memo, x = CallMemo(), np.zeros(4)
    memo.keep((x,), None, 1)
    with pytest.raises(ValueError, match="resize"):
        x.resize((4096,), refcheck=False)


def test_each_thread_has_its_own() -> None:
    memo, x, found = CallMemo(), np.zeros(3), []
    memo.keep((x,), None, 1)
    thread = threading.Thread(target=lambda: found.append(memo.find((x,), None)))
    thread.start()
    thread.join()
    assert found == [None]


def test_a_repeated_call_sees_new_content_and_still_refuses() -> None:
    weight, scale = gemm.per_block_cast_to_fp8(np.ones((4, 8), np.float32), False)
    x, out = np.ones((2, 8), np.float32), np.empty((2, 4), np.float32)
    assert (gemm.fp8_linear(x, weight, scale, out=out) == 8).all()
    x[:] = 2
    assert (gemm.fp8_linear(x, weight, scale, out=out) == 16).all()
    x.shape = (4, 4)
    with pytest.raises(ShapeError):
        gemm.fp8_linear(x, weight, scale, out=out)


def test_a_repeated_decode_sees_new_lengths_and_still_refuses() -> None:
    q, kv = np.ones((1, 1, 2, 576), np.float32), np.zeros((2, 64, 1, 576), np.float32)
    kv[0, 1:] = 3
    table, lengths = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    call = (q, kv, table, lengths, 512, *attention.get_mla_metadata())
    first, _ = attention.flash_mla_with_kvcache(*call)
    lengths[0] = 2
    second, _ = attention.flash_mla_with_kvcache(*call)
    assert (first == 0).all()
    assert (second > 2.9).all()
    table[0, 0] = 7
    with pytest.raises(ShapeError, match="block_table"):
        attention.flash_mla_with_kvcache(*call)


def test_a_repeated_decode_follows_the_level_that_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    q, kv = (rng.standard_normal(s).astype("f4") for s in ((1, 1, 2, 576), (2, 64, 1, 576)))
    table, lengths = np.array([[0, 1]], np.int32), np.array([100], np.int32)

    def call() -> bytes:
        given = (q, kv, table, lengths, 512, *attention.get_mla_metadata())
        return bytes(attention.flash_mla_with_kvcache(*given)[0].data)

    bits = {}
    for level in (*jit.levels(), *jit.levels()):
        monkeypatch.setenv("WHALEFALL_ISA", level)
        assert jit.best_level() == level
        assert bits.setdefault(level, call()) == call()
    assert len(jit.levels()) == 1 or len(set(bits.values())) > 1  # sums of 4, 8 or 16 lanes
    monkeypatch.delenv("WHALEFALL_ISA")
    assert call() == bits[jit.levels()[-1]]
