"""Compile kernels ahead of time, or empty the cache of compiled kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from whalefall import env

app = typer.Typer(add_completion=False, no_args_is_help=True)
PUBLISHED_HEADS = 128  # of DeepSeek-V3; one unit serves 8 heads and more


@app.command()
def clear() -> None:
    """Delete every compiled kernel of the cache, and what ended compilations left."""
    from whalefall.jit.compile import clear as clear_cache

    libraries, left = clear_cache()
    more = f" and {left} files that ended compilations left" if left else ""
    typer.echo(f"deleted {libraries} compiled kernels{more}")


@app.command()
def warm(
    model: Annotated[
        Path | None, typer.Option(help="a checkpoint folder (default: the bundled model)")
    ] = None,
) -> None:
    """Compile what serving needs, for the best level of this machine."""
    from whalefall.jit.compiler import compiler
    from whalefall.model.config import load_config
    from whalefall.serve.commands import bundled_path

    compiler()  # without one, some units would be numpy's
    for name, compile_it in units(load_config(model or bundled_path()).num_heads):
        start = time.perf_counter()
        compile_it()
        typer.echo(f"{name:28} {time.perf_counter() - start:5.1f} s")
    typer.echo(f"compiled kernels are in {env.cache_dir('jit')}")


def units(heads: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `whalefall serve` loads, whatever its options: a name, and the call that builds it.

    Args:
        heads: query heads of the model.
    """
    from whalefall.comm.library import library as bytes_library
    from whalefall.engine.sampling import library as sampling_library
    from whalefall.ep.library import library as exchange_library
    from whalefall.ep.routing import library as routing_library
    from whalefall.gemm.native_calls import library as gemm_library
    from whalefall.jit import machine
    from whalefall.model.step_library import library as step_library

    yield "pool and measurements", machine.limits
    yield "linear layers and experts", gemm_library
    yield "model step", step_library
    yield "routing", routing_library
    yield "sampling", sampling_library
    for count in sorted({heads, PUBLISHED_HEADS}):
        yield f"attention of {count} heads", partial(_attention, count)
    yield "prefix cache and frames", bytes_library
    yield "exchange between units", exchange_library


def _attention(heads: int) -> None:
    from whalefall.attention.native_calls import paged_entry
    from whalefall.attention.structs import TYPES

    for cache in ("bfloat16", "float32", "fp8"):  # what --kv offers
        for bf16_q in (True, False):  # False: --compute fp32
            paged_entry(TYPES[cache], heads, bf16_q)
