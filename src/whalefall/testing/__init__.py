"""Testing: what whalefall's own tests and benchmarks stand on, public for other projects.

`assert_close` judges arrays by one number; `run_ranks` starts processes that act as ranks; the
`…Suite` classes are conformance suites to subclass (they need pytest); `benchmark` has contenders
interleaved in one run, and a page written from the results; `load` drives an OpenAI server.
"""

from __future__ import annotations

import sys
from typing import Any

from whalefall.testing.closeness import assert_close, diff
from whalefall.testing.ranks import run_ranks

__all__ = [
    "ChatServerSuite",
    "Fp8GemmSuite",
    "MlaDecodeSuite",
    "PlacementSuite",
    "assert_close",
    "benchmark",
    "diff",
    "load",
    "run_ranks",
]

_SUITES = {
    "ChatServerSuite": "chat_server",
    "Fp8GemmSuite": "fp8_gemm",
    "MlaDecodeSuite": "mla_decode",
    "PlacementSuite": "placement",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SUITES:
        import pytest

        module = f"{__name__}.suites.{_SUITES[name]}"
        if module not in sys.modules:
            pytest.register_assert_rewrite(module)  # so that a failure shows its values
        return getattr(importlib.import_module(module), name)
    if name in ("benchmark", "load"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
