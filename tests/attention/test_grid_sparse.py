"""The original's sparse grids, each shape at every ISA level: decode and prefill.

Decode of 576 columns is over 656-byte FP8 rows. That of 512 columns is over a BF16 cache here, as
the 584-byte rows are not built; its batches of 74 and 321 are 9 and 17 where there is an extra
cache, whose 4,000 cases would take a day otherwise.
Source: FlashMLA `tests/test_flash_mla_sparse_decoding.py` and `test_flash_mla_sparse_prefill.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.attention.levels import SPARSE_DECODE, SPARSE_PREFILL, agree_at_every_level
from tests.attention.problems import BF16, fp8_rows, random_rows
from tests.attention.quick import floats, quick
from whalefall.attention import (
    dequantize_kv_cache,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

pytestmark = pytest.mark.slow
SHAPES = [
    *((512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61)),
    *((2046, 2048, 2), (2046, 2048, 64), (2046, 2048, 576)),
]
CORNERS = [(512, 64, 61), (650, 576, 53)]
DRAWN = 1 << 13  # different rows of a cache
INVALID = [-(2**31), -123456, -1, 114514, 1919810, 2147480000, 2**31 - 1]


def sinks(rng: np.random.Generator, heads: int) -> Any:
    """About 31 % +inf and 31 % -inf."""
    sink, mask = rng.standard_normal((2, heads)).astype(np.float32)
    sink[mask > 0.5], sink[mask < -0.5] = np.inf, -np.inf
    return sink


class Keys(NamedTuple):
    """One cache as a call takes it, and for the reference each token's rows."""

    cache: Any  # [blocks, page, 1, row]
    indices: Any  # [b, s_q, topk] int32
    topk_length: Any  # [b] int32 or None
    plain: torch.Tensor  # [rows drawn, d]: what they mean
    drawn: Any  # [rows]: which of these each row of the cache is

    def of(self, i: int, t: int) -> torch.Tensor:
        index = self.indices[i, t]
        if self.topk_length is not None:
            index = index[: self.topk_length[i]]
        return self.plain[torch.from_numpy(self.drawn[index[index >= 0]])]


class Case(NamedTuple):
    """What varies beside the shapes."""

    varlen: bool = True
    sink: bool = True
    invalid: bool = False  # all indices are -1
    empty: bool = False  # half of the requests have no keys


