"""Run as a script: MLA decode in Triton against float64, on the device that is named.

`TRITON_INTERPRET=1 python triton_checks.py cpu` computes tiny shapes in Triton's interpreter (in
float16: its dot knows no bfloat16); `python triton_checks.py cuda` the same functions, and larger
shapes, in bfloat16 on a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from tests.attention.closeness import close_decode, single
from tests.attention.problems import (
    BF16,
    dense,
    dense_expected,
    fp8_rows,
    sparse_expected,
    spoil_unused,
)
from whalefall.attention import dequantize_kv_cache, flash_mla_with_kvcache
from whalefall.attention.triton import decode, decode_call
from whalefall.dtypes import as_numpy
from whalefall.errors import WhalefallError

SCALE = 576**-0.5


def kind(device: str) -> Any:
    return np.float16 if device == "cpu" else BF16


def there(array: Any, device: str) -> torch.Tensor:
    """A numpy array, also of bfloat16, as a tensor of the device."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def back(tensor: torch.Tensor) -> Any:
    return single(as_numpy(tensor.cpu().contiguous()))


def check_dense(device: str, heads: int, causal: bool, fp8: bool, keys: int) -> None:
    """Shuffled pages, uneven lengths, garbage behind them and in the table: as float64."""
    p = dense(2, 2, keys, heads, 1, True, dtype=kind(device))
    cache, plain = p.cache, None
    if fp8:
        cache = fp8_rows(np.random.default_rng(0), p.cache.shape[:3])
        plain = dequantize_kv_cache(cache)
    given = (there(each, device) for each in (p.q, cache, p.table, p.lengths))
    out, lse = decode(*given, SCALE, causal, fp8)
    want, want_lse = dense_expected(p, 512, SCALE, causal, plain)
    close_decode(back(out), want, back(lse), want_lse)


