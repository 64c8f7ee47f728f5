"""User functions in SQL: their types, the `@udf` decorator, and binding them to a connection.

Source: smallpond `logical.udf`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from whalefall.errors import ConfigError, MissingError

__all__ = [
    "DuckDbExtensionContext",
    "ExternalModuleContext",
    "PythonUDFContext",
    "UDFAnyParameters",
    "UDFContext",
    "UDFListType",
    "UDFMapType",
    "UDFStructType",
    "UDFType",
    "UserDefinedFunction",
    "udf",
]


class UDFType(Enum):
    """DuckDB's plain types."""

    SQLNULL = "NULL"
    BOOLEAN = "BOOLEAN"
    TINYINT = "TINYINT"
    UTINYINT = "UTINYINT"
    SMALLINT = "SMALLINT"
    USMALLINT = "USMALLINT"
    INTEGER = "INTEGER"
    UINTEGER = "UINTEGER"
    BIGINT = "BIGINT"
    UBIGINT = "UBIGINT"
    HUGEINT = "HUGEINT"
    UUID = "UUID"
    FLOAT = "FLOAT"
    DOUBLE = "DOUBLE"
    DATE = "DATE"
    TIMESTAMP = "TIMESTAMP"
    TIMESTAMP_MS = "TIMESTAMP_MS"
    TIMESTAMP_NS = "TIMESTAMP_NS"
    TIMESTAMP_S = "TIMESTAMP_S"
    TIME = "TIME"
    TIME_TZ = "TIME WITH TIME ZONE"
    TIMESTAMP_TZ = "TIMESTAMP WITH TIME ZONE"
    VARCHAR = "VARCHAR"
    BLOB = "BLOB"
    BIT = "BIT"
    INTERVAL = "INTERVAL"

    def to_duckdb_type(self) -> str:
        """The type's name in SQL."""
        return str(self.value)


@dataclass(frozen=True)
class UDFListType:
    """A list of `child`."""

    child: Any

    def to_duckdb_type(self) -> str:
        """The type's name in SQL."""
        return f"{self.child.to_duckdb_type()}[]"


class UDFStructType:
    """A struct: field name → type."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)

    def to_duckdb_type(self) -> str:
        """The type's name in SQL."""
        inner = ", ".join(f'"{name}" {t.to_duckdb_type()}' for name, t in self.fields.items())
        return f"STRUCT({inner})"


@dataclass(frozen=True)
class UDFMapType:
    """A map from `key` to `value`."""

    key: Any
    value: Any

    def to_duckdb_type(self) -> str:
        """The type's name in SQL."""
        return f"MAP({self.key.to_duckdb_type()}, {self.value.to_duckdb_type()})"


class UDFAnyParameters:
    """Any number of arguments of any types."""

    def to_duckdb_type(self) -> None:
        """None: DuckDB's sign for any arguments."""


class UDFContext:
    """Something that a SQL task's connection needs before its query runs."""

    name: str

    def bind(self, conn: Any) -> None:
        """Make it known to the connection."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class PythonUDFContext(UDFContext):
    """A Python function."""

    name: str
    func: Callable[..., Any]
    params: Any
    return_type: Any
    use_arrow_type: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{inspect.getmodule(self.func)}"

    def bind(self, conn: Any) -> None:
        if self.params is None or isinstance(self.params, UDFAnyParameters):
            params = None
        else:
            params = [_duckdb_type(p) for p in self.params]
        kind = {"type": "arrow"} if self.use_arrow_type else {}
        returns = _duckdb_type(self.return_type) if self.return_type is not None else None
        conn.create_function(self.name, self.func, params, returns, **kind)


def _duckdb_type(item: Any) -> Any:
    return item.to_duckdb_type() if hasattr(item, "to_duckdb_type") else item


@dataclass(frozen=True)
class ExternalModuleContext(UDFContext):
    """A module file whose `@udf` functions are all bound."""

    name: str
    module_path: str

    def __str__(self) -> str:
        return f"{self.name}@{self.module_path}"

    def bind(self, conn: Any) -> None:
        spec = importlib.util.spec_from_file_location(self.name, self.module_path)
        if spec is None or spec.loader is None:
            raise MissingError(f"udf module {self.module_path}: no such Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        functions = [v for v in vars(module).values() if isinstance(v, UserDefinedFunction)]
        if not functions:
            raise ConfigError(f"udf module {self.module_path}: no function with the @udf decorator")
        for function in functions:
            function.context().bind(conn)


@dataclass(frozen=True)
class DuckDbExtensionContext(UDFContext):
    """A DuckDB extension file."""

    name: str
    extension_path: str

    def __str__(self) -> str:
        return f"{self.name}@{self.extension_path}"

    def bind(self, conn: Any) -> None:
        conn.load_extension(self.extension_path)


@dataclass(frozen=True)
class UserDefinedFunction:
    """A Python function with its SQL types: what `@udf` makes."""

    name: str
    func: Callable[..., Any]
    params: Any
    return_type: Any
    use_arrow_type: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)

    def context(self) -> PythonUDFContext:
        """What binds it to a connection."""
        return PythonUDFContext(
            self.name, self.func, self.params, self.return_type, self.use_arrow_type
        )


def udf(
    params: Sequence[Any], return_type: Any, use_arrow_type: bool = False, name: str | None = None
) -> Callable[[Callable[..., Any]], UserDefinedFunction]:
    """Decorate a function for use in SQL.

    Args:
        params: `UDFType`s of the arguments.
        return_type: the result's.
        use_arrow_type: it takes and returns Arrow arrays.
        name: in SQL; default the function's own.
    """

    def wrap(func: Callable[..., Any]) -> UserDefinedFunction:
        return UserDefinedFunction(name or func.__name__, func, params, return_type, use_arrow_type)

    return wrap
