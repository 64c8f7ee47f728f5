"""File-system room: a whole cluster on one host, as real processes.

`LocalCluster` starts a manager, metadata servers and storage nodes, lays out chains, and hands out
a URL. Its folder survives: started again on it, the cluster has what it had.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from whalefall.arguments import finite, whole
from whalefall.comm import read_token
from whalefall.errors import ConfigError
from whalefall.fs.client.connection import Connection
from whalefall.fs.errors import ClusterError
from whalefall.fs.lock import FolderLock
from whalefall.fs.tokens import publish_token
from whalefall.launch import Group, Task

if TYPE_CHECKING:
    from whalefall.fs.client.filesystem import FileSystemClient
    from whalefall.fs.fsspec import WhalefallFileSystem

__all__ = ["LocalCluster", "place_chains"]

DEFAULT_TABLE = 1
MAX_NODES = 999  # metadata servers are numbered from 1001, a node's targets from 1000 times it
LEFT_S = 5.0  # what a killed parent leaves behind ends within this, or keeps us out


def place_chains(nodes: int, replicas: int, chains: int) -> dict[int, list[list[int]]]:
    """Chain → its [target, node]s: every node heads, and follows, equally often.

    Args:
        nodes: storage nodes, numbered from 1.
        replicas: of each chain, at most one a node.
        chains: how many.
    """
    whole("fs: nodes", nodes, 1, MAX_NODES)
    whole(f"fs: replicas on {nodes} nodes", replicas, 1, nodes)
    whole("fs: chains", chains, 1, MAX_NODES * nodes // replicas)
    placement = {}
    used = dict.fromkeys(range(1, nodes + 1), 0)
    for chain in range(1, chains + 1):
        members: list[list[int]] = []
        for place in range(replicas):
            # A growing stride spreads a failed node's load over different neighbours.
            stride = 1 + (chain - 1) // nodes % max(nodes - 1, 1)
            node = (chain - 1 + place * stride) % nodes + 1
            while any(node == other for _, other in members):
                node = node % nodes + 1
            used[node] += 1
            members.append([node * 1000 + used[node], node])
        placement[chain] = members
    return placement


class LocalCluster:
    """A cluster of real processes under one folder.

    Args:
        path: the folder; made where missing.
        nodes: storage nodes.
        replicas: of every chunk.
        chains: of the chain table; default (0 or None): one a node.
        meta: metadata servers.
        lease_s: T: a node not heard for this long is dead.
        port: of the manager; 0: the one used before in this folder, or any free one.
        scrub_s: seconds of a scrub's pass; 0: none.
        disks: storage node → its folder, where it shall not lie under `path`.

    Raises: ConfigError, for a number out of its range; from `start`, if the folder is in use.
    """

    def __init__(
        self, path: str | os.PathLike[str], nodes: int = 3, replicas: int = 3,
        chains: int | None = None, meta: int = 1, lease_s: float = 2.0, port: int = 0,
        scrub_s: float = 0.0, reserve_bytes: int = 16 << 20, host: str = "127.0.0.1",
        disks: dict[int, str] | None = None,
    ) -> None:  # fmt: skip
        whole("fs: metadata servers (meta)", meta, 1, 99)
        finite("fs: lease", lease_s, 0.1, 3600)
        whole("fs: port", port, 0, 65535)
        finite("fs: scrub", scrub_s, 0, 1e9)
        self.path = Path(path).absolute()
        self.nodes, self.replicas, self.num_meta = nodes, replicas, meta
        self.chains = chains or nodes
        place_chains(nodes, replicas, self.chains)
        self.lease_s, self.scrub_s, self.reserve_bytes = lease_s, scrub_s, reserve_bytes
        self.host, self.disks = host, disks or {}
        self.port, self.token = port, b""  # `start` finds what is missing in the folder
        self.group: Group | None = None
        self._lock: FolderLock | None = None
        self._connection: Connection | None = None
        self._clients: list[FileSystemClient] = []

    def _take(self) -> None:
        """Make the folder ours, then read what it says.

        Raises: ConfigError: another cluster runs there, or a process of one that was killed.
        """
        self._lock = FolderLock(self.path)
        left = [*self.path.glob("storage-*/lock"), *self.path.glob("*.lock")]
        left += [Path(disk) / "lock" for disk in self.disks.values()]
        for file in left:
            FolderLock(file.parent, file.name, LEFT_S).release()
        self.token = read_token(self.path / "token", create=True)
        if self.port and not self._free(self.port):
            raise ConfigError(f"fs: port {self.port} of {self.host} cannot be had; 0 means any")
        self.port = self.port or self._remembered_port()

    def _free(self, port: int) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, port))
            except OSError:
                return False
            return True

    def _remembered_port(self) -> int:
        path = self.path / "port"
        if path.exists():
            port = int(path.read_text())
            if self._free(port):
                return port
            # Somebody took it since; clients find the new one by the new URL.
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            port = probe.getsockname()[1]
        path.write_text(str(port))
        return int(port)

    @property
    def url(self) -> str:
        """`whalefall://host:port`."""
        return f"whalefall://{self.host}:{self.port}"

    @property
    def names(self) -> list[str]:
        """The processes: manager, meta-1…, storage-1…"""
        metas = [f"meta-{i}" for i in range(1, self.num_meta + 1)]
        return ["manager", *metas, *(f"storage-{i}" for i in range(1, self.nodes + 1))]

    # ---- processes

    def _task(self, name: str) -> Task:
        role, _, number = name.partition("-")
        folder = self.path
        if role == "storage":
            folder = Path(self.disks.get(int(number), self.path / name))
        ready = self.path / f"{name}.ready"
        ready.unlink(missing_ok=True)
        settings = {
            "role": role, "number": int(number or 0) + (1000 if role == "meta" else 0),
            "folder": str(folder), "managers": [f"{self.host}:{self.port}"],
            "token_file": str(self.path / "token"), "host": self.host,
            "port": self.port if role == "manager" else 0, "lease_s": self.lease_s,
            "scrub_s": self.scrub_s, "reserve_bytes": self.reserve_bytes, "ready": str(ready),
        }  # fmt: skip
        file = self.path / f"{name}.json"
        file.write_text(json.dumps(settings, indent=1))
        return Task(
            name, "whalefall.fs.process", (str(file),), log=self.path / f"{name}.log",
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self) -> None:
        """Start all processes and lay out the chains; returns when every replica serves."""
        if self.group is not None:
            raise ConfigError(f"fs: the cluster in {self.path} runs already; stop it first")
        try:
            self._take()
            publish_token(self.host, self.port, self.token)
            self.group = Group([self._task(name) for name in self.names], grace_s=5.0)
            self._await_ready(30.0)
            self._layout()
            self.wait_healthy(60.0)
        except BaseException:
            self.stop()
            raise

    def _await_ready(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while missing := [n for n in self.names if not (self.path / f"{n}.ready").exists()]:
            assert self.group is not None
            self.group.check()
            if time.monotonic() > end_s:
                raise ClusterError(f"fs: after {timeout_s} s these do not serve yet: {missing}")
            time.sleep(0.02)

    def _layout(self) -> None:
        end_s = time.monotonic() + 30
        while True:
            try:
                status = self._ask("status")
                alive = sum(n["alive"] for n in status["nodes"])
                if alive >= self.nodes + self.num_meta:
                    if not status["chains"]:
                        placement = place_chains(self.nodes, self.replicas, self.chains)
                        self._ask("create_chains", placement=placement, table=DEFAULT_TABLE)
                    return
            except ClusterError:
                if time.monotonic() > end_s:
                    raise
            if time.monotonic() > end_s:
                raise ClusterError("fs: the nodes did not report within 30 s")
            time.sleep(0.02)

    def _ask(self, name: str, **args: Any) -> Any:
        from whalefall.fs.core.effects import Unreachable
        from whalefall.fs.rpc import Call, Pool, Result

        pool = Pool(self.token)
        try:
            reply, _ = pool.call((self.host, self.port), Call(name, args), b"", 5.0)
        except Unreachable as error:
            raise ClusterError(f"fs: {error}") from None
        finally:
            pool.close()
        if not isinstance(reply, Result):
            raise ClusterError(f"fs: {name}: {reply.code.name}: {reply.reason}")
        return reply.value

    def status(self) -> dict[str, Any]:
        """Nodes, chains and targets, as the manager sees them."""
        return self._ask("status")  # type: ignore[no-any-return]

    def healthy(self) -> bool:
        """Whether every target of every chain serves and every process has reported."""
        try:
            status = self.status()
        except ClusterError:
            return False
        states = [t["public"] for c in status["chains"] for t in c["targets"]]
        return bool(states) and set(states) == {"SERVING"}

    def wait_healthy(self, timeout_s: float = 60.0) -> None:
        """Return once all replicas serve.

        Raises: ClusterError with the states after `timeout_s`.
        """
        end_s = time.monotonic() + timeout_s
        while not self.healthy():
            if time.monotonic() > end_s:
                states = [
                    f"{t['target']}:{t['public']}({t['local']})"
                    for c in self.status()["chains"] for t in c["targets"]
                ]  # fmt: skip
                raise ClusterError(f"fs: not healthy after {timeout_s} s: {' '.join(states)}")
            time.sleep(0.05)

    def _name(self, node: int | str) -> str:
        name = f"storage-{node}" if isinstance(node, int) else node
        if name not in self.names:
            raise ConfigError(f"fs: no process {name!r}; there are {', '.join(self.names)}")
        return name

    def signal(self, node: int | str, number: int) -> None:
        """Send a signal to a process, by storage node number or name."""
        assert self.group is not None
        self.group.kill(self._name(node), number)

    def kill(self, node: int | str) -> None:
        """kill -9 one process."""
        self.signal(node, signal.SIGKILL)
        assert self.group is not None
        self.group.members[self._name(node)].process.wait()

    def restart(self, node: int | str) -> None:
        """Start a process that has ended (its name, or a storage node's number)."""
        assert self.group is not None
        name = self._name(node)
        self.group.add(self._task(name))
        end_s = time.monotonic() + 30
        while not (self.path / f"{name}.ready").exists():
            if time.monotonic() > end_s:
                raise ClusterError(f"fs: {name} does not serve 30 s after its restart")
            time.sleep(0.02)

    def ended(self) -> list[str]:
        """The processes that have ended."""
        assert self.group is not None
        return [e.name for e in self.group.exits()]

    def connection(self) -> Connection:
        """A client of this cluster."""
        if self._connection is None:
            self._connection = Connection([(self.host, self.port)], self.token)
        return self._connection

    def filesystem(self, **options: Any) -> WhalefallFileSystem:
        """The cluster as an fsspec file system."""
        from whalefall.fs.fsspec import WhalefallFileSystem

        made = WhalefallFileSystem(
            host=self.host, port=self.port, token=self.token.decode(), skip_instance_cache=True,
            **options,
        )  # fmt: skip
        self._clients.append(made.client)
        return made

    def stop(self) -> None:
        """End all processes; what was acknowledged is on disk."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self.group is not None:
            self.group.drain()
            self.group = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()