def check_sparse(device: str, heads: int, fp8: bool, topk: int) -> None:
    """Indices out of range, twice, and beyond a length; lengths beyond the list, and below 0."""
    rng = np.random.default_rng(1)
    p = dense(4, 2, 64, heads, 1, False, dtype=kind(device))
    index = rng.integers(0, 4 * 64, (4, 2, topk)).astype(np.int32)
    index[:, :, ::5], index[:, :, 3] = -1, 2**31 - 1
    index[:, :, 1] = index[:, :, 2]
    lengths = np.array([topk, topk - 2, topk + 3, -1], np.int32)
    used = np.unique(index[(index >= 0) & (index < 256)])
    if fp8:
        cache = fp8_rows(rng, (len(p.cache), 64, 1))
        rows = spoil_unused(cache.reshape(-1, 656), used)
    else:
        cache = p.cache
        rows = np.nan_to_num(single(cache).reshape(-1, 576)).astype(p.cache.dtype)
        cache = rows.reshape(cache.shape)
    sink = rng.standard_normal(heads).astype(np.float32)
    sink[:2] = -np.inf, np.inf
    given = [there(each, device) for each in (p.q, cache, index, lengths)]
    out, lse = decode(*given, 0.1, False, fp8, True, there(sink, device))
    every = len(rows)
    kept = []
    for token in range(8):
        count = max(0, min(topk, int(lengths[token // 2])))
        mine = index.reshape(8, topk)[token, :count]
        kept.append(rows[mine[(mine >= 0) & (mine < every)]])
    want, _, want_lse = sparse_expected(p.q.reshape(8, heads, 576), kept, 512, 0.1, sink)
    close_decode(
        back(out), want.reshape(4, 2, heads, 512),
        back(lse), want_lse.reshape(4, 2, heads).swapaxes(1, 2),
    )  # fmt: skip


def check_wild(device: str) -> None:
    """No contents lead out of the arrays: requests that a CPU would refuse have no keys."""
    p = dense(3, 1, 130, 3, 1, False, dtype=kind(device))
    p.lengths[:] = 130, 4 * 64 + 1, -1
    good, _ = dense_expected(p._replace(lengths=np.array([130, 0, 0])), 512, SCALE, False)
    for entry in range(4):
        for wild in (len(p.cache), 2_000_000, 2**31 - 1, -(2**31), -1):
            table = p.table.copy()
            table[0, entry] = wild
            table[1:] = wild
            given = (there(x, device) for x in (p.q, p.cache, table, p.lengths))
            out, lse = decode(*given, SCALE)
            if entry == 3:  # which the length does not reach
                close_decode(back(out), good, back(lse[0, 0]), back(lse[0, 0]))
            else:
                assert (back(out) == 0).all()
            assert np.isinf(back(lse)[entry == 3 :]).all()
            assert np.isfinite(back(lse)[: entry == 3]).all()
            p.lengths[1:] = 2**31 - 1, -(2**31)


def check_nan(device: str) -> None:
    """A NaN key that counts makes its rows NaN, lse +inf, and no others; with a sink, too."""
    p = dense(2, 1, 700, 3, 1, False, dtype=kind(device))
    p.cache[p.table[0, 0], 3, 0, 5] = np.nan
    given = [there(x, device) for x in (p.q, p.cache, p.table, p.lengths)]
    for sink in (None, torch.zeros(3, device=device)):
        out, lse = decode(*given, SCALE, attn_sink=sink)
        assert np.isnan(back(out[0])).all()
        assert (back(lse[0]) == np.inf).all()
        assert np.isfinite(back(out[1])).all()
        assert np.isfinite(back(lse[1])).all()


def check_refusals(device: str) -> None:
    """What a CPU refuses by shapes and names, a GPU refuses in the same words."""
    p = dense(2, 1, 70, 4, 1, False, dtype=kind(device))
    q, cache, table, lengths = (there(x, device) for x in (p.q, p.cache, p.table, p.lengths))
    index = torch.zeros(2, 1, 8, dtype=torch.int32, device=device)
    good = {"q": q, "k_cache": cache, "block_table": table, "cache_seqlens": lengths}
    good |= {"head_dim_v": 512, "tile_scheduler_metadata": None}
    for wrong in (
        {"causal": True, "indices": index},
        {"topk_length": lengths},
        {"indices": index, "extra_k_cache": cache},
        {"block_table": table[:1]},
        {"cache_seqlens": lengths.long()},
        {"indices": index[:, :, :, None]},
        {"indices": index, "topk_length": lengths[:1]},
        {"q": q[..., :500]},
        {"q": q[0]},
        {"k_cache": cache[..., 0]},
        {"is_fp8_kvcache": True},
        {"softmax_scale": float("nan")},
        {"causal": "yes"},
        {"head_dim_v": 600},
        {"attn_sink": torch.zeros(3, device=device)},
    ):
        said = []
        for to, call in (("cpu", flash_mla_with_kvcache), (device, on_gpu)):
            arguments = {
                name: value.to(to) if isinstance(value, torch.Tensor) else value
                for name, value in (good | wrong).items()
            }
            try:
                call(**arguments)
                said.append(f"answered {wrong.keys()}")
            except WhalefallError as error:
                said.append(f"{type(error).__name__}: {error}")
        assert said[0] == said[1], said
        assert "answered" not in said[0], said
    for wrong, words in (
        ({"block_table": p.table}, "block_table is a ndarray, wanted a tensor like q"),
        ({"head_dim_v": 256}, "head_dim_v is 256, wanted 512 on a GPU; move the tensors with .c"),
        ({"indices": index, "extra_k_cache": cache, "extra_indices_in_kvcache": index}, "extra_k"),
    ):
        try:
            on_gpu(**(good | wrong))
        except WhalefallError as error:
            assert words in str(error), error  # noqa: PT017
        else:
            raise AssertionError(wrong)


def on_gpu(**given: Any) -> Any:
    """`flash_mla_with_kvcache`, on the path of CUDA tensors also where there is no GPU."""
    names = (
        *("attn_sink", "causal", "extra_indices_in_kvcache", "extra_k_cache", "extra_topk_length"),
        *("indices", "is_fp8_kvcache", "softmax_scale", "topk_length"),
    )
    if given["q"].device.type == "cuda":
        return flash_mla_with_kvcache(**given)
    return decode_call(dict.fromkeys(names) | given)


def everything(device: str) -> None:
    check_refusals(device)
    check_dense(device, 3, True, False, 70)
    check_dense(device, 20, False, True, 70)
    check_sparse(device, 4, False, 7)
    check_sparse(device, 3, True, 40)
    check_wild(device)
    check_nan(device)
    if device == "cuda":
        for heads in (1, 16, 128):
            for fp8 in (False, True):
                check_dense(device, heads, True, fp8, 3000)
                check_sparse(device, heads + 1, fp8, 1500)


if __name__ == "__main__":
    everything(sys.argv[1])
    print("passed")
