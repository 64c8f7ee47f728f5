"""Dtypes room: arrays by their memory, and the small floating-point formats DeepSeek uses.

In: numpy arrays (with ml_dtypes) or CPU torch tensors, recognised without importing torch.
Out: views (address, shape, strides, dtype name), arrays of the caller's library, and exact
conversions to and from E4M3, UE8M0 and E2M1.
"""

from whalefall.dtypes.arrays import (
    NUMPY_DTYPES,
    View,
    as_numpy,
    empty_like,
    over_memory,
    refuse_gradient,
    restore,
    view,
)
from whalefall.dtypes.calls import KnownCalls, Places, Result, forget_calls
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

__all__ = [
    "E4M3_MAX",
    "FP4_MAX",
    "NUMPY_DTYPES",
    "KnownCalls",
    "Places",
    "View",
    "as_numpy",
    "ceil_to_ue8m0",
    "e2m1_to_float",
    "e4m3_to_float",
    "empty_like",
    "float_to_e2m1",
    "float_to_e4m3",
    "float_to_ue8m0",
    "forget_calls",
    "Result",
    "over_memory",
    "pack_ue8m0",
    "refuse_gradient",
    "restore",
    "ue8m0_to_float",
    "unpack_ue8m0",
    "view",
]
