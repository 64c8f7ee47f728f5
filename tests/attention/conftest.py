"""Every test of a kernel runs at each ISA level that the machine has."""

from __future__ import annotations

import pytest

from whalefall import jit


@pytest.fixture(params=jit.levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ISA level in force."""
    monkeypatch.setenv("WHALEFALL_ISA", request.param)
    return str(request.param)
