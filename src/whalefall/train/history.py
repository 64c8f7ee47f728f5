"""Train room: what a run has written down of its steps, and the curves of it.

In: reports. Out: `history.jsonl`, one line a step, which a resumed run cuts back to where it goes
on; `curves.svg`, loss and balance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whalefall import charts
from whalefall.train.rank import Report

__all__ = ["History", "draw_curves", "read_history", "smoothed"]

POINTS = 200


class History:
    """Appends a run's reports to a file.

    Args:
        path: `history.jsonl`.
        step: steps done so far; later lines (of a run that was killed) are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_history(path) if line["step"] < step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_suffix(".new")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, report: Report, seconds: float) -> None:
        """Write one step's line, at once."""
        self._file.write(json.dumps(asdict(report) | {"seconds": round(seconds, 4)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines so far; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def smoothed(values: Sequence[float | None], points: int = POINTS) -> list[tuple[int, float]]:
    """At most `points` (place, mean) of as many equal stretches; None is skipped."""
    width = max(1, -(-len(values) // points))
    found = []
    for start in range(0, len(values), width):
        part = [v for v in values[start : start + width] if v is not None]
        if part:
            found.append((start + len(part) // 2, sum(part) / len(part)))
    return found


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str = "Training"
) -> None:
    """Draw loss, MTP loss and balance of one or several runs; the file appears whole.

    Args:
        runs: name ("" where there is one run alone) → its history.
    """
    chart = charts.pygal().XY(
        title=title, x_title="step", width=900, height=480, show_dots=False,
        stroke_style={"width": 2}, legend_at_bottom=True, js=[], disable_xml_declaration=True,
    )  # fmt: skip
    for name, lines in runs.items():
        for key, text, second in (
            ("loss", "loss", False), ("mtp", "MTP loss", False),
            ("balance", "busiest expert / mean (right)", True),
        ):  # fmt: skip
            points = smoothed([line.get(key) for line in lines])
            if points:
                chart.add(f"{name}: {text}" if name else text, points, secondary=second)
    temporary = path.with_suffix(".new")
    temporary.write_text(chart.render(is_unicode=True), "utf-8")
    os.replace(temporary, path)
