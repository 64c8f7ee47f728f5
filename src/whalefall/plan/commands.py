"""The ledger of a day, live or published, and what capacity a model needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from whalefall.errors import ConfigError
from whalefall.options import within
from whalefall.plan import published
from whalefall.plan.fleet import Fleet, published_fleet
from whalefall.plan.ledger import Prices, Traffic, WhatIf, ledger, night_share
from whalefall.plan.pipeline import pipeline
from whalefall.plan.ranges import DOLLARS, HOURS, SHARE, TOKENS
from whalefall.plan.report import chart_svg, day_report, table_rows

app = typer.Typer(add_completion=False, no_args_is_help=True)


app.command()(pipeline)


@app.callback()
def plan() -> None:
    """The ledger of a day, and what capacity a model needs."""


@app.command()
def day(
    price_hit: Annotated[
        float, typer.Option(callback=DOLLARS, help="$ per million cached input tokens")
    ] = 0.14,
    price_miss: Annotated[
        float, typer.Option(callback=DOLLARS, help="$ per million other input tokens")
    ] = 0.55,
    price_output: Annotated[
        float, typer.Option(callback=DOLLARS, help="$ per million output tokens")
    ] = 2.19,
    gpu_hour: Annotated[
        float, typer.Option(callback=DOLLARS, help="$ per GPU-hour")
    ] = published.GPU_HOUR_USD,
    gpus: Annotated[
        int, typer.Option(callback=within(1, 1e6), help="GPUs a node")
    ] = published.GPUS_PER_NODE,
    nodes: Annotated[
        float | None,
        typer.Option(
            callback=within(0, 1e9), help="a constant fleet instead of the published chart"
        ),
    ] = None,
    input_tokens: Annotated[
        float, typer.Option(callback=TOKENS, help="input tokens")
    ] = published.INPUT_TOKENS,
    hit_tokens: Annotated[
        float | None,
        typer.Option(callback=TOKENS, help="of these in the cache (default: the published share)"),
    ] = None,
    output_tokens: Annotated[
        float, typer.Option(callback=TOKENS, help="output tokens")
    ] = published.OUTPUT_TOKENS,
    v3_share: Annotated[
        float, typer.Option(callback=SHARE, help="share sold at V3's prices")
    ] = 0.0,
    free_share: Annotated[
        float, typer.Option(callback=SHARE, help="share that earns nothing")
    ] = 0.0,
    night_discount: Annotated[
        float, typer.Option(callback=SHARE, help="price cut 00:30-08:30; traffic follows the nodes")
    ] = 0.0,
    currency: Annotated[str, typer.Option(help="a sign to print money with")] = "$",
    rate: Annotated[
        float,
        typer.Option(callback=within(0, 1e9, above=True), help="units of that currency per dollar"),
    ] = 1.0,
    svg: Annotated[Path | None, typer.Option(help="write the node chart here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The published day: nodes, cost, revenue and margin; with options: what if."""
    if currency != "$" and rate == 1.0:
        raise ConfigError(f"plan day: --currency {currency} needs a --rate other than 1")
    if currency == "$" and rate != 1.0:
        raise ConfigError(f"plan day: --rate {rate:g} needs a --currency: one $ is one $")
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


@app.command()
def capacity(
    model: Annotated[Path, typer.Option(help="a checkpoint folder or its config.json")],
    hardware: Annotated[str, typer.Option(help="h800, h200, this, or a .toml file")] = "h800",
    prefill: Annotated[str, typer.Option(help="NODESxGPUS of a prefill unit")] = "4x8",
    decode: Annotated[str, typer.Option(help="NODESxGPUS of a decode unit")] = "18x8",
    redundant: Annotated[
        int, typer.Option(callback=within(0, 1e6), help="redundant experts of a unit")
    ] = 32,
    kv_length: Annotated[
        float, typer.Option(callback=within(1, 1e9), help="mean KV length of an output token")
    ] = 4989,
    prompt: Annotated[
        float, typer.Option(callback=within(1, 1e9), help="mean prompt length in tokens")
    ] = 4096,
    hit_rate: Annotated[
        float, typer.Option(callback=within(0, 0.9999), help="share of the prompt in the cache")
    ] = 0.5625,
    tpot_ms: Annotated[
        float,
        typer.Option(callback=within(0, 1e6, above=True), help="longest time per output token"),
    ] = 50.0,
    kv_bytes: Annotated[
        int, typer.Option(callback=within(1, 8), help="bytes of a cached number")
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Peak tokens per second of a node by a roofline, and what bounds it."""
    from whalefall.plan.capacity_report import capacity_report, print_capacity

    report = capacity_report(
        model, hardware, prefill, decode, redundant, kv_length, prompt, hit_rate, tpot_ms, kv_bytes
    )
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    print_capacity(report)


@app.command()
def train(
    hours: Annotated[
        float, typer.Option(callback=within(0, 1e12, above=True), help="GPU-hours of pre-training")
    ] = 2.664e6,
    other_hours: Annotated[
        float, typer.Option(callback=HOURS, help="GPU-hours of the rest")
    ] = 0.124e6,
    gpu_hour: Annotated[float, typer.Option(callback=DOLLARS, help="$ per GPU-hour")] = 2.0,
    tokens: Annotated[
        float, typer.Option(callback=within(0, 1e21, above=True), help="tokens trained on")
    ] = 14.8e12,
    active: Annotated[
        float, typer.Option(callback=within(0, 1e18, above=True), help="active parameters")
    ] = 37e9,
    gpus: Annotated[int, typer.Option(callback=within(1, 1e9), help="GPUs at once")] = 2048,
    peak_tflops: Annotated[
        float, typer.Option(callback=within(0, 1e9, above=True), help="BF16 peak of a GPU")
    ] = 989.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What training costs: V3's published run, or another."""
    from whalefall.plan.training import TrainingRun

    run = TrainingRun(hours, other_hours, gpu_hour, tokens, active, peak_tflops)
    report = {
        "gpu_hours": run.total_hours,
        "cost": run.cost,
        "days": run.days(gpus),
        "tflops_gpu": run.tflops_gpu,
        "utilisation_of_bf16_peak": run.utilisation,
        "claimed_elsewhere": {"utilisation": 0.89},
    }
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    typer.echo(f"GPU-hours                      {run.total_hours:>14,.0f}")
    typer.echo(f"cost                           {f'${run.cost:,.0f}':>14}")
    typer.echo(f"days on {gpus:,} GPUs{'':{15 - len(f'{gpus:,}')}}{run.days(gpus):>17,.1f}")
    typer.echo(f"TFLOPS a GPU (6 ND)            {run.tflops_gpu:>14,.1f}")
    typer.echo(f"share of the BF16 peak         {run.utilisation:>14.1%}")
    typer.echo(
        "A utilisation of 89 % circulates; that is a claim, and these figures do not give it."
    )
