"""What is measured of this machine is measured once for all processes, and kept on disk."""

import json

import pytest

from whalefall.jit import machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WHALEFALL_CACHE", str(tmp_path))
    return tmp_path


def test_a_measurement_that_asks_for_another_does_not_wait_for_itself(own_cache) -> None:
    def outer() -> dict[str, float]:
        return {"twice": 2 * machine.kept("inner", lambda: {"x": 1.5})["x"]}

    assert machine.kept("outer", outer) == {"twice": 3.0}
    on_disk = json.loads((own_cache / "machine.json").read_text())
    assert on_disk == {"inner": {"x": 1.5}, "outer": {"twice": 3.0}}


def test_a_kept_figure_is_measured_again_only_when_asked() -> None:
    figures = iter([1.0, 2.0, 3.0])

    def measure() -> dict[str, float]:
        return {"x": next(figures)}

    assert [machine.kept("k", measure)["x"] for _ in range(2)] == [1.0, 1.0]
    assert machine.kept("k", measure, anew=True) == {"x": 2.0}
    assert machine.kept("k", measure) == {"x": 2.0}
