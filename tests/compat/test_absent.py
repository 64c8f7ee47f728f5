"""What an original has and whalefall has not: one line that says what serves instead."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from whalefall import compat
from whalefall.compat.absent import INSTEAD
from whalefall.errors import WhalefallError

NAMES = [(module, name) for module, names in INSTEAD.items() for name in names]


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_name_that_is_not_built_says_what_to_use(module: str, name: str) -> None:
    words = rf"^{module}\.{name} is not implemented in whalefall; use .{{9,}}$"
    found: Any = importlib.import_module(module)
    with pytest.raises(AttributeError, match=words) as caught:
        getattr(found, name)
    assert isinstance(caught.value, WhalefallError) and not hasattr(found, name)
    with pytest.raises(ImportError, match=words):
        importlib.import_module(f"{module}.{name}")


def test_from_import_says_it_too() -> None:
    with pytest.raises(ImportError, match=r"^deep_gemm\.einsum is not impl.*; use numpy\.einsum"):
        from deep_gemm import einsum  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ImportError, match=r"^deep_gemm\.legacy is not implemented"):
        import deep_gemm.legacy  # noqa: F401


def test_a_name_that_the_original_lacks_too_is_a_plain_error() -> None:
    deep_gemm = importlib.import_module("deep_gemm")
    with pytest.raises(AttributeError, match=r"^module 'deep_gemm' has no attribute 'nothing'$"):
        deep_gemm.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from deep_gemm import nothing  # noqa: F401
