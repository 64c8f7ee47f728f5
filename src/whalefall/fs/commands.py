"""Start, look into, and use a distributed file system (3FS).

Every command but `up` and `simulate` takes a URL, `whalefall://host:port` or with `/path`; where
a script would read the answer there is `--json`.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from whalefall.errors import ConfigError, MissingError
from whalefall.fs.profiles import PROFILES
from whalefall.options import within

if TYPE_CHECKING:
    from whalefall.fs.fsspec import WhalefallFileSystem

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

MEND_S = 10.0  # `scrub` waits no longer for what is damaged: it may be so on every replica
JSON = typer.Option(False, "--json", help="machine-readable")
URL = typer.Argument(..., help="whalefall://host:port, or whalefall://host:port/path")


def _client(url: str) -> tuple[WhalefallFileSystem, str]:
    from whalefall.fs.client.filesystem import parse_url
    from whalefall.fs.fsspec import WhalefallFileSystem

    managers, path = parse_url(url)
    host, port = managers[0]
    fs = WhalefallFileSystem(host=host, port=port, managers=tuple(managers), retry_s=20.0)
    return fs, path or "/"


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


@app.command()
def up(
    folder: Path = typer.Argument(..., help="where everything lies; kept between runs"),
    nodes: int = typer.Option(3, help="storage nodes"),
    replicas: int = typer.Option(3, help="copies of every chunk"),
    meta: int = typer.Option(1, help="metadata servers"),
    chains: int = typer.Option(0, help="chains of replicas (default: one a node)"),
    lease: float = typer.Option(10.0, help="seconds after which a silent node is dead"),
    port: int = typer.Option(0, help="the manager's port (default: as before, or any)"),
    scrub: float = typer.Option(86400.0, help="seconds of one scrub over all data; 0: none"),
) -> None:
    """Run a whole cluster on this host until Ctrl-C; a process that dies is started again."""
    from whalefall.fs.cluster import LocalCluster

    cluster = LocalCluster(
        folder, nodes, replicas, chains or None, meta, lease, port, scrub_s=scrub
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    began = time.monotonic()
    with cluster:
        print(
            f"{cluster.url}  {nodes} nodes, {replicas} replicas, {cluster.chains} chains, "
            f"up in {time.monotonic() - began:.1f} s; Ctrl-C ends it",
            flush=True,
        )
        try:
            while True:
                time.sleep(0.5)
                for name in cluster.ended():
                    print(f"{name} ended; starting it again", flush=True)
                    cluster.restart(name)
        except KeyboardInterrupt:
            print("ending", flush=True)


@app.command()
def status(url: str = URL, as_json: bool = JSON) -> None:
    """Health at a glance: nodes, chains, space."""
    fs, _ = _client(url)
    state = fs.client.connection.manager("status")
    if as_json:
        print(json.dumps(state))
        return
    targets = [t for c in state["chains"] for t in c["targets"]]
    serving = sum(t["public"] == "SERVING" for t in targets)
    alive = sum(n["alive"] for n in state["nodes"])
    used = sum(t["used_bytes"] for t in targets)
    word = "healthy" if serving == len(targets) and alive == len(state["nodes"]) else "DEGRADED"
    print(
        f"{word}: {alive}/{len(state['nodes'])} nodes alive, {serving}/{len(targets)} targets "
        f"serve, {len(state['chains'])} chains, {_bytes(used)} used, routing {state['version']}, "
        f"T = {state['lease_s']} s"
    )
    for chain in state["chains"]:
        if chain["state"] != "SERVING":
            print(f"  chain {chain['chain']}: {chain['state']}  {_members(chain)}")


def _members(chain: dict[str, Any]) -> str:
    return " ".join(f"{t['target']}({t['public']}-{t['local']})" for t in chain["targets"])


@app.command("nodes")
def list_nodes(url: str = URL, as_json: bool = JSON) -> None:
    """The nodes: kind, address, when last heard."""
    fs, _ = _client(url)
    rows = fs.client.connection.manager("status")["nodes"]
    if as_json:
        print(json.dumps(rows))
        return
    _table("nodes", ["node", "kind", "alive", "address", "heard s ago", "starts"], [
        [r["node"], r["kind"], "yes" if r["alive"] else "NO", r["address"], r["heard_s"],
         r["boot"] if r["kind"] == "storage" else "-"]
        for r in rows
    ])  # fmt: skip


@app.command("chains")
def list_chains(url: str = URL, as_json: bool = JSON) -> None:
    """The chains: version, state, targets in order, head first."""
    fs, _ = _client(url)
    rows = fs.client.connection.manager("status")["chains"]
    if as_json:
        print(json.dumps(rows))
        return
    _table("chains", ["chain", "version", "state", "targets (public-local)"],
           [[r["chain"], r["version"], r["state"], _members(r)] for r in rows])  # fmt: skip


@app.command("targets")
def list_targets(url: str = URL, as_json: bool = JSON) -> None:
    """The targets: role, states, node, space, damage found."""
    fs, _ = _client(url)
    rows = []
    for chain in fs.client.connection.manager("status")["chains"]:
        for place, target in enumerate(chain["targets"]):
            rows.append({"role": "head" if place == 0 else "follower", "chain": chain["chain"]}
                        | target)  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    _table("targets", ["target", "chain", "role", "public", "local", "node", "used", "chunks",
                       "bad blocks"], [
        [r["target"], r["chain"], r["role"], r["public"], r["local"], r["node"],
         _bytes(r["used_bytes"]), r["chunks"], r["bad_blocks"]]
        for r in sorted(rows, key=lambda r: r["target"])
    ])  # fmt: skip


@app.command()
def df(url: str = URL, as_json: bool = JSON) -> None:
    """Space: used and free, after replication, as the nodes' last heartbeats said."""
    fs, _ = _client(url)
    chains = fs.client.connection.manager("status")["chains"]
    used = sum(max((t["used_bytes"] for t in c["targets"]), default=0) for c in chains)
    free = [min((t["free_bytes"] for t in c["targets"]), default=0) for c in chains]
    raw = sum(t["used_bytes"] for c in chains for t in c["targets"])
    answer = {"used_bytes": used, "raw_bytes": raw, "free_bytes": min(free, default=0)}
    if as_json:
        print(json.dumps(answer))
        return
    print(f"used {_bytes(used)} ({_bytes(raw)} on disks), free at least {_bytes(min(free))}")


