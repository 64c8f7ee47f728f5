"""The ledger of a day, live or published, and what capacity a model needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from whalefall.errors import ConfigError
from whalefall.plan import published
from whalefall.plan.fleet import Fleet, published_fleet
from whalefall.plan.ledger import Prices, Traffic, WhatIf, ledger, night_share
from whalefall.plan.report import chart_svg, day_report, table_rows

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def plan() -> None:
    """The ledger of a day, and what capacity a model needs."""


@app.command()
def day(
    price_hit: Annotated[float, typer.Option(help="$ per million cached input tokens")] = 0.14,
    price_miss: Annotated[float, typer.Option(help="$ per million other input tokens")] = 0.55,
    price_output: Annotated[float, typer.Option(help="$ per million output tokens")] = 2.19,
    gpu_hour: Annotated[float, typer.Option(help="$ per GPU-hour")] = published.GPU_HOUR_USD,
    gpus: Annotated[int, typer.Option(help="GPUs a node")] = published.GPUS_PER_NODE,
    nodes: Annotated[
        float | None, typer.Option(help="a constant fleet instead of the published chart")
    ] = None,
    input_tokens: Annotated[float, typer.Option(help="input tokens")] = published.INPUT_TOKENS,
    hit_tokens: Annotated[
        float | None, typer.Option(help="of these in the cache (default: the published share)")
    ] = None,
    output_tokens: Annotated[float, typer.Option(help="output tokens")] = published.OUTPUT_TOKENS,
    v3_share: Annotated[float, typer.Option(help="share sold at V3's prices")] = 0.0,
    free_share: Annotated[float, typer.Option(help="share that earns nothing")] = 0.0,
    night_discount: Annotated[
        float, typer.Option(help="price cut 00:30-08:30; traffic follows the nodes")
    ] = 0.0,
    currency: Annotated[str, typer.Option(help="a sign to print money with")] = "$",
    rate: Annotated[float, typer.Option(help="units of that currency per dollar")] = 1.0,
    svg: Annotated[Path | None, typer.Option(help="write the node chart here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The published day: nodes, cost, revenue and margin; with options: what if."""
    if rate <= 0:
        raise ConfigError(f"plan day: --rate is {rate:g}, wanted more than 0")
    if currency != "$" and rate == 1.0:
        raise ConfigError(f"plan day: --currency {currency} needs a --rate other than 1")
    fleet = published_fleet(gpus, gpu_hour)
    if nodes is not None:
        fleet = Fleet(((0.0, nodes),), 0.0, gpus, gpu_hour)
    if hit_tokens is None:
        hit_tokens = input_tokens * (published.HIT_TOKENS / published.INPUT_TOKENS)
    traffic = Traffic(input_tokens, hit_tokens, output_tokens)
    prices = Prices(price_hit, price_miss, price_output)
    case = WhatIf(v3_share, free_share, night_discount, night_share(fleet))
    report = day_report(fleet, traffic, prices, case, ledger(traffic, prices, fleet.cost, case))
    if svg is not None:
        svg.write_bytes(chart_svg(fleet))
    if as_json:
        typer.echo(json.dumps(report | {"currency": currency, "rate": rate}, indent=1))
        return
    print_table(table_rows(report, rate, currency))


def print_table(rows: list[tuple[str, str, str]]) -> None:
    """Print (line, computed, cited) rows; a cited figure is never shown as a computed one."""
    width = max(len(name) for name, _, _ in rows)
    typer.echo(f"{'':{width}}  {'computed':>14}  {'published':>14}")
    for name, computed, cited in rows:
        typer.echo(f"{name:{width}}  {computed:>14}  {cited:>14}".rstrip())
    typer.echo("published: as cited; from the rounded public token counts revenue comes out higher")


@app.command()
def live(
    url: Annotated[str, typer.Argument(help="a running server, e.g. http://127.0.0.1:8000")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The same ledger of a running server since its start."""
    from whalefall.plan.live import live_report, live_rows

    report = live_report(url)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    for name, value in live_rows(report):
        typer.echo(f"{name:34} {value:>16}")
