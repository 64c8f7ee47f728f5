"""A kernel that adds, and the places of its addresses: what known calls are tried on."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import jit
from whalefall.dtypes import Places

SOURCE = """
#include <cstdint>
struct Add { const float* x; const float* y; float* to; int64_t count; };
extern "C" __attribute__((visibility("default"))) int32_t add(const Add* call) {
  if (call->count && call->x[0] < 0) return 1;
  for (int64_t i = 0; i < call->count; ++i) call->to[i] = call->x[i] + (call->y ? call->y[i] : 1);
  return 0;
}
"""


class Add(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "to")),
        ("count", ctypes.c_int64),
    )


GIVEN = Places(Add, {"x": 0, "y": 1, "to": 2}, status=True)
NEW = Places(Add, {"x": 0, "y": 1}, {"to": 0}, status=True)


def compiled(folder: Path) -> Any:
    """Its entry, which refuses an x that begins below 0."""
    source = folder / "add.cpp"
    source.write_text(SOURCE, encoding="utf-8")
    return jit.build(source, level="any").add


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def struct_of(x: Any, y: Any, to: Any = None) -> Add:
    address = [None if a is None else a.ctypes.data for a in (x, y, to)]
    return Add(*address, x.size)
