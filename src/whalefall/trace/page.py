"""Trace room: the timeline as one self-contained page.

In: a trace file. Out: HTML with the events inside and a small canvas viewer (wheel zooms, drag
pans, hover names); it fetches nothing. Of large traces the longest events of each lane are kept.
"""

from __future__ import annotations

import heapq
import html
import json
from pathlib import Path
from typing import Any

from whalefall.trace.reader import TraceFile, args_of
from whalefall.trace.rules import Rules
from whalefall.trace.summary import Summary, completed, summarize
from whalefall.writing import write_text

__all__ = ["write_page"]

MOST_PER_LANE = 20_000
# In a name "</script" would end the script element, and "<!--<script" swallow the page's end; the
# other two end a line in older JavaScript.
_ESCAPED = "<\u2028\u2029"
VIEWER = Path(__file__).parent / "viewer.js"


class _Lane:
    """One row of the page: its longest events."""

    def __init__(self) -> None:
        self.kept: list[tuple[float, int, float, str, str]] = []
        self.seen = 0

    def add(self, start: float, took: float, name: str, kind: str) -> None:
        entry = (took, self.seen, start, name, kind)
        self.seen += 1
        if len(self.kept) < MOST_PER_LANE:
            heapq.heappush(self.kept, entry)
        else:
            heapq.heappushpop(self.kept, entry)


def write_page(path: str | Path, output: str | Path, rules: Rules | None = None) -> int:
    """Write the page of a trace; returns how many events it shows.

    Raises: CorruptError, MissingError as the reader does.
    """
    rules = rules or Rules()
    source = Path(path)
    lanes: dict[tuple[str, str], _Lane] = {}
    names: dict[tuple[str, str, str], str] = {}
    for event in completed(_named(TraceFile(source), names)):
        key = (str(event.get("pid")), str(event.get("tid")))
        category, name = str(event.get("cat", "")), str(event.get("name", ""))
        kind = rules.kind(category, name)
        lanes.setdefault(key, _Lane()).add(event["ts"], event["dur"], name, kind)
    data = _data(lanes, names)
    text = _html(source.name, summarize(source, rules), data)
    write_text(output, text)
    return sum(len(lane["events"]) for lane in data["lanes"])


def _named(file: TraceFile, names: dict[tuple[str, str, str], str]) -> Any:
    """The events; names of processes and lanes are put aside on the way."""
    for event in file:
        if event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name"):
            key = (str(event["name"]), str(event.get("pid")), str(event.get("tid")))
            names[key] = str(args_of(event).get("name", ""))
        yield event


def _data(
    lanes: dict[tuple[str, str], _Lane], names: dict[tuple[str, str, str], str]
) -> dict[str, Any]:
    starts = [entry[2] for lane in lanes.values() for entry in lane.kept]
    origin = min(starts, default=0.0)
    process = {pid: name for (kind, pid, _), name in names.items() if kind == "process_name"}
    texts: dict[str, int] = {}
    rows = []
    for (pid, tid), lane in sorted(lanes.items(), key=lambda item: _natural(item[0])):
        label = f"{process.get(pid, pid)} · {names.get(('thread_name', pid, tid), tid)}"
        events = [
            [
                round(start - origin, 3),
                round(took, 3),
                texts.setdefault(name, len(texts)),
                ("compute", "communication", "other").index(kind),
            ]
            for took, _, start, name, kind in sorted(lane.kept, key=lambda e: (e[2], -e[0]))
        ]
        rows.append({"label": label, "events": events, "left_out": lane.seen - len(events)})
    return {"lanes": rows, "names": list(texts)}


def _natural(key: tuple[str, str]) -> tuple[tuple[int, str], ...]:
    return tuple((int(part) if part.isdigit() else 1 << 60, part) for part in key)


def _html(title: str, summary: Summary, data: dict[str, Any]) -> str:
    facts = (
        f"span {summary.span_us / 1000:,.2f} ms · compute {summary.compute_us / 1000:,.2f} ms · "
        f"communication {summary.communication_us / 1000:,.2f} ms, "
        f"{summary.overlap_ratio:.1%} of it under compute"
    )
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for mark in _ESCAPED:
        payload = payload.replace(mark, f"\\u{ord(mark):04x}")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>{facts}</p>"
        '<p class=key><i style="background:#4292c6"></i>compute <i style="background:#fd8d3c"></i>'
        'communication <i style="background:#bdbdbd"></i>other — wheel: zoom, drag: move, '
        "double click: all</p><canvas id=view></canvas><div id=tip></div>"
        f"<script>const TRACE={payload};\n{VIEWER.read_text(encoding='utf-8')}</script></html>\n"
    )


_STYLE = (
    "body{font:14px sans-serif;margin:1.5em}h1{font-size:18px}canvas{width:100%;display:block}"
    ".key i{display:inline-block;width:12px;height:12px;margin:0 4px 0 12px}"
    "#tip{position:fixed;background:#222;color:#fff;padding:3px 7px;font-size:12px;display:none;"
    "max-width:60em;overflow-wrap:anywhere;pointer-events:none}"
)
