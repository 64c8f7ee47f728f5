"""ep between hosts that share nothing: network namespaces joined by a veth pair."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from whalefall import comm, launch


def run(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"wf{os.getpid()}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                run("netns", "add", name)
            run("link", "add", names[0], "netns", names[0], "type", "veth",
                "peer", "name", names[1], "netns", names[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for i, name in enumerate(names):
            run("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", name)
            run("-n", name, "link", "set", name, "up")
            run("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def sent_over(namespace: str) -> int:
    command = [
        "ip",
        "netns",
        "exec",
        namespace,
        "cat",
        f"/sys/class/net/{namespace}/statistics/tx_bytes",
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def tasks(start, hosts: tuple[str, str], function: str, **kwargs: object) -> list[launch.Task]:
    token = comm.new_token().decode()
    made = start(function, 4, host="10.77.0.1", port=29777, token=token, **kwargs)
    out = []
    for rank, task in enumerate(made):
        name = hosts[rank // 2]
        out.append(
            launch.Task(
                task.name,
                task.target,
                kwargs={**task.kwargs, "name": name},
                path=task.path,
                env=task.env,
                prefix=("ip", "netns", "exec", name),
            )
        )
    return out


@pytest.mark.ranks
def test_ranks_on_two_hosts_exchange_tokens_and_count_what_they_send(start, hosts) -> None:
    before = [sent_over(name) for name in hosts]
    said = launch.run(tasks(start, hosts, "over_network"), 60)
    for i, name in enumerate(hosts):
        counted = sum(one["sent"] for one in said[2 * i : 2 * i + 2])
        wire = sent_over(name) - before[i]
        assert counted > 30_000
        # the wire also carries TCP/IP headers, acknowledgements and the meeting of the ranks
        assert counted < wire < 1.3 * counted + 100_000


def test_a_port_nobody_listens_on_is_reported() -> None:
    from whalefall.ep import TcpGroup
    from whalefall.errors import RankFailure

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RankFailure, match=rf"rank 0 does not answer at 127.0.0.1:{port}") as late:
        TcpGroup("127.0.0.1", port, 1, 2, b"x" * 32, timeout_s=0.2)
    assert late.value.rank == 0
