"""The kernel that known calls are tried on, compiled once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dtypes.adding import compiled
from whalefall.dtypes.native_calls import native


@pytest.fixture(scope="package")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its entry."""
    if native() is None:
        pytest.skip("no compiler")
    return compiled(tmp_path_factory.mktemp("add"))
