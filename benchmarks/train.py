"""Training: tokens a second against Transformers + PyTorch, and FP8's loss curve against fp32's.

Both sides train the bundled checkpoint's shape (without its MTP layer, which Transformers lacks) on
the same rows of this repository's own text, one process, AdamW, clipping, in turns.
`whalefall bench train` (`--quick`: fewer rounds and steps; `--curves`: the loss curves alone).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer

from whalefall.testing.benchmark import Row, interleave, save
from whalefall.train import Rank, draw_curves, read_recipe, write_stream
from whalefall.train.data import Rows
from whalefall.train.rank import set_threads

ROOT = Path(__file__).parents[1]
LENGTH, ROWS = 256, 4
# At a real rate Transformers' gate, which nothing balances, soon uses a few experts only; so both
# stay at their even start.
STILL = 1e-12
# glibc's defaults give freed activations back to the kernel; `whalefall train` sets these, too
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
CURVE = ROOT / "docs/images/train_curves.svg"


def text_rows(folder: Path) -> None:
    """This repository's pages and sources as token rows."""
    tokenizer = Tokenizer.from_file(str(ROOT / "src/whalefall/model/bundled/tokenizer.json"))
    paths = sorted([*ROOT.glob("docs/*.md"), *(ROOT / "src").rglob("*.py")])
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([path.read_text("utf-8") for path in paths]):
        ids += [*encoding.ids, 1]
    write_stream(folder / "text.ffr", np.array(ids, np.int32), LENGTH)


def recipe(
    folder: Path, steps: int, precision: str, mtp: bool, rate: float = 3e-3, seed: int = 0
) -> Any:
    """The bundled recipe, shortened, on this text."""
    path = ROOT / "recipes/bundled/recipe.toml"
    model = tomllib.loads(path.read_text("utf-8"))["model"]
    changes: dict[str, Any] = {
        "run.folder": str(folder / precision), "run.steps": steps, "run.precision": precision,
        "run.seed": seed, "run.threads": len(os.sched_getaffinity(0)), "parallel.data": 1,
        "data.source": [{"files": str(folder / "text.ffr"), "rows": ROWS}],
        "optimizer.warmup": 20, "optimizer.rate": rate, "optimizer.average": 0.0,
    }  # fmt: skip
    if not mtp:
        changes["model"] = model | {"num_nextn_predict_layers": 0}
    return read_recipe(path, changes)


@contextmanager
def one_rank() -> Iterator[Path]:
    """A group of this process alone, and a folder with the rows."""
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", f"file://{name}/meeting", rank=0, world_size=1)
        try:
            text_rows(Path(name))
            yield Path(name)
        finally:
            dist.destroy_process_group()


def ours(folder: Path, precision: str) -> Callable[[], object]:
    """A training step of ours, a new batch each time."""
    made = recipe(folder, 10**6, precision, mtp=False, rate=STILL)
    set_threads(made)
    return Rank(made).train_step


