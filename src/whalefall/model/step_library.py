"""The compiled native/step.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

from whalefall import jit

__all__ = ["library"]


def library() -> jit.Library:
    """native/step.cpp at the ISA level in force. Raises: MissingError without a compiler."""
    loaded = jit.build(Path(__file__).parent / "native" / "step.cpp")
    pointer = ctypes.c_void_p
    loaded.wf_step.argtypes = loaded.wf_step_workspace.argtypes = [pointer, pointer]
    loaded.wf_step_part.argtypes = [pointer, pointer, pointer]
    for entry in ("wf_step", "wf_step_workspace", "wf_step_part"):
        getattr(loaded, entry).restype = ctypes.c_int64
    return loaded
