"""Groups of processes for the ep tests; each is started once and asked for all its checks."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from whalefall import launch

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="session")
def start() -> Callable[..., list[launch.Task]]:
    """Tasks that run a function of ep_children.py as the ranks of a group."""
    return tasks


def tasks(
    function: str, size: int, module: str = "ep_children", **kwargs: object
) -> list[launch.Task]:
    return [
        launch.Task(
            f"rank {rank}",
            f"{module}:{function}",
            kwargs={"rank": rank, "size": size, **kwargs},
            path=(HERE,),
            env={"OMP_NUM_THREADS": "1", "WHALEFALL_EP_TIMEOUT": "60"},
        )
        for rank in range(size)
    ]


Outcome = Callable[[int, int, int, str], list[dict[str, str]]]


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """(ranks, ranks a host, chunk bytes, way) → what every check said on every rank."""

    @cache
    def run(size: int, per_host: int, chunk_bytes: int, way: str) -> list[dict[str, str]]:
        folder = str(tmp_path_factory.mktemp("group"))
        hosts = [f"host {r // per_host}" for r in range(size)] if per_host < size else None
        asked = {"chunk_bytes": chunk_bytes, "hosts": hosts, "slots": way == "slots"}
        return launch.run(tasks("all_checks", size, folder=folder, **asked), 60)

    return run
