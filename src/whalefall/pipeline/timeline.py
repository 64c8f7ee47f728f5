"""Pipeline room: the picture of a step: one row a rank, one box an action.

In: simulated results, or traces of real steps. Out: an SVG, several panels under one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import drawsvg

from whalefall.pipeline.simulator import Result
from whalefall.writing import write_text

__all__ = ["Box", "Panel", "of_result", "of_trace", "timeline", "write"]

COLOURS = {
    "F": "#f6c26b", "B": "#6fbf73", "I": "#7fd1c7", "W": "#4a7fb5", "FB": "#b5c46a",
    "ATTN": "#f6c26b", "MLP": "#6fbf73", "SHARED": "#c9a3d6",
    "DISPATCH": "#fd8d3c", "COMBINE": "#fd8d3c",
}  # fmt: skip
NAMES = {
    "F": "forward", "B": "backward", "I": "backward for input", "W": "backward for weights",
    "FB": "overlapped forward & backward",
}  # fmt: skip
ROW, LEFT, WIDTH, TITLE = 22, 70, 1100, 30


class Box(NamedTuple):
    """One action: its kind, what is written in it, and when it ran."""

    kind: str
    label: str
    start: float
    end: float


class Panel(NamedTuple):
    """A title over rows of boxes, each row with its name."""

    title: str
    rows: list[tuple[str, list[Box]]]

    def span(self) -> tuple[float, float]:
        """First start and last end."""
        boxes = [box for _, row in self.rows for box in row]
        return min((b.start for b in boxes), default=0.0), max((b.end for b in boxes), default=1.0)


def of_result(title: str, result: Result) -> Panel:
    """A simulated step as a panel."""
    rows = []
    for rank, runs in enumerate(result.runs):
        boxes = []
        for run in runs:
            action = run.action
            label = str(action.task.chunk)
            if action.second is not None:
                label += f"&{action.second.chunk}"
            boxes.append(Box(action.kind, label, run.start, run.end))
        rows.append((f"rank {rank}", boxes))
    return Panel(title, rows)


def of_trace(title: str, events: Iterable[dict[str, Any]]) -> Panel:
    """The compute actions that `execute` recorded, from the events of one or several ranks."""
    rows: dict[Any, list[Box]] = {}
    for event in events:
        kind = (event.get("args") or {}).get("kind")
        if event.get("ph") != "X" or event.get("cat") not in ("compute", "pipeline"):
            continue
        if kind is None:
            continue
        chunks = re.findall(r"[A-Z01-]+?(\d+)\.", str(event["name"]))
        start = float(event["ts"])
        box = Box(str(kind), "&".join(chunks), start, start + float(event["dur"]))
        rows.setdefault(event["pid"], []).append(box)
    ordered = sorted(rows.items(), key=lambda item: (str(type(item[0])), item[0]))
    return Panel(title, [(f"rank {pid}", boxes) for pid, boxes in ordered])


def timeline(panels: Sequence[Panel]) -> drawsvg.Drawing:
    """Draw panels under one another, each over its own whole width."""
    height = sum(TITLE + ROW * len(panel.rows) + 8 for panel in panels) + 26
    drawing = drawsvg.Drawing(LEFT + WIDTH + 10, height)
    drawing.append(drawsvg.Rectangle(0, 0, LEFT + WIDTH + 10, height, fill="#ffffff"))
    y = 0.0
    for panel in panels:
        drawing.append(_text(panel.title, 13, 4, y + 19))
        y += TITLE
        start, end = panel.span()
        scale = WIDTH / max(end - start, 1e-12)
        for name, boxes in panel.rows:
            drawing.append(_text(name, 11, 4, y + 15))
            for box in boxes:
                _draw(drawing, box, y, start, scale)
            y += ROW
        y += 8
    _legend(drawing, {box.kind for p in panels for _, row in p.rows for box in row}, y)
    return drawing


def _text(text: str, size: float, x: float, y: float, anchor: str = "start") -> drawsvg.Text:
    return drawsvg.Text(text, size, x, y, text_anchor=anchor, font_family="sans-serif")


def _draw(drawing: drawsvg.Drawing, box: Box, y: float, origin: float, scale: float) -> None:
    x, width = LEFT + (box.start - origin) * scale, (box.end - box.start) * scale
    shape = drawsvg.Rectangle(
        x, y, max(width, 0.3), ROW - 3, fill=COLOURS.get(box.kind.split("-")[0], "#cccccc"),
        stroke="#555555", stroke_width=0.4,
    )  # fmt: skip
    shape.append_title(f"{box.kind} {box.label}: {box.end - box.start:.6g}")
    drawing.append(shape)
    size = min(10.0, width / max(len(box.label), 1) * 1.5)
    if size >= 5:
        drawing.append(_text(box.label, size, x + width / 2, y + 13, "middle"))


def _legend(drawing: drawsvg.Drawing, kinds: set[str], y: float) -> None:
    x = float(LEFT)
    for kind in sorted(kinds, key=list(NAMES).index if kinds <= set(NAMES) else None):
        name = NAMES.get(kind, kind)
        drawing.append(
            drawsvg.Rectangle(x, y + 4, 11, 11, fill=COLOURS.get(kind.split("-")[0], "#cccccc"))
        )
        drawing.append(_text(name, 11, x + 15, y + 14))
        x += 30 + 6.2 * len(name)


def write(panels: Sequence[Panel], path: str | Path) -> None:
    """Write the picture; the file appears whole."""
    write_text(path, timeline(panels).as_svg())
