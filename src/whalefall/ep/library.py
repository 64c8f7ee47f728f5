"""Ep room: the native side — its structures as ctypes sees them, and its functions."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from whalefall import jit

__all__ = ["KDEAD", "KNOMEMORY", "KNOROOM", "KSILENT", "CombineCall", "DirectCall", "DispatchCall"]
__all__ += ["Form", "GroupView", "library"]

KDEAD, KSILENT, KNOROOM, KNOMEMORY = 1, 1_000_001, -2_000_001, -2_000_002
_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class GroupView(ctypes.Structure):
    """`wf_ep::Group`: what this process knows of its group's shared memory."""

    _fields_ = _fields(
        ("rank num_ranks local num_local slots spins crowded lock shrink pad", _I32),
        ("slot_bytes timeout_ns mailbox_bytes mailboxes", _I64),
        ("rank_of local_of owner control stream mailbox slot shared masked reserved", _P),
        ("memory_file slot_offset", _I64),
    )


class DispatchCall(ctypes.Structure):
    """`wf_ep::Dispatch`: the arguments of one dispatch."""

    _fields_ = _fields(
        ("x scale topk_idx topk_weights in_rank", _P),
        ("x_stride x_bytes scale_bytes top_k tokens block ticks base experts_per_rank", _I64),
        ("per_selection stage pull big transposed_rows", _I64),
        ("recv_x recv_scale recv_idx recv_weights recv_token cursor order order_token", _P),
        ("order_cursor", _P),
        ("capacity", _I64),
        ("forward_token forward_mask forward_idx forward_cursor waited_ns", _P),
        ("threads", _I64),
    )


class CombineCall(ctypes.Structure):
    """`wf_ep::Combine`: the arguments of one combine."""

    _fields_ = _fields(
        ("x", _P),
        ("x_stride hidden fp32", _I64),
        ("row_weights order order_token order_start cursor", _P),
        ("top_k tokens block base experts_per_rank per_selection zero_copy", _I64),
        ("in_rank topk_idx topk_weights bias0 bias1 out", _P),
        ("out_fp32 big threads", _I64),
        ("out_weights", _P),
        ("num_hosts host", _I64),
        ("host_of remote", _P),
        ("shared_at", _I64),
    )


class DirectCall(ctypes.Structure):
    """`wf_ep::Direct`: where the rows of a dispatch go."""

    _fields_ = _fields(("to rows next next_order", _P))


class Form(ctypes.Structure):
    """`wf_ep::Form`: what a row is."""

    _fields_ = _fields(("x_bytes scale_bytes top_k weights per_selection", _I64))


_U32 = ctypes.c_uint32
_SIGNATURES: dict[str, list[object]] = {
    "wf_ep_layout": [_P, _I64, _I64, _I64, _I64, _P, _I64, _P, _P, _P, _P],
    "wf_ep_post": [_P, _U32, _P, _I64],
    "wf_ep_collect": [_P, _U32, _P, _I64],
    "wf_ep_await_slot": [_P, _U32],
    "wf_ep_staged": [_P, _I64, _U32],
    "wf_ep_posted": [_P, _I64, _U32],
    "wf_ep_failed": [_P, _I64, _I64],
    "wf_ep_done": [_P, _U32],
    "wf_ep_is_alive": [_P, _I64],
    "wf_ep_pack": [_P, _P, _I64, _I64, _P, _I64, _P],
    "wf_ep_dispatch": [_P, _P],
    "wf_ep_fits": [_P, _P, _I64, _P],
    "wf_ep_room": [_I64, _P],
    "wf_ep_direct": [_P, _P, _P],
    "wf_ep_combine_stage": [_P, _P, _I64, _I64, _I64],
    "wf_ep_combine_await": [_P, _I64, _I64, _P],
    "wf_ep_combine_sum": [_P, _P, _I64, _I64, _I64, _P],
    "wf_ep_combine_forward": [_P, _P, *[_I64] * 6, _P, _P, _P],
    "wf_ep_combine": [_P, _P, _I64, _I64, _I64, _P],
    "wf_ep_cast": [_P, _I64, _I64, _I64, _I64, _P, _P],
}
_NOTHING = ("wf_ep_staged", "wf_ep_posted", "wf_ep_failed", "wf_ep_done", "wf_ep_cast")


@cache
def library() -> jit.Library:
    """The compiled `native/exchange.cpp`; calls release the GIL."""
    lib = jit.build(Path(__file__).parent / "native" / "exchange.cpp")
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = None if name in _NOTHING else _I64
    return lib
