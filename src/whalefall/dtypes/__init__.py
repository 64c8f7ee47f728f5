"""Dtypes room: arrays by their memory, and the small floating-point formats DeepSeek uses.

In: numpy arrays (with ml_dtypes) or CPU torch tensors, recognised without importing torch.
Out: views (address, shape, strides, dtype name), arrays of the caller's library, and exact
conversions to and from E4M3, UE8M0 and E2M1.
"""

from whalefall.dtypes.arrays import (
    NUMPY_DTYPES,
    View,
    as_numpy,
    empty_at,
    empty_like,
    over_memory,
    refuse_gradient,
    restore,
    view,
)
from whalefall.dtypes.formats import (
    E4M3_MAX,
    FP4_MAX,
    ceil_to_ue8m0,
    e2m1_to_float,
    e4m3_to_float,
    float_to_e2m1,
    float_to_e4m3,
    float_to_ue8m0,
    pack_ue8m0,
    ue8m0_to_float,
    unpack_ue8m0,
)
from whalefall.dtypes.memo import CallMemo

__all__ = [
    "E4M3_MAX",
    "FP4_MAX",
    "NUMPY_DTYPES",
    "CallMemo",
    "View",
    "as_numpy",
    "ceil_to_ue8m0",
    "e2m1_to_float",
    "e4m3_to_float",
    "empty_at",
    "empty_like",
    "float_to_e2m1",
    "float_to_e4m3",
    "float_to_ue8m0",
    "over_memory",
    "pack_ue8m0",
    "refuse_gradient",
    "restore",
    "ue8m0_to_float",
    "unpack_ue8m0",
    "view",
]
