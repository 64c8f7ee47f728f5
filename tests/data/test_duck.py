"""A process's one database: tasks share it, and leave nothing in it for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from whalefall.data import Session, duck
from whalefall.data.errors import PlanError
from whalefall.data.udf import UDFType

BIG_SORT = (
    "select count(*) from (select hash(i) k, repeat(md5(i::varchar), 4) s "
    "from range(600000) t(i) order by k, s limit 590000)"
)


@pytest.fixture(autouse=True)
def no_database() -> Iterator[None]:
    """The test's process starts and ends without one."""
    yield
    duck.forget_remote()
    if duck._database is not None:
        duck._database.close()
        duck._database = None


def setting(conn: object, name: str) -> object:
    return duck.execute(conn, f"select current_setting('{name}')", "test")[0][0]


def test_limits_are_each_tasks_own(tmp_path: Path) -> None:
    first = duck.task_cursor(1, 64_000_000, str(tmp_path / "a"))
    assert setting(first, "threads") == 1 and setting(first, "memory_limit") == "61.0 MiB"
    database = duck._database
    second = duck.task_cursor(2, 128_000_000, str(tmp_path / "b'c"))
    assert setting(second, "threads") == 2 and setting(second, "memory_limit") == "122.0 MiB"
    assert setting(second, "temp_directory") == str(tmp_path / "b'c")
    assert duck._database is database


def test_temporary_views_are_a_cursors_own(tmp_path: Path) -> None:
    first = duck.task_cursor(1, None, str(tmp_path))
    first.execute("create or replace temp view __input_0 as select 1 as x")
    second = duck.task_cursor(1, None, str(tmp_path))
    second.execute("create or replace temp view __input_0 as select 2 as x")
    assert duck.execute(first, "from __input_0", "test") == [(1,)]
    assert duck.execute(second, "from __input_0", "test") == [(2,)]


def test_a_database_that_spilled_is_left_with_its_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cursor = duck.task_cursor(1, 48_000_000, str(tmp_path / name))
        assert duck.execute(cursor, BIG_SORT, "test") == [(590_000,)]
        assert setting(cursor, "temp_directory") == str(tmp_path / name)
        cursor.close()
    assert list((tmp_path / "a").iterdir()) == []  # what it spilled went with it


def test_stores_are_known_for_one_task_only(tmp_path: Path) -> None:
    cursor = duck.task_cursor(1, None, str(tmp_path))
    duck.register_remote(cursor, ["memory://x/a", "memory://x/b", "/local", "file:///c"])
    assert cursor.list_filesystems() == ["memory"]
    other = fsspec.filesystem("memory", skip_instance_cache=True)
    duck._stores["memory"] = other
    with pytest.raises(PlanError, match="memory://x: the task reads another memory:// store too"):
        duck.register_remote(cursor, ["memory://x/a"])
    duck.forget_remote()
    assert cursor.list_filesystems() == []
    duck.register_remote(cursor, ["memory://x/a"])


def times(factor: int) -> Callable[[int], int]:
    return lambda x: x * factor


def test_tables_and_functions_of_one_task_are_not_the_nexts(sp: Session) -> None:
    frame = sp.from_items([1, 2, 3, 4]).repartition(4, by_rows=True)  # two or more a worker
    queries = ["create table mine as select item from {0}", "select item * 2 as x from mine"]
    made = sp.partial_sql(queries, frame)
    assert [row["x"] for row in made.take_all()] == [2, 4, 6, 8]
    for factor in (10, 100):
        name = sp._ctx.create_function("scaled", times(factor), [UDFType.BIGINT], UDFType.BIGINT)
        rows = frame.map("scaled(item) as x", udfs=[name]).take_all()
        assert [row["x"] for row in rows] == [factor * i for i in (1, 2, 3, 4)]
    settings = ["set threads = 7", "select current_setting('threads') as n from {0}"]
    sp.partial_sql(settings, frame).compute()
    now = frame.map("current_setting('threads') as n").take_all()
    assert {row["n"] for row in now} == {1}
