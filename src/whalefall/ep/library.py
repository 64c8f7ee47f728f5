"""Ep room: the native side — its structures as ctypes sees them, and its functions."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import jit

__all__ = [
    "KCLOSED",
    "KDEAD",
    "KDISAGREE",
    "KFAILED",
    "KMISCOUNTED",
    "KNOMEMORY",
    "KNOROOM",
    "KSILENT",
    "Announcement",
    "CombineCall",
]
__all__ += ["NOWHERE", "DispatchCall", "GroupView", "library", "pointer"]

KDEAD, KSILENT, KNOROOM, KNOMEMORY = 1, 1_000_001, -2_000_001, -2_000_002
KDISAGREE, KMISCOUNTED, KCLOSED, KFAILED = -2_000_003, -2_000_004, -2_000_005, 3_000_001
_nothing = ctypes.create_string_buffer(64)
NOWHERE = ctypes.addressof(_nothing)  # of what was given and has no elements
_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class GroupView(ctypes.Structure):
    """`wf_ep::Group`: what this process knows of its group's shared memory."""

    _fields_ = _fields(
        ("rank num_ranks local num_local slots spins crowded lock shrink slots_only closing", _I32),
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
        ("capacity entries", _I64),
        ("forward_token forward_mask forward_idx forward_cursor forward_rows waited_ns", _P),
        ("threads keep_own", _I64),
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
        ("shared_at most serial call log_format keep_own", _I64),
    )


class Announcement(ctypes.Structure):
    """`Announcement` of exchange.cpp: what a rank says before a dispatch, and what it learns."""

    _fields_ = _fields(
        ("per_rank per_expert", _P),
        ("num_experts room room_at count call serial", _I64),
        ("heads offers", _P),
        ("alignment rows bytes most_tokens fits big_bytes thread_bytes cores", _I64),
    )


_U32 = ctypes.c_uint32
_SIGNATURES: dict[str, list[object]] = {
    "wf_ep_layout": [_P, _I64, _I64, _I64, _I64, _P, _I64, _P, _P, _P, _P],
    "wf_ep_post": [_P, _U32, _P, _I64],
    "wf_ep_collect": [_P, _U32, _P, _I64],
    "wf_ep_await_slot": [_P, _U32],
    "wf_ep_staged": [_P, _I64, _U32],
    "wf_ep_posted": [_P, _I64, _U32],
    "wf_ep_failed": [_P, _I64, _I64],
    "wf_ep_give_up": [_P, _I64],
    "wf_ep_done": [_P, _U32],
    "wf_ep_done_before": [_P, _U32],
    "wf_ep_is_alive": [_P, _I64],
    "wf_ep_pack": [_P, _P, _I64, _I64, _P, _I64, _P],
    "wf_ep_dispatch": [_P, _P],
    "wf_ep_room": [_P, _P, _I64],
    "wf_ep_announce": [_P, _P, _P],
    "wf_ep_announce_and_write": [_P, _P, _P],
    "wf_ep_take_out": [_P, _P, _P],
    "wf_ep_direct": [_P, _P, _P],
    "wf_ep_offer": [_P, _P, _P],
    "wf_ep_again": [_P, _P, _P],
    "wf_ep_combine_stage": [_P, _P, _I64, _I64, _I64],
    "wf_ep_post_form": [_P, _P, _U32],
    "wf_ep_combine_said": [_P, _I64, _P],
    "wf_ep_combine_await": [_P, _I64, _I64, _P],
    "wf_ep_combine_sum": [_P, _P, _I64, _I64, _I64, _P],
    "wf_ep_combine_forward": [_P, _P, *[_I64] * 6, _P, _P, _P],
    "wf_ep_combine": [_P, _P, _P, _I64, _I64, _I64],
    "wf_ep_awaits": [_P, _I64],
    "wf_ep_awaited": [_P],
    "wf_ep_awaited_by": [_P, _I64],
    "wf_ep_silence": [_P, _I64],
    "wf_ep_told_awaited": [_P, _I64, _I64],
    "wf_ep_forwards": [],
    "wf_ep_through_log": [_P, _I64, _I64, _P],
    "wf_ep_cast": [_P, _I64, _I64, _I64, _I64, _P, _P],
}
_NOTHING = (
    "wf_ep_awaits",
    "wf_ep_forwards",
    "wf_ep_told_awaited",
    "wf_ep_combine_said",
    "wf_ep_post_form",
    "wf_ep_staged",
    "wf_ep_posted",
    "wf_ep_failed",
    "wf_ep_give_up",
    "wf_ep_done",
    "wf_ep_done_before",
    "wf_ep_cast",
    "wf_ep_take_out",
)


@cache
def library() -> jit.Library:
    """The compiled `native/exchange.cpp`; calls release the GIL."""
    lib = jit.build(Path(__file__).parent / "native" / "exchange.cpp")
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = None if name in _NOTHING else _I64
    return lib


def pointer(array: np.ndarray | None) -> int | None:
    """Where an array begins, never 0; None stays None."""
    return None if array is None else int(array.__array_interface__["data"][0]) or NOWHERE
