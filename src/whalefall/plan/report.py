"""The day's report: one plain dictionary, from which the table, the JSON and the chart are made."""

from __future__ import annotations

from typing import Any

from whalefall import charts
from whalefall.plan import published
from whalefall.plan.fleet import Fleet
from whalefall.plan.ledger import Ledger, Prices, Traffic, WhatIf, nodes_from_rates

__all__ = ["chart_svg", "day_report", "table_rows"]


def day_report(
    fleet: Fleet, traffic: Traffic, prices: Prices, case: WhatIf, result: Ledger
) -> dict[str, Any]:
    """Everything `plan day` shows; computed and cited figures under keys of their own."""
    return {
        "nodes": {"peak": fleet.peak_nodes, "average": round(fleet.average_nodes, 4)},
        "node_hours": round(fleet.node_hours(), 4),
        "nodes_from_rates": round(nodes_from_rates(traffic), 2),
        "tokens": {
            "input": traffic.input_tokens,
            "hit": traffic.hit_tokens,
            "miss": traffic.miss_tokens,
            "output": traffic.output_tokens,
            "hit_rate": traffic.hit_tokens / traffic.input_tokens if traffic.input_tokens else 0.0,
        },
        "prices": {"hit": prices.hit, "miss": prices.miss, "output": prices.output},
        "what_if": {
            "v3_share": case.v3_share,
            "free_share": case.free_share,
            "night_discount": case.night_discount,
            "night_share": case.night_share,
        },
        "cost": round(result.cost, 2),
        "revenue": {
            "hit": round(result.revenue_hit, 2),
            "miss": round(result.revenue_miss, 2),
            "output": round(result.revenue_output, 2),
            "total": round(result.revenue, 2),
        },
        "profit": round(result.profit, 2),
        "margin": None if result.margin is None else round(result.margin, 4),
        "cited": {
            "nodes_average": published.AVERAGE_NODES,
            "cost": published.COST_USD,
            "revenue": published.REVENUE_USD,
            "revenue_cny": published.REVENUE_CNY,
            "margin": published.MARGIN,
        },
    }


def table_rows(report: dict[str, Any], rate: float, sign: str) -> list[tuple[str, str, str]]:
    """(line, computed, cited) of the printed ledger; money times `rate`, with the sign."""

    def money(value: float) -> str:
        return f"{sign}{value * rate:,.0f}"

    tokens, prices, cited = report["tokens"], report["prices"], report["cited"]

    def revenue(kind: str) -> tuple[str, str, str]:
        name = f"revenue, {kind} ({tokens[kind] / 1e9:,.6g} B, list ${prices[kind]:g}/M)"
        return (name, money(report["revenue"][kind]), "")

    margin = report["margin"]
    # As cited, whatever is computed beside it: converted it would be a figure nobody published.
    yuan = sign == "¥"
    cited_revenue = f"¥{cited['revenue_cny']:,.0f}" if yuan else f"${cited['revenue']:,.0f}"
    return [
        ("nodes, average", f"{report['nodes']['average']:,.2f}", f"{cited['nodes_average']:,.2f}"),
        ("nodes, peak", f"{report['nodes']['peak']:,.0f}", f"{published.PEAK_NODES}"),
        ("nodes, tokens over published rates", f"{report['nodes_from_rates']:,.2f}", ""),
        ("input tokens in cache", f"{tokens['hit_rate']:.2%}", "56.3%"),
        revenue("hit"),
        revenue("miss"),
        revenue("output"),
        ("revenue", money(report["revenue"]["total"]), cited_revenue),
        ("cost", money(report["cost"]), f"${cited['cost']:,.0f}"),
        ("profit", money(report["profit"]), ""),
        (
            "margin (profit / cost)",
            "–" if margin is None else f"{margin:.1%}",
            f"{cited['margin']:.0%}",
        ),
    ]


def chart_svg(fleet: Fleet) -> bytes:
    """The nodes in use over the day as a step chart (SVG)."""
    pygal = charts.pygal()
    points = [(hour, nodes) for a, b, nodes in fleet.spans() for hour in (a, b)]
    style = pygal.style.CleanStyle(colors=("#1f6feb",))
    chart = pygal.XY(
        fill=True,
        show_dots=False,
        show_legend=False,
        height=320,
        width=900,
        title="Nodes in use over the day",
        x_title="local hour",
        include_x_axis=True,
        js=(),
        style=style,
        x_labels=[fleet.start_hour + 2 * i for i in range(13)],
        x_value_formatter=lambda hour: f"{int(hour) % 24:02d}:{round(hour % 1 * 60):02d}",
    )
    chart.add("nodes", points)
    return bytes(chart.render())
