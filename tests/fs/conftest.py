"""One real cluster for the tests that only need one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from whalefall.fs import LocalCluster, WhalefallFileSystem


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    # T = 3 s: the tests share two cores with other processes.
    with tempfile.TemporaryDirectory() as folder:
        with LocalCluster(folder, nodes=3, replicas=3, lease_s=3.0) as started:
            yield started


@pytest.fixture(scope="session")
def fs(cluster: LocalCluster) -> WhalefallFileSystem:
    return cluster.filesystem()
