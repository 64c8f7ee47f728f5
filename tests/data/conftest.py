"""Sessions for tests: one for all that only read, a fresh one where a test ends or breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("duckdb")
pytest.importorskip("pyarrow")
pytest.importorskip("cloudpickle")

from whalefall.data import Session, init


@pytest.fixture(scope="session")
def sp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session that tests share; errors of one do no harm to the next."""
    session = init(data_root=str(tmp_path_factory.mktemp("jobs")), cpus=2)
    yield session
    session.shutdown()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Session]:
    """A session of the test's own."""
    session = init(data_root=str(tmp_path / "jobs"), cpus=2)
    yield session
    session.shutdown()
