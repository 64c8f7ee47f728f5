"""A process's first call, which makes calls known, under whatever torch does around it.

Each runs in a process of its own: what is found out there is found once.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

_BEGIN = """
import numpy as np, torch
from whalefall import gemm
from whalefall.dtypes.native_calls import native
a, b = torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(8, 64, dtype=torch.bfloat16)
d = torch.zeros(4, 8)
"""
_END = """
assert d.unique().tolist() == [64.0], d
seen = native()
assert seen is None or (seen.torch and seen.read(torch.ones(2)) is not None)
"""
_WATCH = """
from torch.utils._python_dispatch import TorchDispatchMode
class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise ValueError(str(function))
"""
_UNDER = {
    "a compiler": "torch.compile(lambda: gemm.bf16_gemm_nt(a, b, d), backend='eager')()",
    "fake tensors": """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    gemm.bf16_gemm_nt(a, b, d)
""",
    "another device": """
with torch.device("meta"):
    gemm.bf16_gemm_nt(a, b, d)
""",
    "a mode": f"{_WATCH}\nwith Refuse():\n    gemm.bf16_gemm_nt(a, b, d)\n",
}


@pytest.mark.parametrize("what", _UNDER)
def test_a_first_call_is_right_and_finds_torch(what: str) -> None:
    code = _BEGIN + _UNDER[what] + _END
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_torch_that_is_still_imported_is_met_later() -> None:
    code = """
import sys, types, importlib.machinery
import numpy as np
half = types.ModuleType("torch")
half.__spec__ = importlib.machinery.ModuleSpec("torch", None)
half.__spec__._initializing = True
sys.modules["torch"] = half
from whalefall import gemm
from whalefall.dtypes.native_calls import native
x, w = np.ones((2, 64), np.float32), np.ones((8, 64), np.float32)
gemm.linear(x, w)
assert native() is None or native().torch is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
