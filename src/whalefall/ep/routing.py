"""Ep room: the gate — which experts a token goes to, and how many hosts that touches.

In: router logits. Out: expert ids and weights, as dispatch takes them. The project's only gate.
`reference.route` is the definition; here the checks and the native call.
Source: DeepSeek-V2 paper, 2.2.2 (softmax, groups by their best expert); DeepSeek-V3 report, 2.1.2
(sigmoid with bias, groups by the sum of their two best).

# T tokens, E experts, K top-k
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from whalefall import jit
from whalefall.arguments import finite, flag, shown, whole
from whalefall.comm.library import address
from whalefall.ep import reference
from whalefall.ep.arguments import MOST, arrays
from whalefall.errors import ConfigError, DtypeError, ShapeError, WhalefallError

__all__ = ["RoutingError", "hosts_touched", "route"]

MAX_GROUPS = 256


class RoutingError(WhalefallError, ValueError):
    """The router's logits are NaN; the layers before it broke."""


class _Gate(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "bias", "index", "weight")),
        *((n, ctypes.c_int64) for n in ("tokens", "experts", "top_k", "groups", "top_groups")),
        *((name, ctypes.c_int) for name in ("softmax", "normalize")),
        ("scale", ctypes.c_float),
    ]


def route(
    logits_TE: np.ndarray,
    bias_E: np.ndarray | None,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: Literal["sigmoid", "softmax"] = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose `top_k` experts for each token, within its best `topk_groups` groups.

    Args:
        logits_TE: [T, E] float32, the router's output.
        bias_E: [E] float32, added to the scores for the choice only (V3's balancing bias); None: 0.
        top_k: experts a token.
        num_groups: E is split into so many groups of neighbours; 1: no grouping.
        topk_groups: groups a token may use.
        scoring: "sigmoid" (V3; a group counts as the sum of its two best of score + bias) or
            "softmax" (V2; a group counts as its best).
        normalize: divide the chosen scores by their sum.
        scale: the weights are multiplied by it at the end.
    Returns: topk_idx [T, K] int64, best first, among equals the lowest index first; topk_weight
        [T, K] float32.
    Raises: ShapeError, DtypeError, ConfigError; RoutingError where a logit is NaN.
    """
    _check(logits_TE, bias_E, top_k, num_groups, topk_groups, scoring)
    normalize = flag("route: normalize", normalize)
    scale = finite("route: scale", scale, -3e38, 3e38)
    if scoring == "softmax" and bias_E is None and num_groups == topk_groups:
        num_groups = topk_groups = 1
    try:
        native = library()
    except jit.NoCompilerError as missing:
        jit.numpy_instead(missing)
        return reference.route(
            logits_TE, bias_E, top_k, num_groups, topk_groups, scoring, normalize, scale
        )
    T, E = logits_TE.shape
    logits_TE = np.ascontiguousarray(logits_TE)
    idx_TK, weight_TK = np.empty((T, top_k), np.int64), np.empty((T, top_k), np.float32)
    bias = None if bias_E is None else np.ascontiguousarray(bias_E)
    gate = _Gate(
        address(logits_TE), None if bias is None else address(bias), address(idx_TK),
        address(weight_TK), T, E, top_k, num_groups, topk_groups, scoring == "softmax", normalize,
        scale,
    )  # fmt: skip
    bad = native.wf_route(ctypes.byref(gate))
    if bad:
        raise RoutingError(f"route: logits of token {-1 - bad} hold NaN (or only -inf)")
    return idx_TK, weight_TK


def hosts_touched(topk_idx: np.ndarray, num_experts: int, num_hosts: int) -> np.ndarray:
    """On how many hosts the experts of each token live.

    Args:
        topk_idx: [T, K] expert ids; -1 is nobody.
        num_experts: E; host h has experts h·E/hosts and on.
        num_hosts: a divisor of E.
    Returns: [T] int32.
    Source: DeepSeek-V3 report, 2.1.2, node-limited routing.
    """
    whole("hosts_touched: num_experts", num_experts, 1, MOST)
    arrays("hosts_touched", topk_idx=topk_idx if topk_idx is not None else 0)
    if topk_idx.ndim != 2 or topk_idx.dtype.kind != "i":
        raise DtypeError(
            f"hosts_touched: topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}, wanted integers "
            "[T, K]"
        )
    if topk_idx.size and topk_idx.max() >= num_experts:
        raise ConfigError(f"hosts_touched: expert {topk_idx.max()}, wanted below {num_experts}")
    if num_experts % whole("hosts_touched: num_hosts", num_hosts, 1, MOST):
        raise ConfigError(
            f"hosts_touched: {num_experts} experts over {num_hosts} hosts, wanted even"
        )
    seen = np.zeros((len(topk_idx), num_hosts + 1), bool)
    hosts = np.where(topk_idx < 0, num_hosts, topk_idx // (num_experts // num_hosts))
    np.put_along_axis(seen, hosts, True, 1)
    return seen[:, :num_hosts].sum(1, dtype=np.int32)


@cache
def library() -> jit.Library:
    """native/routing.cpp, whose `wf_route` other native units call by address."""
    loaded = jit.build(Path(__file__).parent / "native" / "routing.cpp")
    loaded.wf_route.restype = ctypes.c_int64
    return loaded


def _check(
    logits: np.ndarray, bias: np.ndarray | None, top_k: int, groups: int, kept: int, scoring: str
) -> None:
    arrays("route", logits=logits if logits is not None else 0, bias=bias)
    whole("route: num_groups", groups, 0, MOST)
    whole("route: topk_groups", kept, 0, MOST)
    whole("route: top_k", top_k, 0, MOST)
    if logits.ndim != 2:
        raise ShapeError(f"route: logits are {list(logits.shape)}, wanted [tokens, experts]")
    if logits.dtype != np.float32:
        raise DtypeError(f"route: logits are {logits.dtype}, wanted float32")
    E = logits.shape[1]
    if bias is not None and (bias.shape != (E,) or bias.dtype != np.float32):
        raise ShapeError(f"route: bias is {bias.dtype} {list(bias.shape)}, wanted float32 [{E}]")
    if not isinstance(scoring, str) or scoring not in ("sigmoid", "softmax"):
        raise ConfigError(f"route: scoring is {shown(scoring)}, wanted 'sigmoid' or 'softmax'")
    if not 1 <= groups <= MAX_GROUPS or E % groups:
        raise ConfigError(
            f"route: num_groups is {groups}, wanted a divisor of {E} up to {MAX_GROUPS}"
        )
    if not 1 <= kept <= groups:
        raise ConfigError(f"route: topk_groups is {kept}, wanted 1 … {groups}")
    if not 1 <= top_k <= kept * (E // groups):
        raise ConfigError(
            f"route: top_k is {top_k}, wanted 1 … {kept * (E // groups)} = experts in {kept} groups"
        )
