"""whalefall: DeepSeek's open-source systems in Python, on the machines people have.

`LLM` and `SamplingParams` generate text; the rooms (`whalefall.gemm`, `whalefall.fs`, …) are
libraries of their own. Everything is imported on first use, so `import whalefall` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whalefall.engine import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingParams"):
        from whalefall import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'whalefall' has no attribute {name!r}")
