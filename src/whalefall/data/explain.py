"""Pictures of plans and runs: text, SVG, a timeline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from whalefall.data.nodes.base import Node
from whalefall.data.optimizer import optimize
from whalefall.data.plan import explain_text, walk

if TYPE_CHECKING:
    from whalefall.data.session import Session

__all__ = ["explain", "plan_svg", "write_timeline"]

BOX_W, BOX_H, GAP_X, GAP_Y = 260, 44, 24, 36


def explain(session: Session, node: Node) -> str:
    """The optimised plan as indented text."""
    return explain_text(optimize(node, dict(session._optimized)))


def plan_svg(root: Node) -> str:
    """The plan as a picture: sources on top, an arrow from each node to its readers."""
    import drawsvg

    levels: dict[int, int] = {}
    rows: list[list[Node]] = []
    for node in walk(root):
        level = 1 + max((levels[id(dep)] for dep in node.input_deps), default=-1)
        levels[id(node)] = level
        while len(rows) <= level:
            rows.append([])
        rows[level].append(node)
    width = max(len(row) for row in rows) * (BOX_W + GAP_X) + GAP_X
    height = len(rows) * (BOX_H + GAP_Y) + GAP_Y
    drawing = drawsvg.Drawing(width, height)
    spots: dict[int, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        for index, node in enumerate(row):
            left = (width - len(row) * (BOX_W + GAP_X)) / 2 + index * (BOX_W + GAP_X) + GAP_X / 2
            spots[id(node)] = (left, GAP_Y / 2 + level * (BOX_H + GAP_Y))
    for node in walk(root):
        left, top = spots[id(node)]
        for dep in node.input_deps:
            from_left, from_top = spots[id(dep)]
            drawing.append(
                drawsvg.Line(
                    from_left + BOX_W / 2, from_top + BOX_H, left + BOX_W / 2, top, stroke="#888"
                )
            )
    for node in walk(root):
        left, top = spots[id(node)]
        drawing.append(
            drawsvg.Rectangle(left, top, BOX_W, BOX_H, fill="#eef3fb", stroke="#4a6fa5", rx=5)
        )
        count = f" × {node.num_partitions}" if node.num_partitions > 1 else ""
        drawing.append(drawsvg.Text(repr(node) + count, 12, left + 8, top + 17))
        drawing.append(drawsvg.Text(node.describe()[:42], 10, left + 8, top + 34, fill="#555"))
    text: str = drawing.as_svg()
    return text


def write_timeline(path: str, spans: Iterable[Any]) -> None:
    """Write the runs of tasks as trace events, one thread a worker."""
    workers: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        thread = workers.setdefault(span.worker, len(workers))
        events.append(
            {
                "name": span.label,
                "ph": "X",
                "pid": 0,
                "tid": thread,
                "cat": "task",
                "ts": span.begin_s * 1e6,
                "dur": (span.end_s - span.begin_s) * 1e6,
                "args": {"attempt": span.attempt},
            }
        )
    for name, thread in workers.items():
        events.append(
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}
        )
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)
