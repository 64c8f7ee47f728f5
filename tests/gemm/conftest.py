"""Each kernel test runs at every ISA level of the machine."""

from __future__ import annotations

import pytest

from whalefall import jit


@pytest.fixture(params=jit.levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ISA level in force for one test."""
    monkeypatch.setenv("WHALEFALL_ISA", request.param)
    return str(request.param)