@app.command()
def ls(
    url: str = URL, long: bool = typer.Option(False, "-l", help="attributes"), as_json: bool = JSON
) -> None:
    """What is in a directory."""
    fs, path = _client(url)
    rows = fs.ls(path)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        name = row["name"].rsplit("/", 1)[1] + ("/" if row["type"] == "directory" else "")
        if long:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["mtime"]))
            mode = stat.filemode(row["mode"])
            print(f"{mode} {row['nlink']:3} {row['uid']:5} {row['size']:12} {when} {name}")
        else:
            print(name)


@app.command()
def cat(url: str = URL) -> None:
    """A file's bytes to stdout."""
    fs, path = _client(url)
    with fs.open(path, "rb") as file:
        while data := file.read(8 << 20):
            sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@app.command()
def cp(
    source: str = typer.Argument(..., help="a URL, or a local path"),
    target: str = typer.Argument(..., help="a URL, or a local path"),
    recursive: bool = typer.Option(False, "-r", help="folders and what is in them"),
) -> None:
    """Copy to, from or inside a cluster."""
    remote = [s.startswith("whalefall://") for s in (source, target)]
    if not any(remote):
        raise ConfigError("fs cp: both are local; one must be whalefall://host:port/path")
    if not remote[0] and not Path(source).exists():
        raise MissingError(f"fs cp: there is no {source}")
    fs, path = _client(source if remote[0] else target)
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True), transient=True)
    with progress:
        shown = _shown(progress)
        if all(remote):
            fs.cp(source, target, recursive=recursive)
        elif remote[0]:
            fs.get(path, target, recursive=recursive, callback=shown)
        else:
            fs.put(source, path, recursive=recursive, callback=shown)


def _shown(progress: Any) -> Any:
    """fsspec's progress callback, on a rich bar."""
    from fsspec.callbacks import Callback

    bar = progress.add_task("files", total=None)

    class Bar(Callback):  # fsspec calls it with the number of files done
        def call(self, *args: Any, **kwargs: Any) -> None:
            progress.update(bar, completed=self.value, total=self.size)

    return Bar()


@app.command()
def rm(url: str = URL, recursive: bool = typer.Option(False, "-r", help="folders too")) -> None:
    """Remove a file; with -r a folder and what is in it."""
    fs, path = _client(url)
    fs.rm(path, recursive=recursive)


@app.command("stat")
def stat_(url: str = URL, as_json: bool = JSON) -> None:
    """A file's attributes and where its chunks lie."""
    fs, path = _client(url)
    inode = fs.client.stat(path)
    row = fs.info(path)
    if inode.layout is not None:
        row |= {"chunk_bytes": inode.layout.chunk_bytes, "chains": list(inode.layout.chains)}
    if as_json:
        print(json.dumps(row))
        return
    for key, value in row.items():
        print(f"{key:12} {oct(value) if key == 'mode' else value}")


@app.command()
def checksum(url: str = URL, as_json: bool = JSON) -> None:
    """A file's CRC-32C."""
    fs, path = _client(url)
    value = f"{fs.checksum(path):08x}"
    print(json.dumps({"path": path, "crc32c": value}) if as_json else f"{value}  {path}")


