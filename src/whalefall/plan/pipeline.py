"""Plan room: `whalefall plan pipeline`, which schedule trains fastest on given ranks.

In: stage or layer times, ranks, chunks, a memory limit. Out: a table of simulated schedules beside
the published formulas, and a timeline as SVG. The work is `whalefall.pipeline.planning`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from whalefall.errors import ConfigError, MissingError
from whalefall.options import within
from whalefall.pipeline.planning import Candidate, Layer, Workload, plan, uniform
from whalefall.pipeline.schedules import theory

__all__ = ["pipeline"]

TIME = within(0, 1e12)


def pipeline(
    ranks: Annotated[
        int, typer.Option(callback=within(1, 512), help="devices of the pipeline")
    ] = 8,
    chunks: Annotated[
        int, typer.Option(callback=within(1, 4096), help="micro-batches of a step")
    ] = 20,
    forward: Annotated[
        float, typer.Option(callback=TIME, help="time of a layer's forward of one chunk")
    ] = 1.0,
    backward: Annotated[float, typer.Option(callback=TIME, help="time of its full backward")] = 2.0,
    weight: Annotated[float, typer.Option(callback=TIME, help="its weight-gradient part")] = 1.0,
    overlapped: Annotated[
        float, typer.Option(callback=within(0, 1e3), help="overlapped F&B as a share of F + B")
    ] = 1.0,
    communication: Annotated[float, typer.Option(callback=TIME, help="time of one message")] = 0.0,
    num_layers: Annotated[
        int, typer.Option(callback=within(0, 4096), help="equal layers (default: 2 a rank)")
    ] = 0,
    layers: Annotated[
        Path | None,
        typer.Option(
            help="JSON: a list of {f, b, w, parameters, activations}, instead of equal layers"
        ),
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(callback=within(0, 1e18), help="of a rank, in the file's unit")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="draw the schedules here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Simulate every pipeline schedule, cut the layers into stages, say which is fastest."""
    if forward + backward == 0 or weight > backward:
        raise ConfigError(
            f"plan pipeline: --forward {forward:g} --backward {backward:g} --weight {weight:g}, "
            "wanted times above 0 and a weight part within the backward"
        )
    if overlapped * (forward + backward) < max(forward, backward):
        raise ConfigError(
            f"plan pipeline: --overlapped is {overlapped:g}, wanted at least "
            f"{max(forward, backward) / (forward + backward):.3g}: F&B is no shorter than B or F"
        )
    costs = uniform(num_layers or 2 * ranks, forward, backward, weight)
    if layers is not None:
        costs = read_layers(layers)
    work = Workload(costs, ranks, chunks, overlapped, communication, memory_limit)
    found = plan(work)
    if svg is not None:
        draw(found, svg)
    rows = [row(work, candidate) for candidate in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(
        f"{'schedule':12} {'step':>10} {'idle':>7} {'bubble':>9} {'formula':>9} {'memory':>10}"
    )
    for one in rows:
        formula = "–" if one["formula_bubble"] is None else f"{one['formula_bubble']:.4g}"
        fits = "" if one["fits"] else "  does not fit"
        typer.echo(
            f"{one['schedule']:12} {one['step']:10.5g} {one['idle']:7.1%} {one['bubble']:9.4g} "
            f"{formula:>9} {one['memory']:10.5g}  layers {one['layers_per_stage']}{fits}"
        )


def read_layers(path: Path) -> list[Layer]:
    """Layers from a JSON file; MissingError or ConfigError with the entry that is wrong."""
    if not path.is_file():
        raise MissingError(f"plan pipeline: no file {path}")
    try:
        found = [Layer(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"plan pipeline: {path}: {error}; wanted [{{f, b, w, parameters, activations}}, …]"
        ) from None
    for number, layer in enumerate(found):
        if min(layer.f, layer.w, layer.b - layer.w, layer.parameters, layer.activations) < 0:
            raise ConfigError(
                f"plan pipeline: layer {number} of {path} has negative costs: {layer}"
            )
    return found


def row(work: Workload, candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain numbers; the formula where the layers are equal and cut evenly."""
    schedule = candidate.schedule
    first = work.layers[0]
    even = len(set(candidate.cut)) == 1 and all(layer == first for layer in work.layers)
    bubble = None
    if even and schedule.name != "interleaved":
        f, b, w = (x * candidate.cut[0] for x in (first.f, first.b, first.w))
        bubble = theory(
            schedule.name, schedule.num_stages, f, b, w, work.overlapped * (f + b)
        ).bubble
    return {
        "schedule": schedule.name,
        "step": candidate.step,
        "idle": candidate.idle,
        "bubble": max(candidate.result.idle),
        "formula_bubble": bubble,
        "activations": max(candidate.result.live),
        "memory": candidate.memory,
        "fits": candidate.fits,
        "layers_per_stage": list(candidate.cut),
    }


def draw(found: list[Candidate], path: Path) -> None:
    """The candidates' timelines as one SVG."""
    from whalefall.pipeline import timeline

    if not path.parent.is_dir():
        raise MissingError(f"plan pipeline: no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise ConfigError(f"plan pipeline: --svg {path} is a folder, wanted a file")
    panels = [
        timeline.of_result(f"{c.schedule.name}: step {c.step:.5g}, idle {c.idle:.1%}", c.result)
        for c in found
    ]
    timeline.write(panels, path)
