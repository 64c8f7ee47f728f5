"""Figures about matrix products: why sums are two-level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from whalefall import charts
from whalefall.writing import write_text

app = typer.Typer(add_completion=False, no_args_is_help=True)
KS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@app.callback()
def main() -> None:
    """Figures about matrix products."""


@app.command()
def accumulation(
    svg: Annotated[Path | None, typer.Option(help="write the curves to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the points as JSON")] = False,
) -> None:
    """Error against K of one level of FP8 accumulation (emulated) and of two."""
    from whalefall.gemm.accumulation import errors_against_k

    points = errors_against_k(KS)
    if svg is not None:
        chart = charts.pygal().XY(
            js=[],  # a picture, not a page
            logarithmic=True,
            x_title="K",
            y_title="relative error (rms)",
            height=420,
            width=720,
        )
        chart.title = "FP8 products: sums kept to 14 bits, and promoted to fp32 each 128 of K"
        chart.x_labels = KS
        chart.add("one level (emulated)", [(p.k, p.one_level) for p in points])
        chart.add("two levels", [(p.k, p.two_level) for p in points])
        write_text(svg, chart.render(disable_xml_declaration=True))
    if as_json:
        typer.echo(json.dumps([p._asdict() for p in points]))
        return
    typer.echo(f"{'K':>6} {'one level':>10} {'two levels':>10} {'times':>6}")
    for p in points:
        times = p.one_level / p.two_level
        typer.echo(f"{p.k:>6} {p.one_level:>10.1e} {p.two_level:>10.1e} {times:>6.0f}")
