"""DuckDB connections: threads, memory, spill folder, user functions and remote files.

In: limits. Out: a connection whose errors carry the query that failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from whalefall.data.errors import SqlError
from whalefall.data.paths import is_url

__all__ = ["connect", "execute", "register_remote"]


def connect(
    threads: int | None = None, memory_bytes: int | None = None, temp_dir: str | None = None
) -> Any:
    """An in-memory database.

    Args:
        threads: default DuckDB's own (all cores).
        memory_bytes: what buffers may take before they spill to `temp_dir`.
        temp_dir: where to spill; without one, a query above its memory fails.
    """
    import duckdb

    config: dict[str, Any] = {"temp_directory": temp_dir or "", "arrow_large_buffer_size": True}
    if threads:
        config["threads"] = threads
    if memory_bytes:
        config["memory_limit"] = f"{memory_bytes // 1000}KB"
    return duckdb.connect(":memory:", config=config)


def execute(conn: Any, query: str, where: str) -> Any:
    """Run a query to its end and return its rows.

    Raises: SqlError with the place, DuckDB's message and the query.
    """
    import duckdb

    try:
        return conn.execute(query).fetchall()
    except duckdb.Error as error:
        text = str(error).strip()
        raise SqlError(f"{where}: {text}\nin the query: {query}") from None


def register_remote(conn: Any, files: Iterable[str]) -> None:
    """Let the connection read the fsspec URLs among `files`."""
    seen = {"file"}
    for path in files:
        protocol = path.split("://", 1)[0] if is_url(path) else "file"
        if protocol not in seen:
            import fsspec  # takes longer to import than a small query to run

            seen.add(protocol)
            conn.register_filesystem(fsspec.core.url_to_fs(path)[0])
