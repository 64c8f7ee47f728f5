"""Traces: what recording costs, and how fast a large file is summarized.

`whalefall bench trace` (add `--quick` for a tenth of the file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from whalefall import trace
from whalefall.testing.benchmark import Row, save

WORK_S = 200e-6  # a short kernel or a small message
SPANS = 500
ROUNDS = 15

READ = """
import resource, sys, time
import numpy
from whalefall.trace import summarize
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
summarize(sys.argv[1])
took = time.perf_counter() - begin
print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def overhead() -> Row:
    """Work in slices of 200 us of CPU, each in a span, recorded and not."""
    count = calibrate()

    def slices() -> None:
        for number in range(SPANS):
            with trace.span("slice", category="compute", number=number):
                burn(count)

    samples: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(ROUNDS):
        for which, times in samples.items():
            if which == "on":
                trace.start()
            begin = time.perf_counter()
            slices()
            times.append(time.perf_counter() - begin)
            if which == "on":
                trace.stop()
    on, off = min(samples["on"]), min(samples["off"])  # the machine may be busy: the best of each
    percent = (on / off - 1) * 100
    return Row(
        f"recording {SPANS} spans of {WORK_S * 1e6:.0f} us of work, best of {ROUNDS}",
        "not recording", "< 2 %", on * 1e3, off * 1e3, "ms", off / on, percent < 2,
        f"{percent:.2f} % slower",
    )  # fmt: skip


def burn(count: int) -> int:
    """Work that takes a while."""
    total = 0
    for n in range(count):
        total += n
    return total


def calibrate() -> int:
    """Rounds of `burn` that last `WORK_S`."""
    begin = time.perf_counter()
    burn(100_000)
    return int(100_000 * WORK_S / (time.perf_counter() - begin))


def write_large(path: Path, megabytes: int) -> float:
    """Write kernels as the PyTorch profiler does; returns the size in megabytes."""
    kernel = {
        "ph": "X", "cat": "kernel", "name": "void gemm_kernel<256, 128>(float*, int)", "pid": 0,
        "tid": 7, "ts": 0, "dur": 9, "args": {"device": 0, "stream": 7, "grid": [132, 1, 1],
        "block": [128, 1, 1], "registers per thread": 168, "correlation": 44479},
    }  # fmt: skip
    line = json.dumps(kernel)
    with path.open("w") as file:
        file.write('{"schemaVersion": 1,\n"traceEvents": [\n')
        for n in range(megabytes * 1_000_000 // (len(line) + 8)):
            file.write(line.replace('"ts": 0', f'"ts": {n * 10}') + ",\n")
        file.write(line + "]}")
    return path.stat().st_size / 1e6


def reading(megabytes: int) -> list[Row]:
    """Summarize a large file in a process of its own; against json.load of the same file."""
    load = (
        "import json, resource, sys, time\nb = time.perf_counter()\njson.load(open(sys.argv[1]))\n"
    )
    load += "print(time.perf_counter() - b, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        size = write_large(path, megabytes)
        ours, theirs = [], []
        for _ in range(3):
            ours.append(child(READ, path))
            theirs.append(child(load, path))
    (ours_s, ours_kb), (theirs_s, theirs_kb) = min(ours), min(theirs)
    return [
        Row(
            f"summarize {size:.0f} MB of kernels", "json.load alone", "< 10 s per 100 MB", ours_s,
            theirs_s, "s", theirs_s / ours_s, ours_s < 10 * size / 100,
        ),
        Row(
            f"memory that takes, {size:.0f} MB", "json.load alone", "bounded", ours_kb / 1024,
            theirs_kb / 1024, "MiB", theirs_kb / max(ours_kb, 1), ours_kb / 1024 < 40,
        ),
    ]  # fmt: skip


def child(code: str, path: Path) -> tuple[float, float]:
    """Seconds and KiB that a fresh process prints."""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), float(kilobytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    save("trace", [overhead(), *reading(10 if args.quick else 100)])


if __name__ == "__main__":
    main()
