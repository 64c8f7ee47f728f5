"""What the processes of test_group.py run."""

import os
import signal
import sys
import time
from pathlib import Path

from whalefall.launch import Group, Task


def add(a: int, b: int) -> dict[str, int]:
    return {"sum": a + b}


def fail(words: str, after_s: float = 0.0) -> None:
    time.sleep(after_s)
    raise ValueError(words)


def sleep(seconds: float, ignore_term: bool = False, ready: str = "") -> None:
    if ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ready:
        Path(ready).write_text(str(os.getpid()))
    time.sleep(seconds)


def parent_of_sleeper(ready: str) -> None:
    """Starts a child from a thread that ends at once, then waits to be killed."""
    import threading

    groups = []
    task = Task("child", "launch_children:sleep", kwargs={"seconds": 60, "ready": ready})
    thread = threading.Thread(target=lambda: groups.append(Group([task])))
    thread.start()
    thread.join()
    time.sleep(60)


def shout(lines: int) -> None:
    for i in range(lines):
        print(f"line {i}", file=sys.stderr)
    sys.exit(3)
