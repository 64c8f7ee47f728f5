"""The engine beside other CPU engines on the mid shape, in one run, with the same token ids.

Each engine is a process of its own (benchmarks/peers/engines.py); they take turns, so that what
else the machine does hits all alike. Needs 10 GB of disk; the checkpoint and its GGUF twin are made
once in `--work`. `--quick`: fewer turns, and only whalefall, the best ik_llama.cpp and llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import _server
from whalefall.errors import MissingError
from whalefall.jit import machine
from whalefall.model.check import check
from whalefall.model.synth import synth
from whalefall.testing.benchmark import Row, save

HERE = Path(__file__).parent / "peers"
IK = ("ik fa1 mla3", "ik fa0 mla1", "ik fa1 mla1")
CASES = {
    "decode, 1 sequence": {"do": "decode", "batch": 1, "steps": 16},
    "decode, 8 sequences": {"do": "decode", "batch": 8, "steps": 6},
    "prefill, 512 tokens": {"do": "prefill", "tokens": 512},
}


class Process:
    """An engine in its process; `version` is its package's."""

    def __init__(self, name: str, path: Path) -> None:
        command = [sys.executable, str(HERE / "engines.py"), name, str(path)]
        pipe = subprocess.PIPE
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.version = str(self._read()["ready"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # peers print a good deal of their own
                found: dict[str, Any] = json.loads(line)
                return found
        raise MissingError(f"bench serve: {self.name} ended without an answer")

    def run(self, case: dict[str, Any]) -> float:
        """Tokens a second of one case."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        seconds = float(self._read()["seconds"])
        return float(case.get("tokens") or case["batch"] * case["steps"]) / seconds

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def files(work: Path) -> tuple[Path, Path]:
    """The mid checkpoint and its GGUF twin, made where missing."""
    model, twin = work / "mid", work / "mid.gguf"
    if not (model / "config.json").exists():
        synth(model, "mid", fp8_head=True)
    if not twin.exists():
        subprocess.run([sys.executable, str(HERE / "write_gguf.py"), model, twin], check=True)
    return model, twin


def measure(
    engines: list[Process], rounds: int, pause_s: float
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by case and engine, in turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, case in CASES.items():
        found[name] = {engine.name: [] for engine in engines}
        warmups = 0 if "tokens" in case else 1  # prefill comes last, and is long
        for turn in range(rounds + warmups):
            for engine in engines:
                speed = engine.run(case)
                time.sleep(pause_s)
                if turn >= warmups:
                    found[name][engine.name].append(speed)
    return found


def rows(
    found: dict[str, dict[str, list[float]]], versions: dict[str, str], bound: float
) -> list[Row]:
    """The table: ours against each peer, and against the read bandwidth."""
    table = []
    for case, speeds in found.items():
        median = {name: statistics.median(values) for name, values in speeds.items()}
        ours = median["whalefall"]
        groups = {"ik_llama.cpp Q8_0, its best": IK, "llama.cpp Q8_0": ("llama.cpp",)}
        groups["Transformers bf16"] = ("transformers",)
        for peer, names in groups.items():
            best = max((n for n in names if n in median), key=lambda n: median[n], default=None)
            if best is None:
                continue
            target = _target(case, peer)
            ratio = ours / median[best]
            table.append(
                Row(
                    what=f"mid shape, {case}",
                    against=f"{peer} ({best}, {versions[best]})",
                    target=f">= {target}x" if target else "",
                    ours=ours,
                    theirs=median[best],
                    unit="tok/s",
                    ratio=ratio,
                    reached=ratio >= target if target else None,
                    extra={n: [round(v, 2) for v in speeds[n]] for n in ("whalefall", best)},
                )
            )
    one, eight = (statistics.median(found[c]["whalefall"]) for c in list(CASES)[:2])
    table.append(
        Row("mid shape, 8 streams", "1 stream", ">= 1.8x", eight, one, "tok/s", eight / one,
            eight / one >= 1.8)
    )  # fmt: skip
    table.append(
        Row("mid shape, decode, 1 sequence", "read bandwidth ÷ bytes of a token", "", one, bound,
            "tok/s", one / bound, None)
    )  # fmt: skip
    return table


def _target(case: str, peer: str) -> float | None:
    if peer.startswith("ik"):
        return None if "prefill" in case else 1.0
    if peer.startswith("llama.cpp"):
        return 1.2 if "prefill" in case else None
    return 20.0 if case == "decode, 1 sequence" else None


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="whalefall bench serve", description=__doc__)
    cache = Path.home() / ".cache" / "whalefall" / "bench"
    parser.add_argument("--work", type=Path, default=cache, help=f"checkpoint, GGUF ({cache})")
    parser.add_argument("--quick", action="store_true", help="fewer turns, three engines")
    parser.add_argument("--rounds", type=int, help="turns of each engine")
    parser.add_argument("--engines", help="comma-separated, of those in peers/engines.py")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model, twin = files(arguments.work)
    names = ["whalefall", "ik fa1 mla3", "llama.cpp"]
    if not arguments.quick:
        names += ["ik fa0 mla1", "ik fa1 mla1", "transformers"]
    if arguments.engines:
        names = arguments.engines.split(",")
    engines = []
    for name in names:
        path = model if name in ("whalefall", "transformers") else twin
        try:
            engines.append(Process(name, path))
        except MissingError as missing:
            print(missing, file=sys.stderr)
    found = measure(engines, arguments.rounds or (3 if arguments.quick else 7), 0.2)
    versions = {engine.name: engine.version for engine in engines}
    for engine in engines:
        engine.close()
    report = check(model)
    bound = machine.limits(measure=True)["read_bytes_s"] / report.token_bytes
    table = rows(found, versions, bound) + _server.rows(model, report.kv_token_bytes)
    save("serve", table, versions)


if __name__ == "__main__":
    main()
