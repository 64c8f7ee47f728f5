"""Runs DeepEP's own test scripts on the CPU: `originals_ep.py TESTS_FOLDER [SCRIPT…]`.

In: the `tests` folder of a checkout of the original. Out: a line a script, `ROW script, part |
ranks | passed` or what was raised. The scripts run as published, as programs that start their own
ranks; sizes and ranks are cut by their own options, and their profiler stays off
(EP_USE_NVIDIA_TOOLS).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SMALL = ("--num-tokens=64", "--hidden=1024", "--num-experts=32", "--num-processes=2")
NODES = ("--num-tokens=32", "--hidden=1024")
SHRINKING = ("--num-processes=8", "--shrink-test")
LOW = ("--num-tokens=32", "--hidden=2048", "--num-experts=32")
# script, what the part is called, its options, nodes
PARTS = [
    ("legacy/test_intranode.py", "", SMALL, 1),
    ("legacy/test_low_latency.py", "", (*LOW, "--num-processes=2"), 1),
    ("legacy/test_low_latency.py", ", logfmt", (*LOW, "--num-processes=2", "--use-logfmt"), 1),
    ("legacy/test_low_latency.py", ", failing ranks", (*LOW, *SHRINKING), 1),
    ("legacy/test_internode.py", ", two hosts", (*NODES, "--num-experts=64"), 2),
    ("elastic/test_ep.py", "", ("--num-processes=2",), 1),
    ("elastic/test_agrs.py", "", ("--num-processes=2",), 1),
    ("elastic/test_barrier.py", "", ("--num-processes=2",), 1),
    ("elastic/test_engram.py", "", ("--num-processes=2",), 1),
    ("elastic/test_pp.py", "", ("--num-processes=2",), 1),
    ("utils/test_gate.py", "", (), 1),
]  # fmt: skip


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def outcome(script: Path, options: tuple[str, ...], nodes: int) -> str:
    """`passed`, or the last line that a node's processes left."""
    command = [sys.executable, "-m", "whalefall.compat", "--device", "cpu", script.name, *options]
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "EP_USE_NVIDIA_TOOLS": "1",
        "WHALEFALL_EP_TIMEOUT": "5", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(nodes),
    }  # fmt: skip
    running = [
        subprocess.Popen(
            command, cwd=script.parent, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**shared, "RANK": str(node), "WHALEFALL_HOST": f"node{node}"},
        )
        for node in range(nodes)
    ]  # fmt: skip
    for process in running:
        said, _ = process.communicate(timeout=600)
        if process.returncode:
            for other in running:
                other.kill()
            return [line for line in said.splitlines() if line.strip()][-1][:120]
    return "passed"


def main(arguments: list[str]) -> None:
    """Print the rows of the scripts of a folder."""
    folder = Path(arguments[0]).resolve()
    for script, part, options, nodes in PARTS:
        name = script.split("/")[1]
        if arguments[1:] and name not in arguments[1:]:
            continue
        each = next((o for o in options if o.startswith("--num-processes=")), "=8").split("=")[1]
        ranks = str(int(each) * nodes) if script.startswith("legacy") else "–"
        print(
            f"ROW {name}{part} | {ranks} | {outcome(folder / script, options, nodes)}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
