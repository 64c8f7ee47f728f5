"""This process without a C++ compiler, for as long as a block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from whalefall import jit
from whalefall.attention import native_calls as attention_calls
from whalefall.dtypes import forget_calls
from whalefall.gemm import native_calls as gemm_calls

FETCHED = (attention_calls._entry, gemm_calls._library, gemm_calls._product_library)


@contextlib.contextmanager
def no_compiler() -> Iterator[list[str]]:
    """`jit.build` finds no compiler, and nothing of before is remembered.

    Yields: what `jit.numpy_instead` was told, in place of its warning.
    """
    told: list[str] = []

    def missing(*_: object, **__: object) -> None:
        raise jit.NoCompilerError("no C++ compiler")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "build", missing)
        patch.setattr(jit, "numpy_instead", lambda error: told.append(str(error)))
        forget_calls()
        for fetched in FETCHED:
            fetched.cache_clear()
        try:
            yield told
        finally:
            for fetched in FETCHED:
                fetched.cache_clear()
