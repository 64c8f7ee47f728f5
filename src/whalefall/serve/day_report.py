"""`whalefall serve simulate`: runs a simulated day and says what it showed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import typer

from whalefall.plan import Prices, Traffic, ledger, published
from whalefall.plan.capacity import parse_unit
from whalefall.plan.capacity_report import read_config
from whalefall.plan.hardware_files import load_hardware
from whalefall.serve.published_cluster import (
    cluster_spec,
    default_curve,
    published_day,
    read_curve,
)
from whalefall.serve.simulate import simulate
from whalefall.serve.simulated_cluster import Outcome

__all__ = ["run_day"]

CAVEAT = (
    "This checks the control loop (queues, balancers, autoscaler) and predicts nothing: the "
    "autoscaler aims at the published averages, and the hourly curve is an input. Which experts "
    "tokens choose is drawn; an uneven load is reported and slows no unit."
)


def run_day(
    model: Path,
    hardware_name: str,
    prefill: str,
    decode: str,
    traffic: Path | None,
    hours: float,
    weight: int,
    seed: int,
    as_json: bool,
) -> None:
    """Simulate and print, as text or JSON."""
    config, hardware = read_config(model), load_hardware(hardware_name)
    hit_rate = published.HIT_TOKENS / published.INPUT_TOKENS
    spec = cluster_spec(config, hardware, parse_unit(prefill), parse_unit(decode), hit_rate)
    curve = default_curve() if traffic is None else read_curve(traffic)
    outcome = simulate(spec, published_day(curve, weight), hours * 3600, seed)
    report = day_figures(outcome, hours, hardware.gpus_per_node)
    report["inputs"] = {"curve": curve, "weight": weight, "seed": seed, "hours": hours}
    report["caveat"] = CAVEAT
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    print_figures(report)


def day_figures(outcome: Outcome, hours: float, gpus_per_node: int) -> dict[str, Any]:
    """The outcome with its ledger."""
    cost = outcome.average_nodes * hours * gpus_per_node * published.GPU_HOUR_USD
    traffic = Traffic(outcome.input_tokens, outcome.hit_tokens, outcome.output_tokens)
    result = ledger(traffic, Prices(), cost)
    return dataclasses.asdict(outcome) | {
        "cost": result.cost,
        "revenue": result.revenue,
        "margin": result.margin,
    }


def print_figures(report: dict[str, Any]) -> None:
    """The report as text, the published figures beside it."""

    def row(name: str, value: str, cited: str = "") -> None:
        typer.echo(f"{name:36} {value:>16}  {cited}".rstrip())

    def triple(values: list[float], scale: float, unit: str) -> str:
        return " / ".join(f"{value * scale:,.3g}" for value in values) + " " + unit

    average = f"published {published.AVERAGE_NODES}"
    row("nodes, average", f"{report['average_nodes']:,.2f}", average)
    row("nodes, peak", f"{report['peak_nodes']:,}", f"published {published.PEAK_NODES}")
    row("input tokens", f"{report['input_tokens'] / 1e9:,.1f} B")
    row("output tokens", f"{report['output_tokens'] / 1e9:,.1f} B")
    row("utilisation of peak, prefill", f"{report['prefill_utilisation']:.1%}")
    row("utilisation of peak, decode", f"{report['decode_utilisation']:.1%}")
    row("time to first token, p50/p90/p99", triple(report["ttft_s"], 1, "s"))
    row("time per output token, p50/p90/p99", triple(report["tpot_s"], 1e3, "ms"))
    for kind, each in report["experts"].items():
        if each["looks"]:
            row(
                f"busiest {kind} rank's experts",
                f"{each['balanced']:.2f} x mean",
                f"{each['even']:.2f} had nothing moved; {each['moves']:,} moves",
            )
    row("cost", f"${report['cost']:,.0f}")
    row("revenue at R1 prices", f"${report['revenue']:,.0f}")
    row("margin (of cost)", f"{report['margin']:.1%}")
    typer.echo("\nnodes by hour:")
    peak = max(nodes for _, nodes in report["curve"])
    for hour, nodes in report["curve"][::4]:
        typer.echo(f"  {hour:5.1f}  {'#' * round(48 * nodes / peak)} {nodes}")
    typer.echo("\n" + CAVEAT)
