"""Day 4, profile data: record two lanes, then ask how much communication hid behind compute."""

import tempfile
import threading
import time
from pathlib import Path

from whalefall import trace


def send() -> None:
    with trace.span("dispatch", category="communication", track="network", tokens=128):
        time.sleep(0.020)


trace.start("demo", rank=0)
for _ in range(3):
    sender = threading.Thread(target=send)
    sender.start()
    with trace.span("mlp", category="compute"):
        time.sleep(0.015)
    sender.join()

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "demo.json.gz"
    trace.stop(path)
    found = trace.summarize(path)
    print("kernels:", {kernel.name: kernel.count for kernel in found.kernels})
    print("faults:", len(trace.check(path).problems))
    print("more than half of the communication is hidden:", found.overlap_ratio > 0.5)
    trace.write_page(path, Path(folder) / "demo.html")  # open it in a browser
