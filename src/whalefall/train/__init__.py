"""Train: FP8 training of DeepSeek-V3-architecture models, pipeline × expert × data parallel.

Follows the V3 report's training framework: FP8 products in all three directions (`gemm`), experts
balanced by a bias, multi-token prediction, DualPipe and its relatives (`pipeline`), experts over
ranks (`ep`), data from records (`record`). A recipe is a TOML file; `run` trains it.
"""

from whalefall.train.checkpoint import read_tensors
from whalefall.train.data import write_rows, write_stream
from whalefall.train.export import export_checkpoint
from whalefall.train.history import draw_curves, read_history
from whalefall.train.job import run
from whalefall.train.products import Precision
from whalefall.train.rank import DivergedError, Rank, Report
from whalefall.train.recipe import Recipe, read_recipe
from whalefall.train.trainer import train

__all__ = [
    "DivergedError",
    "Precision",
    "Rank",
    "Recipe",
    "Report",
    "draw_curves",
    "export_checkpoint",
    "read_history",
    "read_recipe",
    "read_tensors",
    "run",
    "train",
    "write_rows",
    "write_stream",
]
