"""ep: ranks that call differently all hear of it, and go on in step (agreement_children.py)."""

import ast
from functools import cache
from pathlib import Path

import pytest

from whalefall import launch

HERE = Path(__file__).parent
CHECKS = [
    node.name.removeprefix("check_")
    for node in ast.parse((HERE / "agreement_children.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
GROUPS = [(2, 2, "direct"), (4, 2, "hosts"), (2, 2, "slots")]  # ranks, ranks a host, how rows go


@pytest.fixture(scope="module")
def agreement(tmp_path_factory, start):
    """(ranks, ranks a host, way) → what every check said on every rank."""

    @cache
    def run(size: int, per_host: int, way: str) -> list[dict[str, str]]:
        folder = str(tmp_path_factory.mktemp("group"))
        hosts = [f"host {r // per_host}" for r in range(size)] if per_host < size else None
        asked = {"hosts": hosts, "slots": way == "slots"}
        return launch.run(
            start("all_checks", size, module="agreement_children", folder=folder, **asked), 120
        )

    return run


@pytest.mark.ranks
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: "{}x{}-{}".format(*g))
def test_check_holds_on_every_rank(agreement, group: tuple[int, int, str], check: str) -> None:
    said = [rank.get(check, "not reached") for rank in agreement(*group)]
    assert not any(said), "\n".join(f"rank {r}: {text}" for r, text in enumerate(said) if text)
