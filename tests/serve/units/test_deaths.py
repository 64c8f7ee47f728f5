"""What is said of a unit that died: how each process ended, its last words, or what was seen."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time

import pytest

from tests.serve.units.conftest import units
from whalefall import launch
from whalefall.serve.units.fleet import ended

pytestmark = pytest.mark.ranks


def deaths(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """The reasons that were logged, once there are so many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [r.getMessage() for r in caplog.records if " died: " in r.getMessage()]
        if len(found) >= count:
            return [text.split(" died: ", 1)[1] for text in found]
        time.sleep(0.02)
    raise AssertionError(caplog.text)


def test_each_death_has_its_reason(model, caplog) -> None:
    caplog.set_level(logging.WARNING, "whalefall.serve")
    with units(model, "1x1", "1x2") as gateway:
        alive = list(gateway.fleet.units.values())
        for number, unit in enumerate(alive, 1):
            os.kill(unit.pids[0], signal.SIGKILL)
            reason = deaths(caplog, number)[-1]
            assert f"{unit.name} rank 0 (pid {unit.pids[0]}) ended with SIGKILL" in reason
        while not all(unit.up for unit in list(gateway.fleet.units.values())):
            time.sleep(0.02)
        unit = next(iter(gateway.fleet.units.values()))
        unit.channels[0].socket.shutdown(socket.SHUT_RDWR)  # it ends by itself, with 0
        reason = deaths(caplog, 3)[-1]
        assert "ended with exit status 0" in reason or "connection broke" in reason


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('the last words')", ("exit status 1", "the last words")),
        ("pass", ("exit status 0",)),
        ("import time; time.sleep(0.2); import os; os.abort()", ("SIGABRT",)),
    ],
)
def test_a_death_is_waited_for_and_described(code: str, words: tuple[str, ...], tmp_path) -> None:
    (tmp_path / "dying.py").write_text(code)
    with launch.Group([launch.Task("rank 0", "dying", path=(str(tmp_path),))]) as group:
        text = "\n".join(map(str, ended(group, 60.0)))
    assert all(word in text for word in words)


def test_a_process_that_lives_on_is_not_waited_for_long(tmp_path) -> None:
    (tmp_path / "living.py").write_text("import time; time.sleep(600)")
    with launch.Group([launch.Task("rank 0", "living", path=(str(tmp_path),))], 0.1) as group:
        assert ended(group) == []
