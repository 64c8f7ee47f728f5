"""Units compile at every level there is, also at those this machine cannot run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.gemm.operands import BF16
from whalefall import gemm, jit
from whalefall.jit import isa, machine
from whalefall.jit.compile import INCLUDE, _measured_options
from whalefall.jit.compiler import OPTIONS, compiler

NATIVE = Path(gemm.__file__).parent / "native"
# gemm.cpp is the same code at all levels from avx512 on, but for what multiplies bf16
UNITS = [
    (unit, level, macro)
    for unit in ("linear.cpp", "gemm.cpp")
    for level, macro in (("avx512", ""), ("amx", "-DWF_DOT"), ("amx", "-DWF_TILE"))
]


@pytest.mark.parametrize(("unit", "level", "macro"), UNITS)
def test_units_compile_for_machines_other_than_this(
    tmp_path: Path, unit: str, level: str, macro: str
) -> None:
    if level in jit.levels() and macro in ("", *_measured_options(level)):
        pytest.skip("other tests run it")
    command = [*compiler().command, *OPTIONS, "-O1", "-Werror", *isa.flags(level)]
    command += [macro] if macro else []
    command += [f"-I{INCLUDE}", str(NATIVE / unit), "-o", str(tmp_path / "unit.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_slow_denormals_change_no_bit() -> None:
    """The decoder for CPUs that trap on subnormals gives what the fast one gives."""
    import ctypes

    import numpy as np

    from tests.gemm.operands import fp8
    from whalefall.gemm.linear import weight_struct
    from whalefall.gemm.structs import Input, LinearCall, Output

    rng = np.random.default_rng(0)
    (weight, scale), _ = fp8(rng, (37, 300), (128, 128))
    x = rng.standard_normal((5, 300)).astype(np.float32)
    results = []
    for flags in ((), ("-DWF_SLOW_DENORMALS",)):
        library = jit.build(NATIVE / "linear.cpp", flags=(*flags, "-O1") if flags else ())
        library.wf_linear.argtypes = [ctypes.c_void_p]
        for m in (1, 2, 5):
            y = np.zeros((m, 37), np.float32)
            call = LinearCall(
                weight_struct(weight, scale, "test"),
                Input(x.ctypes.data, 300, 0, 0),
                Output(y.ctypes.data, 37, None, None, 0, 0),
                m,
            )
            library.wf_linear(ctypes.addressof(call))
            results.append(y)
    for fast, slow in zip(results[:3], results[3:], strict=True):
        assert (fast == slow).all()


def test_tiles_and_dots_take_subnormal_halves_for_zero(level: str) -> None:
    a, b = np.full((1, 128), 1e-39, BF16), np.full((1, 128), 1e38, BF16)
    d = np.empty((1, 1), np.float32)
    gemm.bf16_gemm_nt(a, b, d)
    whole = float((a.astype(np.float64) * b.astype(np.float64)).sum())
    assert d[0, 0] == (0 if machine.halves_are_fast(level) else pytest.approx(whole, rel=1e-5))
