"""Runs the whole suite in its parts, and says how long each took: `make test`.

Parts run one after another, since several of them start processes and threads of their own. Those
of kernels run two tests at a time: at each level of the machine they compile first, on one core.
Arguments are passed on to pytest; the names of parts select some (`python tests/run.py ep eplb`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

# Folders of tests/ in the order of the layers, low to high; any folder not named runs last.
ORDER = """
jit comm launch trace gemm attention record fs data ep eplb pipeline train model engine serve plan
""".split()  # noqa: SIM905

COMPILING = ("gemm", "attention")


def main() -> int:
    here = Path(__file__).parent
    folders = sorted(p.name for p in here.iterdir() if p.is_dir() and any(p.rglob("test_*.py")))
    wanted = [arg for arg in sys.argv[1:] if arg in folders]
    options = [arg for arg in sys.argv[1:] if arg not in folders]
    ordered = [n for n in ORDER if n in folders] + [n for n in folders if n not in ORDER]
    failed, took = [], {}
    for name in [n for n in ordered if not wanted or n in wanted]:
        start = time.monotonic()
        print(f"== tests/{name}", flush=True)
        at_once = ["-n", "2"] if name in COMPILING else []
        command = [sys.executable, "-m", "pytest", "-q", str(here / name), *at_once, *options]
        code = subprocess.run(command, cwd=here.parent, check=False).returncode
        took[name] = time.monotonic() - start
        if code not in (0, 5):  # 5: every test of the folder carries a marker that is left out
            failed.append(name)
    print("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in took.items()))
    print(f"{len(took) - len(failed)} passed, {len(failed)} failed")
    if failed:
        print("failed: " + ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
