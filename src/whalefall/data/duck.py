"""DuckDB connections: threads, memory, spill folder and remote files.

In: limits. Out: a connection; `execute` makes its errors carry the query that failed. A process has
one database for its tasks, since a new one costs a small query 15 to 40 ms of set-up, first-touched
memory and teardown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from whalefall.data.errors import PlanError, SqlError
from whalefall.data.paths import is_url
from whalefall.data.reading import condensed

__all__ = ["connect", "execute", "forget_remote", "register_remote", "task_cursor"]

_database: Any = None  # of this process; tasks run one at a time
_stores: dict[str, Any] = {}  # protocol → the file system that the running task reads by it


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


def task_cursor(threads: int, memory_bytes: int | None, temp_dir: str) -> Any:
    """A connection to the process's one database, whose limits become those given.

    Temporary views and tables are the connection's own; all else that a query creates or sets
    would be there for the next task, so whoever needs that takes `connect`.
    """
    import duckdb

    global _database
    if _database is not None:
        try:
            limit(_database, threads, memory_bytes, temp_dir)
        except duckdb.Error:  # it has spilled, which ties it to its folder
            _database.close()
            _database = None
    if _database is None:
        _database = connect(threads, memory_bytes, temp_dir)
        # the page cache holds files too, and gives memory back when another task wants it
        _database.execute("set enable_external_file_cache=false").fetchall()
    return _database.cursor()


def limit(conn: Any, threads: int, memory_bytes: int | None, temp_dir: str) -> None:
    """Set a database's threads, memory and spill folder."""
    memory = (
        f"set memory_limit='{memory_bytes // 1000}KB'" if memory_bytes else "reset memory_limit"
    )
    folder = temp_dir.replace("'", "''")
    for statement in (f"set temp_directory='{folder}'", f"set threads={threads}", memory):
        conn.execute(statement).fetchall()


def execute(conn: Any, query: str, where: str) -> Any:
    """Run a query to its end and return its rows.

    Raises: SqlError with the place, DuckDB's message and the query.
    """
    import duckdb

    try:
        return conn.execute(query).fetchall()
    except duckdb.Error as error:
        text = condensed(str(error))
        if "No space left" in text:
            text += "; free space there, or choose another data_root"
        raise SqlError(f"{where}: {text}\nin the query: {query}") from None


def register_remote(conn: Any, files: Iterable[str]) -> None:
    """Let the connection read the fsspec URLs among `files`.

    Raises: PlanError where a task reads two stores of one protocol (two `whalefall://` clusters):
        DuckDB knows a store by its protocol alone, and would read one in the place of the other.
    """
    for prefix, path in {prefix_of(path): path for path in files if is_url(path)}.items():
        import fsspec  # takes longer to import than a small query to run

        filesystem = fsspec.core.url_to_fs(path)[0]
        known = filesystem.protocol
        protocol = known if isinstance(known, str) else known[0]
        if protocol == "file":
            continue
        if not conn.filesystem_is_registered(protocol):
            conn.register_filesystem(filesystem)
            _stores[protocol] = filesystem
        elif _stores.get(protocol) is not filesystem:
            raise PlanError(f"{prefix}: the task reads another {protocol}:// store too; copy first")


def prefix_of(url: str) -> str:
    """Protocol and host of a URL."""
    return "/".join(url.split("/", 3)[:3])


def forget_remote() -> None:
    """Let the next task read other stores than the last one did."""
    for protocol in _stores:
        if _database is not None and _database.filesystem_is_registered(protocol):
            _database.unregister_filesystem(protocol)
    _stores.clear()
