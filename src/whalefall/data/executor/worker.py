"""A worker process: takes attempts from a socket, runs them, answers. Ends when the socket does."""

from __future__ import annotations

import pickle
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any


def main(path: str) -> None:
    """Serve the driver that listens on the Unix socket `path`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    channel = Connection(sock.detach())
    # what every task needs, while the driver is still planning
    import cloudpickle
    import duckdb

    duckdb.connect().execute("select 1").fetchall()

    from whalefall.data.executor.base import perform, portable_error

    while True:
        try:
            data = channel.recv_bytes()
        except (EOFError, OSError):
            return
        begin = time.perf_counter()
        answer: tuple[Any, ...]
        try:
            outputs = perform(pickle.loads(data))
            answer = ("done", outputs, time.perf_counter() - begin)
        except BaseException as error:  # SystemExit too: code that exits will exit again
            answer = ("raised", *portable_error(error))
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            channel.send_bytes(cloudpickle.dumps(answer))
        except OSError:
            return


if __name__ == "__main__":
    main(sys.argv[1])
