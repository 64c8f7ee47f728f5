"""Kernels on one thread: small models gain nothing from two, and a busy machine loses much."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from whalefall import jit


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = jit.get_num_threads()
    jit.set_num_threads(1)
    yield
    jit.set_num_threads(before)
