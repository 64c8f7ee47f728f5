"""SQL order items as DuckDB's parser reads them, and the key whose byte order is theirs.

DuckDB's `create_sort_key` takes expressions and directions but no collation, so a collation becomes
the functions by which DuckDB itself orders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from whalefall.data.errors import PlanError

__all__ = ["OrderItem", "parse_order", "sort_key"]

# Collation → SQL of what is compared; any other is one of ICU's.
FOLDS = {
    "nocase": "lower({})", "noaccent": "strip_accents({})", "nfc": "nfc_normalize({})",
    "binary": "{}", "posix": "{}", "c": "{}",
}  # fmt: skip
WAYS = {"DESCENDING": "desc"}


@dataclass(frozen=True)
class OrderItem:
    """One expression to order by.

    Attributes:
        expression: SQL, without collation.
        way: asc or desc.
        nulls: first or last.
        collation: as DuckDB writes it ("nocase.noaccent"); empty for bytes.
    """

    expression: str
    way: str = "asc"
    nulls: str = "last"
    collation: str = ""

    @property
    def compared(self) -> str:
        """SQL of the value that is compared."""
        made = self.expression
        for name in reversed(self.collation.lower().split(".") if self.collation else []):
            made = FOLDS.get(name, f"icu_collate_{name}({{}})").format(made)
        return made


def parse_order(items: Sequence[str]) -> list[OrderItem]:
    """The order items of an ORDER BY list, of which a text may hold several.

    Raises: PlanError for what is no list of order items, and for items that name columns without
        saying which (`ALL`, `COLUMNS(…)`, a column's place) or collate within an expression.
    """
    import duckdb

    text = ", ".join(items)
    with duckdb.connect() as conn:

        def call(function: str, value: str) -> Any:
            return conn.execute(f"select {function}(?)", [value]).fetchall()[0][0]

        query = json.loads(call("json_serialize_sql", f"select * from t order by {text}"))
        if query["error"]:
            raise PlanError(f"sort: {text!r}: {query['error_message'].splitlines()[0]}")
        node = query["statements"][0]["node"]
        orders = [order for modifier in node["modifiers"] for order in modifier.get("orders", ())]
        if len(query["statements"]) > 1 or len(node["modifiers"]) > 1:
            raise PlanError(f"sort: {text!r}, wanted only order items")
        node["modifiers"] = []
        made = []
        for order in orders:
            parsed, collation = order["expression"], ""
            if parsed["class"] == "COLLATE":
                parsed, collation = parsed["child"], parsed["collation"]
            node["select_list"] = [parsed]
            sql = call("json_deserialize_sql", json.dumps(query))
            sql = sql.removeprefix("SELECT ").removesuffix(" FROM t")
            _check(parsed, sql, text)
            way = WAYS.get(order["type"], "asc")
            nulls = "first" if order["null_order"] == "NULLS FIRST" else "last"
            made.append(OrderItem(sql, way, nulls, collation))
    return made


def _check(parsed: dict[str, Any], sql: str, text: str) -> None:
    classes = set(_classes(parsed))
    if "STAR" in classes:
        raise PlanError(f'sort: {text!r} with partitions: name the columns, such as "a, b desc"')
    if parsed["class"] == "CONSTANT":
        raise PlanError(f"sort: {sql!r} is no column: with partitions, name the column")
    if "COLLATE" in classes:
        raise PlanError(f"sort: {sql!r} with partitions: collate the whole item, `(…) collate c`")


def _classes(parsed: Any) -> Iterator[str]:
    """The classes of all expressions within one."""
    if isinstance(parsed, dict):
        if isinstance(parsed.get("class"), str):
            yield parsed["class"]
        parsed = list(parsed.values())
    if isinstance(parsed, list):
        for item in parsed:
            yield from _classes(item)


def sort_key(items: Sequence[OrderItem]) -> str:
    """The SQL expression of a BLOB whose byte order is the order of `items`."""
    parts = [f"{item.compared}, '{item.way} nulls {item.nulls}'" for item in items]
    return f"create_sort_key({', '.join(parts)})"
