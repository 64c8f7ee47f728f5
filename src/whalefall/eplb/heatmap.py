"""Eplb room: the heat map of GPU loads, before and after, as one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path

import drawsvg
import numpy as np
import numpy.typing as npt

from whalefall.writing import write_text

__all__ = ["heat_map", "page"]

Floats = npt.NDArray[np.float64]
CELL_W, CELL_H, LEFT, TOP = 12, 9, 46, 26
WIDEST = 1200
# relative load 0, 0.5, 1, 1.5, ≥ 2: cold to hot, readable without red-green vision
STOPS = ((247, 251, 255), (158, 202, 225), (66, 146, 198), (253, 141, 60), (165, 15, 21))


def colour(relative: float) -> str:
    """The colour of a load given as a multiple of the mean."""
    place = min(max(relative, 0.0), 2.0) * 2
    low = min(int(place), len(STOPS) - 2)
    part = place - low
    mixed = (round(a + (b - a) * part) for a, b in zip(STOPS[low], STOPS[low + 1], strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def heat_map(loads_LG: Floats, title: str, of: str = "GPU") -> drawsvg.Drawing:
    """Draw loads [layers, GPUs]: one row a layer, one cell a GPU, coloured by load over mean.

    `of`: what the columns are.
    """
    layers, gpus = loads_LG.shape
    cell_w = min(CELL_W, WIDEST / gpus)
    mean = np.maximum(loads_LG.mean(1, keepdims=True), 1e-30)
    relative = np.where(loads_LG.sum(1, keepdims=True) > 0, loads_LG / mean, 1.0)
    drawing = drawsvg.Drawing(LEFT + gpus * cell_w + 10, TOP + layers * CELL_H + 22)
    drawing.append(drawsvg.Text(title, 13, LEFT, 15, font_family="sans-serif"))
    for layer in range(layers):
        y = TOP + layer * CELL_H
        if layer % 5 == 0:
            label = f"layer {layer}"
            drawing.append(
                drawsvg.Text(label, 8, LEFT - 4, y + 7, text_anchor="end", font_family="sans-serif")
            )
        for gpu in range(gpus):
            value = float(relative[layer, gpu])
            cell = drawsvg.Rectangle(
                LEFT + gpu * cell_w, y, cell_w - 0.5, CELL_H - 0.5, fill=colour(value)
            )
            cell.append_title(f"layer {layer}, {of} {gpu}: {value:.2f} x mean")
            drawing.append(cell)
    axis = f"{of} 0 … {gpus - 1}"
    drawing.append(
        drawsvg.Text(axis, 9, LEFT, TOP + layers * CELL_H + 14, font_family="sans-serif")
    )
    return drawing


def page(path: Path, before_LG: Floats, after_LG: Floats, names: tuple[str, str]) -> None:
    """Write the page with both maps and their utilisation (mean over largest load)."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>expert load</title>",
        "<style>body{font:14px sans-serif;margin:2em}</style><h1>Load of each GPU</h1>",
        "<p>Colour: load as a multiple of its layer's mean; "
        + " ".join(
            f'<span style="background:{colour(v)};padding:2px 8px;'
            f'color:{"#fff" if v in (1.0, 2.0) else "#000"}">{v:g}</span>'
            for v in (0, 0.5, 1.0, 1.5, 2.0)
        )
        + " (2 and above)</p>",
    ]
    for loads_LG, name in zip((before_LG, after_LG), names, strict=True):
        largest = loads_LG.max(1)
        used = np.where(largest > 0, loads_LG.mean(1) / np.maximum(largest, 1e-30), 1.0)
        title = (
            f"{name}: utilisation {used.mean():.1%} on average, {used.min():.1%} in the worst layer"
        )
        parts.append(f"<h2>{html.escape(title)}</h2>")
        parts.append(heat_map(loads_LG, name).as_svg(header=""))
    text = "\n".join(parts) + "\n</html>\n"
    write_text(path, text)
