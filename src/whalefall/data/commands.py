"""Make, sort and check the Sort Benchmark's records (GraySort)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; gone when the block ends."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(line, completed=done, total=total)


@app.command()
def gensort(
    count: Annotated[int, typer.Argument(metavar="N", help="how many records", min=0)],
    file: Annotated[str, typer.Argument(help="file to write")],
    ascii: Annotated[bool, typer.Option("--ascii", help="printable records")] = False,
    skewed: Annotated[bool, typer.Option("--skewed", help="keys that often begin alike")] = False,
    begin: Annotated[int, typer.Option(help="number of the first record", min=0)] = 0,
) -> None:
    """Write N records of 100 bytes with 10-byte keys; record i follows from i alone."""
    from whalefall.data.graysort import gensort as make

    with _bar("gensort") as watch:
        make(file, count, begin, ascii, skewed, watch)


@app.command()
def sort(
    source: Annotated[str, typer.Argument(metavar="IN", help="file of records")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="sorted file")],
    memory: Annotated[str, typer.Option(help="memory to use, e.g. 512MB; default half")] = "",
    temp_dir: Annotated[str, typer.Option(help="where to spill; default beside OUT")] = "",
    as_json: AsJson = False,
) -> None:
    """Sort a file of records by key, within the memory given."""
    import time

    from whalefall.data.config import parse_bytes
    from whalefall.data.graysort import RECORD_BYTES, sort_file

    begin = time.perf_counter()
    with _bar("sort") as watch:
        count = sort_file(
            source, target, parse_bytes(memory) if memory else None, temp_dir or None, watch
        )
    seconds = time.perf_counter() - begin
    rate = count * RECORD_BYTES / 1e6 / max(seconds, 1e-9)
    if as_json:
        typer.echo(json.dumps({"records": count, "seconds": seconds, "megabytes_per_s": rate}))
    else:
        typer.echo(f"{count:,} records in {seconds:.2f} s, {rate:,.0f} MB/s")


@app.command()
def valsort(
    files: Annotated[list[str], typer.Argument(help="files, in order")],
    as_json: AsJson = False,
) -> None:
    """Check that records are in order; print their number, checksum and duplicate keys.

    Exit status 1 where they are not in order.
    """
    from whalefall.data.graysort import valsort as check

    with _bar("valsort") as watch:
        found = check(files, watch)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "records": found.records,
                    "checksum": f"{found.checksum:x}",
                    "duplicates": found.duplicates,
                    "unordered": found.unordered,
                    "first_unordered": found.first_unordered,
                }
            )
        )
    else:
        typer.echo(f"Records: {found.records}")
        typer.echo(f"Checksum: {found.checksum:x}")
        typer.echo(f"Duplicate keys: {found.duplicates}")
        if found.ok:
            typer.echo("SUCCESS - all records are in order")
        else:
            typer.echo(f"First unordered record is record {found.first_unordered}")
            typer.echo(f"ERROR - there are {found.unordered} unordered records")
    if not found.ok:
        raise typer.Exit(1)
