"""Python row functions as batch functions: what `map`, `flat_map` and `filter` give to a node.

Types come from the schema that the caller gives, else from the values of the batch (all of them, so
that a None in the first row does no harm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whalefall.data.errors import TaskFailed

__all__ = ["BatchCall", "RowFilter", "RowMap"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowMap:
    """Stream function: each row to one row, or to several where `flat`."""

    function: Callable[[dict[str, Any]], Any]
    flat: bool
    schema: Any = None

    def __call__(self, runtime_ctx: Any, readers: Sequence[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for batch in readers[0]:
            rows = list(self._rows(batch.to_pylist()))
            if rows or self.schema is not None:
                yield pa.Table.from_pylist(rows, schema=self.schema or row_schema(rows))

    def _rows(self, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
        for row in rows:
            made = self.function(row)
            if not self.flat:
                yield self._checked(made)
                continue
            if isinstance(made, Mapping) or not isinstance(made, Iterable):
                raise TaskFailed(
                    f"flat_map: the function returned {made!r}, wanted an iterable of dicts"
                )
            for item in made:
                yield self._checked(item)

    def _checked(self, made: Any) -> Row:
        if not isinstance(made, Mapping):
            kind = "flat_map" if self.flat else "map"
            raise TaskFailed(f"{kind}: the function returned {made!r}, wanted a dict of columns")
        if self.schema is not None and (extra := made.keys() - set(self.schema.names)):
            raise TaskFailed(
                f"map: the function returned {sorted(extra)}, not in the schema given: "
                f"{self.schema.names}"
            )
        return made


def row_schema(rows: Sequence[Row]) -> Any:
    """The schema of all columns that a row has, each typed by all rows' values."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


@dataclass(frozen=True)
class RowFilter:
    """Stream function: keeps the rows for which the function is true."""

    function: Callable[[dict[str, Any]], Any]

    def __call__(self, runtime_ctx: Any, readers: Sequence[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for batch in readers[0]:
            keep = pa.array([bool(self.function(row)) for row in batch.to_pylist()], pa.bool_())
            yield pa.Table.from_batches([batch]).filter(keep)
        yield readers[0].schema.empty_table()


@dataclass(frozen=True)
class BatchCall:
    """Batch function: `function(Table)` → Table."""

    function: Callable[[Any], Any]

    def __call__(self, runtime_ctx: Any, tables: Sequence[Any]) -> Any:
        return self.function(tables[0])
