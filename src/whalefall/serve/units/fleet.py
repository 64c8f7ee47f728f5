"""The units' processes: started, watched, started again, ended. Knows nothing of requests."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whalefall import comm, launch
from whalefall.errors import RankFailure
from whalefall.serve.core import Kind
from whalefall.serve.units.layout import UnitsConfig
from whalefall.serve.units.words import pass_on

__all__ = ["Fleet", "Unit"]

PREFIX = "whalefall-units-"
DYING_S = 0.5  # between a rank's last word on its connection and its end
FAILED_STARTS = 3  # in a row, of one kind, before we give up


@dataclass
class Unit:
    """One unit's processes.

    Attributes:
        name: "decode-3", never used twice.
        group: its ranks.
        pids: of its ranks, in order.
        channels: rank → its connection, once it has said hello.
        number: of the last command.
        draining: gets nothing new, and ends when empty.
    """

    name: str
    kind: Kind
    ranks: int
    group: launch.Group
    began_s: float
    channels: dict[int, comm.Channel] = field(default_factory=dict)
    number: int = 0
    draining: bool = False
    up: bool = False

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [m.process.pid for m in self.group.members.values()]

    def hang_up(self) -> None:
        """Close the connections: its ranks end after the step they are in."""
        for channel in self.channels.values():
            channel.close()

    def is_dead(self) -> bool:
        """Whether any of its processes has ended."""
        return bool(self.group.exits())


class Fleet:
    """Starts and ends units.

    Args:
        model: checkpoint folder.
        config: sizes and settings.
        port: where the gateway listens.
    Attributes:
        units: by name, those that run.
        token: the secret that ranks and gateway share.
        failures: what was said about units that died, the last few.
    """

    def __init__(self, model: str, config: UnitsConfig) -> None:
        self.model, self.config = model, config
        sweep_folders()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.token = comm.read_token(self.folder / "token", create=True)
        self.units: dict[str, Unit] = {}
        self.failures: list[str] = []
        self.restarts = 0
        self._count = 0
        self._failed_starts: dict[str, int] = {"prefill": 0, "decode": 0}
        comm.sweep("kv-")

    def start(self, kind: Kind, port: int) -> Unit:
        """Start one more unit."""
        layout = self.config.prefill if kind == "prefill" else self.config.decode
        name = f"{kind}-{self._count}"
        self._count += 1
        folder = self.folder / name
        folder.mkdir()
        tasks = [
            launch.Task(
                f"{name} rank {rank}",
                "whalefall.serve.units.rank:main",
                kwargs={
                    "unit": name,
                    "rank": rank,
                    "size": layout.ranks,
                    "kind": kind,
                    "model": self.model,
                    "folder": str(folder),
                    "port": port,
                    "engine": self._engine(kind),
                    "transfer": self.config.transfer,
                    "overlap": self.config.overlap,
                    "redundant": self.config.redundant,
                    "threads": self._threads(),
                    "trace_folder": self.config.trace,
                },
                heard=pass_on,
            )
            for rank in range(layout.ranks)
        ]
        group = launch.Group(tasks, grace_s=5.0)
        unit = Unit(name, kind, layout.ranks, group, time.monotonic())
        self.units[name] = unit
        return unit

    def _engine(self, kind: Kind) -> dict[str, Any]:
        """A rank's settings; only prefill units look for prefixes."""
        if kind == "prefill":
            return self.config.engine
        return {**self.config.engine, "prefix_cache": ""}

    def _threads(self) -> int:
        if self.config.threads:
            return self.config.threads
        both = (self.config.prefill, self.config.decode)
        ranks = sum(layout.units * layout.ranks for layout in both)
        return max(1, len(os.sched_getaffinity(0)) // ranks)

    def dead(self) -> list[Unit]:
        """Units of which a process has ended."""
        return [unit for unit in self.units.values() if unit.is_dead()]

    def remove(self, unit: Unit, failed: bool, seen: str = "") -> None:
        """Hang up on a unit, end what is left of it, and note why it failed.

        Args:
            unit: to remove.
            failed: it was not asked to end.
            seen: what was seen of the failure, in case its processes say nothing.
        Raises: RankFailure where units of its kind fail again and again before they are up, or one
            was told what it cannot do.
        """
        self.units.pop(unit.name, None)
        exits = ended(unit.group) if failed else []
        report = "\n".join(map(str, exits)) or seen
        unit.hang_up()
        for name in unit.group.members:
            if failed:
                unit.group.kill(name)
        unit.group.drain()
        shutil.rmtree(self.folder / unit.name, ignore_errors=True)
        comm.sweep("kv-")
        if not failed:
            return
        self.restarts += 1
        self.failures = [*self.failures[-4:], report]
        if unit.up:
            self._failed_starts[unit.kind] = 0
            return
        refused = next(filter(None, map(_refusal, exits)), None)
        if refused is not None:  # the next one would say the same
            raise RankFailure(f"serve: {unit.kind} units do not start: {refused}")
        self._failed_starts[unit.kind] += 1
        if self._failed_starts[unit.kind] >= FAILED_STARTS:
            raise RankFailure(f"serve: {unit.kind} units do not start: {report}")

    def close(self) -> None:
        """End all units."""
        for unit in self.units.values():
            unit.hang_up()
        for unit in list(self.units.values()):
            self.remove(unit, failed=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def ended(group: launch.Group, wait_s: float = DYING_S) -> list[launch.Exit]:
    """How processes of a failed unit ended: those that failed, else those that ended at all.

    A broken connection is often seen before the death that broke it: that is waited for a little.
    """
    until = time.monotonic() + wait_s
    while not (exits := group.exits()) and time.monotonic() < until:
        time.sleep(0.01)
    return [each for each in exits if each.code] or exits


_REFUSAL = re.compile(r"whalefall\.[\w.]*?((?:Config|Unsupported|Dtype|Shape)Error: .*)")


def _refusal(ended: launch.Exit) -> str | None:
    """The one line that a rank ended with, if it was an error of what it was told."""
    found = _REFUSAL.search(ended.last_lines[-1]) if ended.last_lines else None
    return found.group(1) if found else None


def sweep_folders() -> None:
    """Remove the folders that gateways left which were killed; the name holds the process id."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