@app.command()
def drain(
    url: str = URL,
    node: int = typer.Option(..., help="the storage node"),
    back: bool = typer.Option(False, help="let it serve again"),
) -> None:
    """Take a node out of service cleanly (its chains must have others), or let it back."""
    fs, _ = _client(url)
    asked = fs.client.connection.manager("drain", node=node, drained=not back)
    what = "may serve again" if back else "leave"
    print(f"targets of node {node} that {what}: {', '.join(map(str, asked)) or 'none'}")


@app.command()
def gc(url: str = URL) -> None:
    """Collect files without a name now (it also happens by itself)."""
    fs, _ = _client(url)
    from whalefall.fs.rpc import Call

    print(f"collected {fs.client._ask(Call('gc', {}))} files")


@app.command()
def scrub(url: str = URL, wait: bool = typer.Option(True, help="until all is checked")) -> None:
    """Check every chunk of every replica against its checksum; mend what is damaged."""
    fs, _ = _client(url)
    connection = fs.client.connection
    numbers = [n for n, i in connection.core.routing.nodes.items() if i.kind == "storage"]
    before = {n: connection.node(n, "counters") for n in numbers}
    wanted = {n: connection.node(n, "scrub")["checked"] for n in numbers}
    mended, end_s = True, float("inf")
    while wait and time.monotonic() < end_s:
        after = {n: connection.node(n, "counters") for n in numbers}
        if all(after[n]["checked"] - before[n]["checked"] >= wanted[n] for n in numbers):
            mended = all(a["damaged"] == a["repaired"] for a in after.values())
            end_s = 0.0 if mended else min(end_s, time.monotonic() + MEND_S)
        time.sleep(0.1)
    print(f"checking {sum(wanted.values())} chunks on {len(numbers)} nodes")
    for number in numbers:
        counters = connection.node(number, "counters")
        print(f"  node {number}: damaged {counters['damaged']}, repaired {counters['repaired']}")
    raise typer.Exit(0 if mended else 1)


@app.command()
def bench(
    url: str = URL,
    size_mib: int = typer.Option(
        256, callback=within(1, 1 << 20), help="bytes to write and read, in MiB"
    ),
    as_json: bool = JSON,
) -> None:
    """Write, read and look up on a running cluster; what it reads was just written (cached)."""
    fs, path = _client(url)
    name = f"{path.rstrip('/')}/.bench-{os.getpid()}"
    data = os.urandom(min(size_mib, 32) << 20)
    rows: dict[str, float] = {}
    began = time.perf_counter()
    with fs.open(name, "wb", block_size=32 << 20) as file:
        for start in range(0, size_mib, 32):
            file.write(memoryview(data)[: (size_mib - start) << 20])
    rows["write MiB/s"] = size_mib / (time.perf_counter() - began)
    inode = fs.client.stat(name)
    began = time.perf_counter()
    for offset in range(0, inode.length, 32 << 20):
        fs.client.read(inode, offset, 32 << 20)
    rows["read MiB/s"] = inode.length / (1 << 20) / (time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(300):
        fs.client.stat(name)
    rows["stat/s"] = 300 / (time.perf_counter() - began)
    fs.rm(name)
    if as_json:
        print(json.dumps(rows))
        return
    for what, value in rows.items():
        print(f"{what:12} {value:10.0f}")


@app.command()
def simulate(
    seed: int = typer.Option(..., help="which schedule"),
    profile: str = typer.Option("mixed", help=", ".join(PROFILES)),
    count: int = typer.Option(
        1, callback=within(1, 1e9), help="run so many schedules from this seed on"
    ),
    as_json: bool = JSON,
) -> None:
    """Run the protocol on a seeded schedule of faults; one schedule prints its transcript."""
    from whalefall.fs.simulation import run_schedule

    if profile not in PROFILES:
        raise ConfigError(f"fs simulate: no profile {profile!r}; there are {', '.join(PROFILES)}")
    outcomes = [run_schedule(seed + i, count == 1, profile) for i in range(count)]
    bad = [o for o in outcomes if o.violation]
    if as_json:
        print(json.dumps([
            {"seed": o.seed, "violation": o.violation, "faults": o.faults,
             "operations": o.operations, "steps": o.steps}
            for o in outcomes
        ]))  # fmt: skip
    else:
        for line in outcomes[0].transcript if count == 1 else []:
            print(line)
        for o in bad:
            print(f"seed {o.seed}: {o.violation}")
        faults = sum(sum(o.faults.values()) for o in outcomes)
        print(
            f"{count} schedules from seed {seed}: {faults} faults, "
            f"{sum(o.operations for o in outcomes)} operations, {len(bad)} violations"
        )
    if bad:
        raise typer.Exit(1)
