"""The dashboard: charts of the last minutes, the experts' loads and the ledger, as HTML and SVG.

Everything is drawn here; the page only fetches the fragment again. No other host is asked.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from whalefall import charts
from whalefall.serve.core import ExpertBalance
from whalefall.serve.history import History, Point
from whalefall.serve.metrics import Metrics

if TYPE_CHECKING:
    from whalefall.engine import Engine

__all__ = ["fragment"]

SIZE: dict[str, Any] = {"width": 460, "height": 210}
MOST_CELLS = 64 * 256  # a heat map of more is drawn with experts taken together


def fragment(engine: Engine, metrics: Metrics, history: History) -> str:
    """The part of the page that changes."""
    points = list(history.points)
    stats = engine.stats()
    last = points[-1] if points else None
    acceptance = stats.spec_accepted / stats.spec_drafted if stats.spec_drafted else None
    hits = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else None
    figures = {
        "tokens/s": f"{last.tokens_s:.1f}" if last else "–",
        "requests running": str(stats.running),
        "waiting": str(stats.waiting),
        "KV cache in use": _percent(stats.kv_used / max(1, stats.kv_total)),
        "prefix hits": _percent(hits),
        "drafts accepted": _percent(acceptance),
    }
    if stats.communication_s:
        figures["overlap"] = _percent(stats.overlapped_s / stats.communication_s)
    charts = [
        _chart("Tokens per second", points, {"tokens/s": [p.tokens_s for p in points]}),
        _chart("Time to first token, ms", points, {"mean": [_ms(p.ttft_s) for p in points]}),
        _chart(
            "Requests",
            points,
            {"running": [p.running for p in points], "waiting": [p.waiting for p in points]},
        ),
        _chart(
            "Shares, %",
            points,
            {
                "KV cache in use": [100 * p.kv_use for p in points],
                "prefix hits": [_times_100(p.prefix_hits) for p in points],
                "drafts accepted": [_times_100(p.spec_accepted) for p in points],
            },
        ),
    ]
    if stats.communication_s:
        overlap: dict[str, Sequence[float | None]] = {
            "overlap": [_times_100(p.overlapped) for p in points]
        }
        charts.append(_chart("Communication under compute, %", points, overlap))
    return "".join(
        [
            '<dl class="figures">',
            *(f"<div><dt>{html.escape(k)}</dt><dd>{v}</dd></div>" for k, v in figures.items()),
            '</dl><div class="charts">',
            *(f"<figure>{chart}</figure>" for chart in charts),
            "</div>",
            _experts(engine, stats.expert_load),
            _ledger(metrics),
        ]
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _times_100(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _chart(title: str, points: list[Point], lines: dict[str, Sequence[float | None]]) -> str:
    """Lines over the server's age; gaps where there was nothing to measure."""
    pygal = charts.pygal()
    chart = pygal.XY(
        **SIZE,
        title=title,
        js=(),
        show_dots=False,
        stroke_style={"width": 2},
        range=None if points else (0, 1),
        include_x_axis=True,
        max_scale=5,
        x_labels=_ticks(points),
        show_legend=len(lines) > 1,
        legend_at_bottom=True,
        no_data_text="nothing yet",
        x_value_formatter=lambda seconds: f"{seconds:.0f} s",
        allow_interruptions=True,
        style=pygal.style.CleanStyle(
            colors=("#0b6e8f", "#e67e22", "#8e44ad"),
            font_family="system-ui, sans-serif",
            background="transparent",
            plot_background="transparent",
        ),
    )
    for name, values in lines.items():
        chart.add(name, [(p.age_s, v) for p, v in zip(points, values, strict=True)])
    return str(chart.render(disable_xml_declaration=True, is_unicode=True))


def _ticks(points: list[Point]) -> list[float]:
    """Five ages along the axis."""
    if not points:
        return [0.0]
    first, last = points[0].age_s, points[-1].age_s
    return [first + (last - first) * step / 4 for step in range(5)]


def _experts(engine: Any, load: np.ndarray) -> str:
    """Heat maps: of units' ranks before and after balancing where there are some, of experts."""
    from whalefall.eplb.heatmap import heat_map

    maps = []
    for name, balance in list(getattr(getattr(engine, "experts", None), "units", {}).items()):
        for title, loads in _rank_loads(balance):
            maps.append((f"{name}: {title}", heat_map(loads, "", "rank")))
    routed = load[load.any(axis=1)]
    if routed.size:
        whole = heat_map(_narrow(routed.astype(np.float64)), "", "expert")
        maps.append(("choices of each expert in the layers that have some", whole))
    shown = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>{_bare(drawing.as_svg())}</figure>"
        for title, drawing in maps
    )
    note = (
        "<p>Colour: load as a multiple of the layer's mean, white 0, blue 1, red 2 and above.</p>"
    )
    shown = f'{note}<div class="charts">{shown}</div>' if maps else "<p>nothing yet</p>"
    return f"<h2>Expert load</h2>{shown}"


def _rank_loads(balance: ExpertBalance) -> list[tuple[str, np.ndarray]]:
    """[layers, ranks] loads under the first placement and under the present one."""
    from whalefall import eplb

    weight = balance.weight
    if not np.any(weight):
        return []
    found = []
    for title, placement in (("before balancing", balance.start), ("now", balance.placement)):
        loads = eplb.gpu_loads(weight, placement.phy2log, placement.num_gpus)
        found.append((f"load of each rank, {title}", np.asarray(loads, np.float64)))
    return found


def _narrow(load: np.ndarray) -> np.ndarray:
    """Neighbouring experts taken together until the map can be drawn."""
    while load.size > MOST_CELLS and load.shape[1] > 1:
        load = np.add.reduceat(load, np.arange(0, load.shape[1], 2), axis=1)
    return load


def _bare(svg: str) -> str:
    """An SVG without its XML declaration, to stand in HTML."""
    return svg[svg.index("<svg") :]


def _ledger(metrics: Metrics) -> str:
    lines = metrics.ledger()
    rows = []
    for name, value in lines.items():
        text = name.removesuffix("_dollars").replace("_", " ")
        shown = f"${value:,.6f}" if name.endswith("_dollars") else f"{value:,.0f}"
        if name == "margin":
            shown = f"{100 * value:,.0f} %"
        rows.append(f"<tr><th>{html.escape(text)}</th><td>{shown}</td></tr>")
    return f"<h2>Ledger, at DeepSeek-R1's published prices</h2><table>{''.join(rows)}</table>"
