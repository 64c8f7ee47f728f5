"""The benchmark harness: interleaved contenders, medians with spread, rows that make a page.

A file `benchmarks/ROOM.py` measures with `interleave`, builds `Row`s and calls `save(room, rows)`.
That writes docs/benchmarks/ROOM.json; `write_page` renders all of them, and the notes beside them
(docs/benchmarks/ROOM.notes.md), as docs/benchmarks.md. Nobody edits that page by hand.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whalefall import env
from whalefall.errors import MissingError

__all__ = ["Row", "Timing", "by_level", "interleave", "save", "write_page"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: median, the quartiles as its spread, and the best round."""

    median_s: float
    low_s: float
    high_s: float
    rounds: int
    best_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the thing measured, with its shape.
        against: the peer (with version) or the limit measured in the same run.
        target: the aim as text, e.g. ">= 0.85x".
        ours: our figure in `unit`; None where it was not measured (the note says why).
        theirs: the peer's or limit's figure in the same unit.
        ratio: how many times as good ours is (1.0: equal, above 1: ours is better).
        reached: whether the target was met; None where there is no target.
    """

    what: str
    against: str
    target: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None
    reached: bool | None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmups: int = 1,
    min_time_s: float = 0.0,
    settle_s: float = 0.0,
) -> dict[str, Timing]:
    """Time the contenders in turns, `rounds` times each, after `warmups` unmeasured turns.

    Where one call is shorter than `min_time_s`, it is repeated within a round to last that long.
    For `settle_s` before, it runs unmeasured: the threads of the contender before may spin on for
    some milliseconds (those of torch's OpenMP do for 9) on the cores that this one needs.
    """
    _note_distance()
    repeats = {}
    for name, call in contenders.items():
        for _ in range(max(1, warmups)):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
        repeats[name] = max(1, int(min_time_s / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            while time.perf_counter() - start < settle_s:
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: timing(values) for name, values in samples.items()}


_apart_ns: list[float] = []  # between two cores, whenever something was measured


def _note_distance() -> None:
    from whalefall.jit import machine

    with contextlib.suppress(MissingError):
        if (distance := machine.line_transfer_ns()) is not None:
            _apart_ns.append(distance)


def timing(samples: Sequence[float]) -> Timing:
    """Median and quartiles of a list of seconds."""
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], len(samples), samples[0])
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples), min(samples))


def commit(root: Path) -> str:
    """The short hash of the checkout's commit, "+" appended where files differ from it."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=9"]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return out or "unknown"


def shown(argument: str) -> str:
    """A command's argument as a page may show it: of an absolute path its last part."""
    return Path(argument).name if argument.startswith("/") else argument


def by_level(room: str) -> str:
    """`room` with the ISA level in its name: machines of different levels keep their results."""
    from whalefall import jit

    return f"{room}-{jit.best_level()}"


def command_of(room: str) -> str:
    """The shell command that measures anew what is saved under `room`, a forced level included."""
    level = env.get("WHALEFALL_ISA")
    prefix = [f"WHALEFALL_ISA={level}"] if level else []
    return " ".join([*prefix, "whalefall", "bench", room.split("-")[0], *map(shown, sys.argv[1:])])


def save(room: str, rows: Sequence[Row], versions: Mapping[str, str] | None = None) -> Path:
    """Write docs/benchmarks/ROOM.json with the machine's description, print it, renew the page.

    Args:
        room: the benchmark's name; with a part (`gemm-avx512`) one room can keep several levels.
        rows: the measured lines.
        versions: the peers' versions.
    """
    from whalefall.jit import machine

    root = Path(sys.modules["whalefall"].__file__ or "").resolve().parents[2]
    folder = root / "docs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine.describe()
    _note_distance()
    result = {
        "room": room,
        "date": time.strftime("%Y-%m-%d"),
        "cpu": facts["cpu"],
        "isa": facts["isa"],
        "cores": facts["cores"],
        "core_to_core_ns": [min(_apart_ns), max(_apart_ns)] if _apart_ns else None,
        "commit": commit(root),
        "command": command_of(room),
        "versions": dict(versions or {}),
        "rows": [asdict(row) for row in rows],
    }
    path = folder / f"{room}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(section(result))
    write_page(root)
    return path


def write_page(root: Path) -> None:
    """Render docs/benchmarks.md of the checkout `root` from all results and notes in it."""
    folder = root / "docs" / "benchmarks"
    head = (
        "# Benchmarks\n\nWritten by `whalefall bench`; edit the notes in docs/benchmarks/, not "
        "this page. A ratio above 1 means that whalefall is better; rows that miss their target "
        "say so.\n"
    )
    paths = sorted(folder.glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    parts = [head, misses(results)]
    bases = [path.stem.split("-")[0] for path in paths]
    for base, result, after in zip(bases, results, [*bases[1:], None], strict=True):
        parts.append(section(result))
        notes = folder / f"{base}.notes.md"
        if base != after and notes.exists():  # once, behind the results of all levels
            parts.append(notes.read_text(encoding="utf-8"))
    (root / "docs" / "benchmarks.md").write_text("\n".join(parts), encoding="utf-8")
    write_readme(root)


def write_readme(root: Path) -> None:
    """Renew the README's figures: of each result its first row and the row that misses by most."""
    lines = [
        "| room | what | against | ratio | target | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted((root / "docs" / "benchmarks").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        judged = [row for row in result["rows"] if row["reached"] is not None]
        reached = sum(row["reached"] for row in judged)
        shown = [result["rows"][0]]
        shown += [row for row in [_worst(judged)] if row is not None and row not in shown]
        for place, row in enumerate(shown):
            verdict = ["**missed**"] if row["reached"] is False else []
            verdict += [] if place else [f"{reached} of {len(judged)}"]
            ratio = figure(row["ratio"] if row["ratio"] is not None else row["ours"])
            unit = "" if row["ratio"] is not None else f" {row['unit']}"
            lines.append(
                f"| {'' if place else result['room']} | {row['what']} | {row['against']} "
                f"| {ratio}{unit} | {row['target']} | {', '.join(verdict)} |"
            )
    path = root / "README.md"
    head, _, rest = path.read_text(encoding="utf-8").partition("<!-- figures -->")
    _, _, tail = rest.partition("<!-- /figures -->")
    text = "\n".join(lines)
    page = f"{head}<!-- figures -->\n{text}\n<!-- /figures -->{tail}"
    path.write_text(page, encoding="utf-8")


def _worst(judged: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the smallest ratio among those that miss their target."""
    missed = [row for row in judged if not row["reached"]]
    return min(
        missed, key=lambda row: row["ratio"] if row["ratio"] is not None else 1.0, default=None
    )


def misses(results: Sequence[Mapping[str, Any]]) -> str:
    """Every row that misses its target, as a list."""
    lines = [
        f"- {result['room']}: {row['what']} against {row['against']}: {figure(row['ratio'])} "
        f"(target {row['target']})"
        for result in results
        for row in result["rows"]
        if row["reached"] is False
    ]
    return "\n".join(["## Rows that miss their target", "", *lines]) + "\n"


def section(result: Mapping[str, Any]) -> str:
    """One room's results as markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cores = f"{result['cores']} cores"
    if distance := result.get("core_to_core_ns"):
        low, high = distance
        moved = f" to {high:.0f}" if high > 1.5 * low else ""  # put elsewhere meanwhile
        cores += f" {low:.0f}{moved} ns apart"
    lines = [
        f"## {result['room']}",
        "",
        f"{result['date']}, {result['cpu']}, {cores}, ISA level `{result['isa']}`, "
        f"commit {result['commit']}{', ' + versions if versions else ''}. `{result['command']}`",
        "",
        "| what | against | ours | theirs | ratio | target | reached |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    verdict = {True: "yes", False: "**no**", None: "–"}
    for row in result["rows"]:
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(
            f"| {row['what']}{note} | {row['against']} | {figure(row['ours'])} {row['unit']} "
            f"| {figure(row['theirs'])} {row['unit']} | {figure(row['ratio'])} "
            f"| {row['target']} | {verdict[row['reached']]} |"
        )
    return "\n".join(lines) + "\n"


def figure(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