def draw_keys(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    tokens: tuple[int, int],
    d: int,
    with_length: bool,
    case: Case,
) -> Keys:
    """Each token lists different keys of its request, -1 behind them; unused rows are NaN."""
    (s_k, topk, page), (b, s_q) = shape, tokens
    lengths = np.full(b, s_k)
    if case.varlen:
        lengths = np.maximum(rng.normal(s_k, s_k / 2, b), s_q).astype(np.int64)
    if case.empty:
        lengths[rng.random(b) < 0.5] = 0
    pages = -(-lengths // page)
    own = np.split(rng.permutation(pages.sum() + 1), np.cumsum(pages))[:b]
    indices = np.full((b, s_q, topk), -1, np.int32)
    for i, t in itertools.product(range(b), range(s_q)):
        if not case.invalid:
            chosen = rng.permutation(lengths[i])[:topk]
            indices[i, t, : len(chosen)] = own[i][chosen // page] * page + chosen % page
    length = rng.integers(0, topk + 1, b).astype(np.int32) if with_length else None
    listed = indices
    if length is not None:
        listed = np.where(np.arange(topk) < length[:, None, None], indices, -1)
    count = int(pages.sum() + 1) * page
    unused = np.ones(count, bool)
    unused[listed[listed >= 0]] = False
    drawn = rng.integers(0, min(count, DRAWN), count)
    shape_drawn = (min(count, DRAWN),)
    if d == 576:
        rows = fp8_rows(rng, shape_drawn)
        plain = torch.from_numpy(dequantize_kv_cache(rows).astype(np.float32))
        # one row of slack behind each page, as the original's caches have
        cache = np.full((count // page, page + 1, 1, 656), 0xFF, np.uint8)[:, :page]
        held = rows[drawn]
        held[unused] = 0xFF
        cache[:] = held.reshape(-1, page, 1, 656)
    else:
        rows = random_rows(rng, (*shape_drawn, d), BF16)
        plain = floats(rows)
        held = rows[drawn]
        held[unused] = np.nan
        cache = held.reshape(-1, page, 1, d)
    return Keys(cache, indices, length, plain, drawn)


def check_decode(
    d: int,
    h_q: int,
    tokens: tuple[int, int],
    shape: tuple[int, int, int],
    with_length: bool = False,
    extra: tuple[tuple[int, int, int], bool] | None = None,
    case: Case = Case(),
) -> None:
    rng = np.random.default_rng(sum(shape) + sum(tokens) + h_q)
    q = rng.standard_normal((*tokens, h_q, d), np.float32).clip(-1, 1).astype(BF16)
    sink = sinks(rng, h_q) if case.sink else None
    sets = [draw_keys(rng, shape, tokens, d, with_length, case)]
    more: dict[str, Any] = {}
    if extra is not None:
        second = draw_keys(rng, extra[0], tokens, d, extra[1], case)
        sets.append(second)
        more = {
            "extra_k_cache": second.cache,
            "extra_indices_in_kvcache": second.indices,
            "extra_topk_length": second.topk_length,
        }
    first = sets[0]

    def call() -> tuple[Any, Any]:
        out, lse = flash_mla_with_kvcache(
            *(q, first.cache, None, None, 512, *get_mla_metadata(), d**-0.55, False, d == 576),
            indices=first.indices, attn_sink=sink, topk_length=first.topk_length, **more,
        )  # fmt: skip
        return out, lse.swapaxes(1, 2)

    def reference() -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for i, t in itertools.product(*map(range, tokens)):
            keys = torch.cat([part.of(i, t) for part in sets])
            out, _, lse = quick(floats(q[i, t]), keys, keys[:, :512], d**-0.55, sink)
            yield (i, t), (out, lse)

    agree_at_every_level(call, reference(), SPARSE_DECODE)


def batches(extra: bool) -> tuple[int, int, int]:
    return (4, 9, 17) if extra else (4, 74, 321)


FEATURES = [
    (576, False, None), (512, False, None), (512, True, None),
    *((512, length, extra) for length in (False, True) for extra in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("h_q", [64, 128])
@pytest.mark.parametrize(("d", "with_length", "extra_length"), FEATURES)
@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("b", [0, 1, 2], ids=["few", "more", "many"])
def test_decode(
    b: int, s_q: int, d: int, with_length: bool, extra_length: bool | None, h_q: int, shape: Any
) -> None:
    extras = [None] if extra_length is None else [(other, extra_length) for other in SHAPES]
    for extra in extras:
        tokens = (batches(extra is not None)[b], s_q)
        for varlen in (True, False) if b == 1 and not with_length and not extra_length else (True,):
            check_decode(d, h_q, tokens, shape, with_length, extra, Case(varlen))


@pytest.mark.parametrize("shape", CORNERS, ids=str)
@pytest.mark.parametrize("h_q", [64, 128])
@pytest.mark.parametrize(("d", "with_length", "extra_length"), FEATURES)
@pytest.mark.parametrize("b", [0, 1, 2], ids=["few", "more", "many"])
def test_decode_of_corner_cases(
    b: int, d: int, with_length: bool, extra_length: bool | None, h_q: int, shape: Any
) -> None:
    extras = [None] if extra_length is None else [(other, extra_length) for other in CORNERS]
    for extra, invalid, empty, sink in itertools.product(extras, *[(True, False)] * 3):
        if invalid or empty or sink:
            tokens = (batches(extra is not None)[b], 3)
            case = Case(True, sink, invalid, empty)
            check_decode(d, h_q, tokens, shape, with_length, extra, case)


def draw_indices(rng: np.random.Generator, s_q: int, s_kv: int, topk: int) -> Any:
    """[s_q, 1, topk], strided as the original's: different keys, and invalid ones behind them."""
    index = np.full((s_q, 2, topk + 128), -1, np.int32)[:, :1, :topk]
    count = min(topk, s_kv)
    for t in range(s_q):
        index[t, 0, :count] = rng.choice(s_kv, count, replace=False)
    index[:, :, count:] = rng.choice([*INVALID, s_kv], (s_q, 1, topk - count))
    return index


def check_prefill(
    s_q: int,
    s_kv: int,
    topk: int,
    h_q: int,
    d: int,
    sink: bool = False,
    with_length: bool = False,
    few_invalid: bool = False,
    checked: int | None = None,
) -> None:
    """Of `s_q` tokens the reference computes `checked`, all if None; the others' q is 0 then,
    in pages that take no memory."""
    rng = np.random.default_rng(s_q + s_kv + topk + h_q)
    shifts = (rng.random(2) - 0.5) / 10
    kv = random_rows(rng, (s_kv, 2, d + 128), BF16, shifts[0])  # strided, as the original's
    kv = kv[:, :1, :d]
    q = np.zeros((s_q, h_q, d + 128), BF16)[..., :d]
    tokens = np.arange(s_q)
    if checked is not None:
        tokens = np.append(rng.permutation(s_q - 1)[: checked - 1], s_q - 1)
    q[tokens] = random_rows(rng, (len(tokens), h_q, d), BF16, shifts[1])
    index = draw_indices(rng, s_q, s_kv, topk)
    if few_invalid:
        index[rng.standard_normal(s_q) < -2] = rng.choice(INVALID)
    attn_sink = sinks(rng, h_q) if sink else None
    length = rng.integers(0, topk + 1, s_q).astype(np.int32) if with_length else None
    plain = floats(kv[:, 0])

    def reference() -> Iterator[tuple[Any, tuple[Any, ...]]]:
        for place, t in enumerate(tokens):
            listed = index[t, 0] if length is None else index[t, 0, : length[t]]
            keys = plain[torch.from_numpy(listed[(listed >= 0) & (listed < s_kv)])]
            yield place, quick(floats(q[t]), keys, keys[:, :512], 0.5, attn_sink)

    def call() -> tuple[Any, ...]:
        results = flash_mla_sparse_fwd(q, kv, index, 0.5, 512, attn_sink, length)
        return results if checked is None else tuple(x[tokens] for x in results)

    agree_at_every_level(call, reference(), SPARSE_PREFILL)


WIDTHS = pytest.mark.parametrize(("h_q", "d"), [(h, d) for d in (512, 576) for h in (64, 128)])
IRREGULAR = [
    *((592, 128), (1840, 256), (1592, 384), (1521, 512)),
    *((95, 128), (153, 256), (114, 384)),
]


@WIDTHS
@pytest.mark.parametrize("s_q", [1, 62, 213])
@pytest.mark.parametrize(("s_kv", "topk"), [(128, 128), (256, 256), (512, 512), *IRREGULAR])
def test_prefill(s_kv: int, topk: int, s_q: int, h_q: int, d: int) -> None:
    check_prefill(s_q, s_kv, topk, h_q, d)


@WIDTHS
@pytest.mark.parametrize("with_length", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("s_q", [62, 213])
@pytest.mark.parametrize(("s_kv", "topk"), IRREGULAR)
def test_prefill_with_features(
    s_kv: int, topk: int, s_q: int, sink: bool, with_length: bool, h_q: int, d: int
) -> None:
    check_prefill(s_q, s_kv, topk, h_q, d, sink, with_length)


@WIDTHS
@pytest.mark.parametrize(
    ("s_q", "s_kv", "topk", "few_invalid"),
    [
        *((1, 128, 128, True), (1, 256, 256, True), (1234, 4321, 4096, True)),
        *((4096, 2048, 2048, True), (1, 32, 2048, False), (1024, 32, 2048, False)),
        *((1, 64, 8192, False), (1024, 64, 8192, False)),
    ],
)
def test_prefill_of_corner_cases(
    s_q: int, s_kv: int, topk: int, few_invalid: bool, h_q: int, d: int
) -> None:
    check_prefill(s_q, s_kv, topk, h_q, d, True, True, few_invalid)


@WIDTHS
def test_prefill_of_more_values_than_int32_counts(h_q: int, d: int) -> None:
    """70,000 tokens of 64 heads, 35,000 of 128. The original checks no value here; 70 tokens
    are compared, the last among them."""
    check_prefill(70000 * 64 // h_q, 256, 256, h_q, d, True, True, checked=70)


@pytest.mark.parametrize(
    ("d", "h_q", "topk", "s_kv"),
    [
        *((576, 128, 2048, n) for n in (8192, 32768, 65536, 98304, 131072)),
        *((512, h, k, n) for h, k in ((64, 512), (128, 1024)) for n in (8192, 32768, 49152, 65536)),
    ],
)
def test_prefill_of_the_timed_shapes(d: int, h_q: int, topk: int, s_kv: int) -> None:
    check_prefill(4096, s_kv, topk, h_q, d, True)
