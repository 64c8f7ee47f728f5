"""Engine room: the next token of each sequence out of its logits.

In: logits [vocab] fp32, `SamplingParams`, the tokens so far, a number in [0, 1). Out: a token and,
on request, log-probabilities of the model itself (before temperature and penalties, as vLLM).
`sample_row` is the definition (numpy); native/sampling.cpp agrees with it.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from whalefall import jit
from whalefall.engine.sampling_params import SamplingParams
from whalefall.errors import MissingError

__all__ = ["SampleRow", "TokenLogprobs", "library", "sample", "sample_row", "uniform"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position.

    Attributes:
        token_id: the chosen token.
        logprob: its log-probability.
        rank: 1 if it is the likeliest.
        top: the likeliest tokens with theirs, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class SampleRow:
    """One row of logits and what decides over it.

    Attributes:
        seen: tokens of prompt and answer → how often the answer has them (0: prompt only).
        banned: tokens that may not be chosen now (EOS before min_tokens).
        uniform: the draw, in [0, 1).
        allowed: the only tokens that may be chosen, a bit each (uint8, lowest first); None: all.
        report: whether log-probabilities are wanted, where the parameters ask for them.
    """

    logits: np.ndarray
    params: SamplingParams
    seen: Counter[int]
    banned: Sequence[int] = ()
    uniform: float = 0.0
    allowed: np.ndarray | None = None
    report: bool = True

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report; None: nothing."""
        return self.params.logprobs if self.report else None


def uniform(seed: int, index: int, position: int) -> float:
    """The draw of answer `index` at `position`: a hash, so that it depends on nothing else."""
    text = b"".join((v & ((1 << 64) - 1)).to_bytes(8, "little") for v in (seed, index, position))
    bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return (bits >> 11) / (1 << 53)


def penalised(params: SamplingParams) -> bool:
    """Whether the tokens seen so far matter."""
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


def sample_row(row: SampleRow) -> tuple[int, TokenLogprobs | None]:
    """The definition, in plain numpy; see the head of native/sampling.cpp for the formula."""
    params, x = row.params, row.logits.astype(np.float32).copy()
    for token, count in row.seen.items() if penalised(params) else ():
        factor = np.float32(params.repetition_penalty)
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        if count:
            x[token] -= np.float32(params.frequency_penalty) * np.float32(count) + np.float32(
                params.presence_penalty
            )
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    x[list(row.banned)] = -np.inf
    if row.allowed is not None:
        x[np.unpackbits(row.allowed, count=len(x), bitorder="little") == 0] = -np.inf
    token = int(np.argmax(x)) if params.temperature == 0 else _draw(x, params, row.uniform)
    wanted = row.num_logprobs
    return token, None if wanted is None else _report(row.logits, token, wanted)


def _draw(x: np.ndarray, params: SamplingParams, draw: float) -> int:
    p = np.exp((x.astype(np.float64) - x.max()) / params.temperature)
    p[p < params.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    if params.top_p < 1:
        enough = int(np.searchsorted(np.cumsum(p[order]), params.top_p * p.sum())) + 1
        p[order[enough:]] = 0
    total = np.cumsum(p)
    return int(np.searchsorted(total, draw * total[-1], side="right"))


def _report(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    x = logits.astype(np.float64)
    logprob = x - (x.max() + np.log(np.exp(x - x.max()).sum()))
    order = np.argsort(-x, kind="stable")
    rank = int(np.flatnonzero(order == token)[0]) + 1
    top = tuple((int(i), float(np.float32(logprob[i]))) for i in order[:count])
    return TokenLogprobs(token, float(np.float32(logprob[token])), rank, top)


class _Row(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("vocab", ctypes.c_int64),
        ("seen", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("num_seen", ctypes.c_int64),
        ("biased", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_biased", ctypes.c_int64),
        ("banned", ctypes.c_void_p),
        ("num_banned", ctypes.c_int64),
        ("allowed", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "uniform")),
        *((name, ctypes.c_float) for name in ("repetition", "frequency", "presence")),
        ("top_k", ctypes.c_int32),
        ("num_top", ctypes.c_int32),
        ("token", ctypes.c_int32),
        ("logprob", ctypes.c_float),
        ("rank", ctypes.c_int32),
        ("top_tokens", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
    ]


@cache
def library() -> jit.Library:
    """native/sampling.cpp. Raises: MissingError without a compiler."""
    loaded = jit.build(Path(__file__).parent / "native" / "sampling.cpp")
    loaded.wf_sample.restype = None
    loaded.wf_sample.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


def _list(values: Sequence[float], dtype: type, keep: list[np.ndarray]) -> int | None:
    if not len(values):
        return None
    array: np.ndarray = np.array(values, dtype)
    keep.append(array)
    return int(array.ctypes.data)


def _fill(target: _Row, row: SampleRow, keep: list[np.ndarray]) -> None:
    """Fill what the parameters make use of; the rest stays zero, which means the same."""
    params = row.params
    keep.append(row.logits)
    target.logits, target.vocab = row.logits.ctypes.data, len(row.logits)
    if penalised(params) and row.seen:
        target.seen = _list(list(row.seen), np.int32, keep)
        target.counts = _list(list(row.seen.values()), np.int32, keep)
        target.num_seen = len(row.seen)
        target.repetition = params.repetition_penalty
        target.frequency, target.presence = params.frequency_penalty, params.presence_penalty
    if params.logit_bias:
        target.biased = _list(list(params.logit_bias), np.int32, keep)
        target.bias = _list(list(params.logit_bias.values()), np.float32, keep)
        target.num_biased = len(params.logit_bias)
    if row.banned:
        target.banned, target.num_banned = _list(row.banned, np.int32, keep), len(row.banned)
    if row.allowed is not None:
        keep.append(row.allowed)
        target.allowed = row.allowed.ctypes.data
    if params.temperature:
        target.temperature, target.top_p = params.temperature, params.top_p
        target.min_p, target.uniform, target.top_k = params.min_p, row.uniform, params.top_k
    wanted = row.num_logprobs
    target.num_top = -1 if wanted is None else min(wanted, len(row.logits))
    if target.num_top > 0:
        target.top_tokens = _list([0] * target.num_top, np.int32, keep)
        target.top_logprobs = _list([0] * target.num_top, np.float32, keep)


def sample(rows: Sequence[SampleRow]) -> list[tuple[int, TokenLogprobs | None]]:
    """Choose a token for each row; logits must be contiguous fp32."""
    if not rows:
        return []
    try:
        native = library()
    except MissingError:  # no compiler on this machine
        return [sample_row(row) for row in rows]
    targets = (_Row * len(rows))()
    keep: list[np.ndarray] = []
    for target, row in zip(targets, rows, strict=True):
        _fill(target, row, keep)
    native.wf_sample(ctypes.addressof(targets), len(rows))
    return [(target.token, _logprobs(target)) for target in targets]


def _logprobs(target: _Row) -> TokenLogprobs | None:
    count = target.num_top
    if count < 0:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = (ctypes.c_int32 * count).from_address(target.top_tokens)
        values = (ctypes.c_float * count).from_address(target.top_logprobs)
        top = tuple(zip(ids, values, strict=True))
    return TokenLogprobs(target.token, target.logprob, target.rank, top)
