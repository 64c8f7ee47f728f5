"""A pytest plugin: the tests of `gemm` and `attention` on a machine without a C++ compiler.

`python -m pytest -p tests.without_compiler tests/gemm tests/attention` runs them with no compiler,
an empty cache of compiled kernels, and one ISA level: numpy knows of none. What is about compiled
code itself is left out, by name.
"""

from __future__ import annotations

import os
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="whalefall-test-")
os.environ |= {"WHALEFALL_CXX": "/bin/false", "WHALEFALL_CACHE": _CACHE.name}
os.environ.pop("WHALEFALL_ISA", None)

from whalefall import jit  # noqa: E402
from whalefall.jit import isa  # noqa: E402

isa.levels = jit.levels = lambda: ("any",)  # before any conftest asks
jit.compiler._said.acquire(blocking=False)  # the one warning would be an error here
LEFT_OUT = (
    "gemm/test_levels.py::test_units_compile_at_levels_beyond_this_machine",
    "gemm/test_levels.py::test_slow_denormals_change_no_bit",
    "attention/test_serving.py::test_levels_that_this_machine_may_lack_compile",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of `LEFT_OUT`."""
    out = [item for item in items if item.nodeid.split("[")[0].split("tests/")[-1] in LEFT_OUT]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
