"""What goes wrong while files are read, as one line with the file and what to do about it.

In: what DuckDB, Arrow or the operating system raised. Out: CorruptError for a file that does not
hold what it should, PlanError for a schema or column that was asked for wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from whalefall.data.errors import PlanError, SqlError
from whalefall.errors import CorruptError, WhalefallError

__all__ = ["condensed", "explained", "guarded", "reading", "remedy"]

# DuckDB's errors that are about the query, not about what is in the files.
OF_THE_QUERY = ("BinderException", "CatalogException", "ParserException", "SyntaxException")
OF_THE_MACHINE = ("OutOfMemory", "Interrupt")
# Hints for callers of DuckDB's own functions, which nobody calls here.
HINT = re.compile(r"possible (fixes|solutions)|column \S+ is being converted|try setting", re.I)
FILE = re.compile(r"^\s*file = (.*)$", re.M)


def condensed(text: str) -> str:
    """An error of DuckDB's as one line, without its hints and pictures."""
    kept = []
    for line in text.strip().splitlines():
        if not line.strip() or HINT.match(line.strip()):
            break
        kept.append(line.strip())
    file = FILE.search(text)
    shown = "; ".join(kept)
    return f"{shown}; file {file.group(1)}" if file and file.group(1) not in shown else shown


def remedy(dataset: Any) -> str:
    """What to do about a data set that cannot be read."""
    schema = getattr(dataset, "schema", None)
    if schema is not None:
        return f"mend the file, or the schema given: {schema}"
    columns = getattr(dataset, "columns", None)
    return f"the columns asked for are {columns}" if columns else "write it anew, or leave it out"


def place(paths: Sequence[str], text: str) -> str:
    """Which file an error is about: the one it names, or the only one."""
    named = [path for path in dict.fromkeys(paths) if path in text]
    if named or len(set(paths)) == 1:
        return named[0] if named else paths[0]
    return f"one of {len(paths)} files, such as {paths[0]}" if paths else "a query"


@contextmanager
def reading(dataset: Any) -> Iterator[None]:
    """Turn what a reader raises into our errors.

    Args:
        dataset: what is read: a data set, or the path of a file.
    Raises: CorruptError, PlanError; others' errors, such as the user's own, pass.
    """
    try:
        yield
    except Exception as error:
        kind = type(error)
        foreign = kind.__module__.split(".")[0] in ("duckdb", "_duckdb", "pyarrow")
        if isinstance(error, WhalefallError | MemoryError) or not (
            foreign or isinstance(error, OSError)
        ):
            raise
        if any(name in kind.__name__ for name in OF_THE_MACHINE):
            raise
        single = isinstance(dataset, str)
        where = place([dataset] if single else dataset.resolved_paths, str(error))
        text = condensed(str(error)).removesuffix(f"; file {where}") or kind.__name__
        wrong = PlanError if kind.__name__ in OF_THE_QUERY else CorruptError
        raise wrong(f"{where}: {text}; {remedy(dataset)}") from None


def guarded(items: Iterable[Any], dataset: Any) -> Iterator[Any]:
    """The items, read within `reading`."""
    iterator = iter(items)
    while True:
        with reading(dataset):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def explained(error: SqlError, inputs: Sequence[Any]) -> SqlError:
    """The error with what to do about a file that it names; else with what the inputs are."""
    head, _, query = str(error).partition("\n")
    for dataset in inputs:
        if any(path in head for path in dataset.resolved_paths):
            return SqlError(f"{head}; {remedy(dataset)}\n{query}")
    if any(f"{kind} Error" in head for kind in ("Binder", "Catalog", "Parser")):
        return error  # whatever the inputs are
    views = [f"__input_{i} is {d}" for i, d in enumerate(inputs) if f"__input_{i}" in query]
    return SqlError(f"{head}\n{query}" + (f"\nwhere {', '.join(views)}" if views else ""))