def theirs(experts: str, dtype: torch.dtype, rows: Rows) -> Callable[[], object]:
    """A plain loop over the same batches: model and loss, torch's autocast, AdamW, clipping."""
    raw = tomllib.loads((ROOT / "recipes/bundled/recipe.toml").read_text("utf-8"))["model"]
    config = transformers.DeepseekV3Config(
        **(raw | {"num_nextn_predict_layers": 0, "q_lora_rank": None})
    )
    config._experts_implementation = experts
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=STILL, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    numbers = itertools.count()

    def step() -> None:
        tokens = rows.batch(next(numbers)).tokens
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def speed(rounds: int) -> list[Row]:
    with one_rank() as folder:
        rows_of_text = Rows(recipe(folder, 10, "fp32", mtp=False))
        contenders: dict[str, Callable[[], object]] = {
            precision: ours(folder, precision) for precision in ("bf16", "fp8", "fp32")
        }
        peers = {
            f"{experts} {name}": theirs(experts, dtype, rows_of_text)
            for experts in ("eager", "grouped_mm")
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
        for name, step in list(peers.items()):
            try:
                step()
            except (RuntimeError, NotImplementedError) as error:
                print(f"Transformers, experts {name}: {str(error).splitlines()[0]}")
                del peers[name]
        took = interleave({**contenders, **peers}, rounds)
    tokens = ROWS * LENGTH
    rates = {name: tokens / timing.median_s for name, timing in took.items()}
    best = max(peers, key=rates.__getitem__)
    everything = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    version = f"Transformers {transformers.__version__} + torch {torch.__version__}"
    rows = []
    for precision, target in (("bf16", ">= 1.0x"), ("fp8", ""), ("fp32", "")):
        ratio = rates[precision] / rates[best]
        rows.append(
            Row(f"training step, bundled shape, {ROWS} x {LENGTH} tokens, {precision}",
                f"{version}, its fastest form ({best})", target, rates[precision], rates[best],
                "tokens/s", ratio, ratio >= 1.0 if target else None,
                everything if target else "")
        )  # fmt: skip
    return rows


def curve(folder: Path, steps: int, precision: str, seed: int) -> list[dict[str, Any]]:
    """The losses of one run; the seed draws the weights and the order of the rows."""
    made = recipe(folder, steps, precision, mtp=True, seed=seed)
    set_threads(made)
    rank = Rank(made)
    lines = []
    for _ in range(steps):
        report = rank.train_step()
        lines.append({"step": report.step, "loss": report.loss})
    print(
        f"{precision}, seed {seed}: {lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}", flush=True
    )
    return lines


def curves(steps: int, seeds: int) -> list[Row]:
    """Losses on the same rows, fp8 and bf16 against fp32, each seed's pair beside each other.

    Two runs that differ in rounding alone drift apart by about one per cent at this length, to
    either side; the mean over seeds is what can be compared, and its standard error is printed.
    """
    last = max(1, steps // 5)
    runs: dict[str, list[dict[str, Any]]] = {}
    ends: dict[str, list[float]] = {"fp32": [], "bf16": [], "fp8": []}
    with one_rank() as folder:
        for seed in range(seeds):
            for precision, means in ends.items():
                if precision == "bf16" and seed:  # no target hangs on it
                    continue
                lines = curve(folder, steps, precision, seed)
                runs.setdefault(precision, lines)
                means.append(statistics.fmean(line["loss"] for line in lines[-last:]))
    CURVE.parent.mkdir(exist_ok=True)
    draw_curves(runs, CURVE, f"Loss of {steps} steps, the same rows, seed 0")
    rows = []
    for precision in ("fp8", "bf16"):
        pairs = list(zip(ends[precision], ends["fp32"], strict=False))
        apart = [100 * (x / y - 1) for x, y in pairs]
        mean, count, reached = statistics.fmean(apart), len(apart), None
        error = statistics.stdev(apart) / count**0.5 if count > 1 else math.nan
        if precision == "fp8":
            reached = abs(mean) <= 0.5
        each = ", ".join(f"{x:+.2f}" for x in apart)
        rows.append(
            Row(f"{precision}: loss, mean of the last {last} of {steps} steps, {count} seeds",
                "the same in fp32", "within 0.5 %" if precision == "fp8" else "",
                *(statistics.fmean(side) for side in zip(*pairs, strict=True)), "nats",
                1 / (1 + mean / 100), reached,
                f"{mean:+.2f} %" + f" with a standard error of {error:.2f} ({each})" * (count > 1))
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--curves", action="store_true", help="only the loss curves")
    parser.add_argument("--speed", action="store_true", help="only the speed")
    parser.add_argument("--steps", type=int, default=80, help="of each loss curve")
    parser.add_argument("--seeds", type=int, default=8, help="of the loss curves")
    args = parser.parse_args()
    if not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], os.environ | MALLOC)
    rows: list[Row] = []
    if not args.curves:
        rows += speed(3 if args.quick else 9)
    if not args.speed:
        rows += curves(*((30, 2) if args.quick else (args.steps, args.seeds)))
    if not args.quick:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        save("train", [*rows, *other_half(rows)], versions)
    else:
        print(*rows, sep="\n")


def other_half(rows: list[Row]) -> list[Row]:
    """Rows measured earlier by `--speed` or `--curves` that this run did not measure."""
    path = ROOT / "docs/benchmarks/train.json"
    if not path.exists():
        return []
    earlier = [Row(**row) for row in json.loads(path.read_text("utf-8"))["rows"]]
    return [row for row in earlier if row.unit not in {row.unit for row in rows}]


if __name__ == "__main__":
    main()
