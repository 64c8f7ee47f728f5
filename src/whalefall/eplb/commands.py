"""Place experts and their replicas on GPUs, and show the load of each.

`whalefall eplb plan LOADS`: reads loads, prints the balance, writes the placement and a heat map.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from whalefall.errors import CorruptError, MissingError, ShapeError
from whalefall.writing import write_text

app = typer.Typer(add_completion=False)
WANTED = "wanted rows of equal length, one a layer: .npy, .json or .csv"


@app.callback()
def main() -> None:
    """Place experts and their replicas on GPUs, and show the load of each."""


def read_array(path: Path, what: str, key: str) -> npt.NDArray[Any]:
    """An array from .npy (never pickled), .json (rows, or an object with them at `key`) or .csv."""
    if not path.is_file():
        raise MissingError(f"eplb: no file {path} for the {what}")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                if key not in found:
                    there = ", ".join(map(repr, found)) or "none"
                    raise ValueError(f"the object has no key {key!r}; its keys: {there:.200}")
                found = found[key]
            return np.array(found, dtype=np.float64)
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("the file is empty")
        return np.loadtxt(io.StringIO(text), delimiter=",", ndmin=2)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise CorruptError(f"eplb: cannot read the {what} in {path}: {error}; {WANTED}") from None
    except RecursionError:
        raise CorruptError(
            f"eplb: cannot read the {what} in {path}: it nests too deeply; {WANTED}"
        ) from None


def in_order(experts: int, gpus: int) -> npt.NDArray[np.int64]:
    """Experts without replicas, in order over the GPUs: [slots], the placement one starts from.

    Where they do not divide, the slots left over repeat the first experts.
    """
    per_gpu = -(-experts // gpus)
    return np.resize(np.arange(experts), per_gpu * gpus)


@app.command()
def plan(
    loads: Annotated[Path, typer.Argument(help="tokens per expert: .npy, .json or .csv")],
    replicas: Annotated[int, typer.Option(help="slots per layer, all GPUs together")],
    gpus: Annotated[int, typer.Option(help="GPUs in all nodes together")],
    groups: Annotated[int, typer.Option(help="expert groups of the gate")] = 1,
    nodes: Annotated[int, typer.Option(help="hosts")] = 1,
    previous: Annotated[Path | None, typer.Option(help="a placement to start from")] = None,
    max_moves: Annotated[int | None, typer.Option(help="with --previous: moves a layer")] = None,
    balance: Annotated[float, typer.Option(help="with --previous: stop at mean/max load")] = 0.99,
    split: Annotated[str, typer.Option(help="equal, or best: weighted replicas")] = "equal",
    output: Annotated[Path | None, typer.Option(help="write the placement as JSON")] = None,
    html: Annotated[Path | None, typer.Option(help="write a heat map, before and after")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Plan a placement for measured loads."""
    from whalefall.eplb.placement import gpu_loads, rebalance

    weight = read_array(loads, "loads", "weight")
    if weight.ndim == 1:
        weight = weight[None]
    old = None
    if previous is not None:
        old = read_array(previous, "previous placement", "phy2log")
    placement = rebalance(
        weight, replicas, groups, nodes, gpus,
        previous=old, max_moves=max_moves, balance=balance, split=split,
    )  # fmt: skip
    start = np.tile(in_order(weight.shape[1], gpus), (len(weight), 1)) if old is None else old
    before = gpu_loads(weight, start, gpus)
    after = gpu_loads(weight, placement.phy2log, gpus, placement.share)
    used_before = float(np.mean(used(before)))
    bound = np.divide(
        placement.mean, placement.bound, out=np.ones_like(placement.mean), where=placement.bound > 0
    )
    facts = {
        "layers": len(weight),
        "experts": weight.shape[1],
        "utilisation_before": used_before,
        "utilisation": float(placement.balance.mean()),
        "worst_layer": float(placement.balance.min()),
        "possible_with_equal_shares": float(bound.mean()),
        "moves": int(placement.moves.sum()),
    }
    if output is not None:
        arrays = {name: getattr(placement, name).tolist() for name in ARRAYS}
        write_text(output, json.dumps({**facts, **arrays}) + "\n")
    if html is not None:
        from whalefall.eplb.heatmap import page

        name = "before: experts in order, no replicas" if old is None else "before"
        page(html, before, after, (name, "after"))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):28} {value:.1%}" if isinstance(value, float)
                   else f"{name.replace('_', ' '):28} {value}")  # fmt: skip


ARRAYS = ("phy2log", "log2phy", "logcnt", "share", "load", "bound")


def used(loads_LG: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[layers] mean over largest GPU load."""
    if loads_LG.ndim != 2:
        raise ShapeError(f"eplb: loads of GPUs have shape {loads_LG.shape}")
    largest = loads_LG.max(1)
    return np.divide(loads_LG.mean(1), largest, out=np.ones_like(largest), where=largest > 0)
