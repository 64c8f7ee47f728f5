"""Plans made by hand: function nodes, nested partitions, named outputs, sinks, the Driver."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from whalefall.data import fingerprint
from whalefall.data.driver import Driver, execute_plan
from whalefall.data.errors import PlanError, TaskFailed
from whalefall.data.memory import ArrowTableDataSet
from whalefall.data.nodes import (
    ArrowComputeNode,
    ArrowStreamNode,
    ConsolidateNode,
    Context,
    DataSetPartitionNode,
    DataSinkNode,
    DataSourceNode,
    EvenlyDistributedPartitionNode,
    HashPartitionNode,
    LimitNode,
    LoadPartitionedDataSetNode,
    PandasBatchNode,
    ProjectionNode,
    PythonScriptNode,
    RangePartitionNode,
    RootNode,
    SqlEngineNode,
    UnionNode,
    UserDefinedPartitionNode,
)
from whalefall.data.optimizer import optimize
from whalefall.data.parquet import ParquetDataSet
from whalefall.data.plan import LogicalPlan
from whalefall.data.planner import ExecutionPlan, Planner
from whalefall.data.runtime import JobId, RuntimeContext
from whalefall.data.tasks.arrow import ArrowComputeTask, StreamOutput


@pytest.fixture
def ctx(tmp_path: Path) -> RuntimeContext:
    made = RuntimeContext(JobId.new(), datetime.now(), str(tmp_path / "jobs"))
    made.usable_cpu_count = 2
    return made


def numbers(plan_ctx: Context, count: int = 100) -> DataSourceNode:
    return DataSourceNode(plan_ctx, ArrowTableDataSet(pa.table({"i": list(range(count))})))


class CopyStream(ArrowStreamNode):
    """A node with a `process` method of its own."""

    def process(self, runtime_ctx: Any, readers: Sequence[Any]) -> Iterator[Any]:
        for index, batch in enumerate(readers[0]):
            yield StreamOutput(pa.Table.from_batches([batch]), batch_indices=[index])


class Adds(ArrowComputeTask):
    """A task class of the user's own."""

    def __init__(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step = step

    def process(self, runtime_ctx: Any, inputs: Any, *more: Any) -> pa.Table:
        return pa.table({"i": [i + self.step for i in inputs[0].column("i").to_pylist()]})


class AddsNode(ArrowComputeNode):
    step = 10

    def spawn(self, *args: Any, **kwargs: Any) -> Adds:
        return Adds(self.step, *args, **kwargs)


def test_a_task_class_of_the_users_own_runs_and_counts_by_its_content(ctx: RuntimeContext) -> None:
    plan_ctx = Context()
    root = AddsNode(plan_ctx, (numbers(plan_ctx, 3),))
    plan = run(root, plan_ctx, ctx)
    assert plan.final_output.to_arrow_table().column("i").to_pylist() == [10, 11, 12]
    keys = [t.key for t in plan.tasks]
    root.step = 20  # the same class with other attributes is another task
    again = run(root, plan_ctx, ctx)
    assert again.final_output.to_arrow_table().column("i").to_pylist() == [20, 21, 22]
    assert keys != [t.key for t in again.tasks]


def test_functions_beside_what_cannot_travel_go_by_name(
    ctx: RuntimeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text(
        "import threading\nLOCK = threading.Lock()\ndef keep(ctx, tables):\n"
        "    with LOCK:\n        return tables[0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where workers look for modules
    keep = importlib.import_module("beside").keep
    plan_ctx = Context()
    root = ArrowComputeNode(plan_ctx, (numbers(plan_ctx, 3),), process_func=keep)
    assert run(root, plan_ctx, ctx).final_output.num_rows == 3
    (tmp_path / "beside.py").unlink()
    other = RuntimeContext(JobId.new(), datetime.now(), str(tmp_path / "jobs"))
    with pytest.raises(TaskFailed, match="No module named 'beside'"):
        run(root, plan_ctx, other)


def test_a_function_is_fingerprinted_once_a_plan(
    ctx: RuntimeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_ctx = Context()
    parts = DataSetPartitionNode(plan_ctx, (numbers(plan_ctx),), 50, partition_by_rows=True)
    root = ArrowComputeNode(plan_ctx, (parts,), process_func=add_one)
    met = []
    plain = fingerprint._function
    monkeypatch.setattr(fingerprint, "_function", lambda f, seen: met.append(f) or plain(f, seen))
    plan = Planner(ctx).create_exec_plan(LogicalPlan(plan_ctx, root))
    assert len({task.key for task in plan.tasks}) >= 50 and met.count(add_one) == 1


def add_one(runtime_ctx: Any, tables: Sequence[pa.Table]) -> pa.Table:
    assert runtime_ctx.task.cpu_limit == 1 and runtime_ctx.task.random_float() < 1
    return pa.table({"i": [i + 1 for i in tables[0].column("i").to_pylist()]})


def test_function_nodes_and_named_outputs(ctx: RuntimeContext) -> None:
    plan_ctx = Context()
    parts = DataSetPartitionNode(plan_ctx, (numbers(plan_ctx),), 3, partition_by_rows=True)
    one = ArrowComputeNode(plan_ctx, (parts,), process_func=add_one, output_name="one")
    two = CopyStream(plan_ctx, (one,), streaming_batch_size=7, output_name="two")
    three = PandasBatchNode(
        plan_ctx, (two,), process_func=lambda _, frames: frames[0] * 2, streaming_batch_size=10
    )
    plan = execute_plan(LogicalPlan(plan_ctx, RootNode(plan_ctx, (three, one))), ctx)
    assert plan.successful and sorted(plan.named_outputs) == ["one", "two"]
    table = plan.get_output("two").to_arrow_table()
    assert table.column("i").to_pylist() == list(range(1, 101))
    assert Path(ctx.output_root, "two").is_dir()
    total = sum(range(1, 101)) * 3
    assert sum(plan.final_output.to_arrow_table().column("i").to_pylist()) == total
    with pytest.raises(PlanError, match="no node has the output_name"):
        plan.get_output("four")


def run(root: Any, plan_ctx: Context, ctx: RuntimeContext) -> ExecutionPlan:
    return execute_plan(LogicalPlan(plan_ctx, root), ctx)


def test_nested_partitions_consolidate_and_load_again(ctx: RuntimeContext) -> None:
    plan_ctx = Context()
    by_tens = HashPartitionNode(
        plan_ctx, (numbers(plan_ctx),), 3, ["i % 10"], "tens", output_name="parts"
    )
    nested = HashPartitionNode(plan_ctx, (by_tens,), 2, ["i"], "inner", nested=True)
    count = "select tens, count(*) as n from {0} group by tens"
    inner = SqlEngineNode(plan_ctx, (nested,), count, output_name="inner")
    merged = SqlEngineNode(
        plan_ctx, (ConsolidateNode(plan_ctx, inner, ["tens"]),),
        "select tens, cast(sum(n) as bigint) as n from {0} group by tens",
    )  # fmt: skip
    loaded = LoadPartitionedDataSetNode(plan_ctx, (by_tens,), 3, data_partition_column="tens")
    again = SqlEngineNode(plan_ctx, (loaded,), count)
    query = "select a.n = b.n as same from {0} a join {1} b using (tens)"
    root = UnionNode(plan_ctx, (SqlEngineNode(plan_ctx, (merged, again), query),))
    plan = run(root, plan_ctx, ctx)
    assert plan.final_output.to_arrow_table().column("same").to_pylist() == [True] * 3
    output = plan.get_output("inner")
    assert isinstance(output, ParquetDataSet)
    assert [
        len(output.load_partitioned_datasets(n, d)) for n, d in [(3, "tens"), (2, "inner")]
    ] == [3, 2]


class ByParity(UserDefinedPartitionNode):
    """Files by the parity of their place; the third part gets none."""

    def partition(self, runtime_ctx: Any, dataset: Any) -> list[Any]:
        files = dataset.resolved_paths
        return [ParquetDataSet(files[0::2]), ParquetDataSet(files[1::2]), ParquetDataSet([])]


def test_partitions_of_the_users_own(ctx: RuntimeContext, tmp_path: Path) -> None:
    for part in range(4):
        pq.write_table(pa.table({"i": [part] * 3}), tmp_path / f"{part}.parquet")
    plan_ctx = Context()
    source = DataSourceNode(plan_ctx, ParquetDataSet([str(tmp_path / "*.parquet")]))
    parts = ByParity(plan_ctx, (source,), 3)
    chosen = ProjectionNode(plan_ctx, parts, ["i + 10 as j"], ["filename"])
    root = SqlEngineNode(
        plan_ctx, (chosen,), "select distinct j, filename like '%parquet' as f from {0} order by j"
    )
    table = run(root, plan_ctx, ctx).final_output.to_arrow_table()
    assert table.to_pydict() == {"j": [10, 12, 11, 13], "f": [True] * 4}


def test_ranges_with_given_split_points(ctx: RuntimeContext) -> None:
    plan_ctx = Context()
    ranges = RangePartitionNode(plan_ctx, (numbers(plan_ctx),), [10, 50], column="i")
    root = SqlEngineNode(plan_ctx, (ranges,), "select min(i) as a, max(i) as b from {0}")
    table = run(root, plan_ctx, ctx).final_output.to_arrow_table()
    assert table.to_pydict() == {"a": [0, 10, 50], "b": [9, 49, 99]}


def write_name(runtime_ctx: Any, datasets: Sequence[Any], folder: str) -> bool:
    Path(folder, "file").write_text(str(datasets[0].num_rows))
    return True


def test_scripts_and_sinks(ctx: RuntimeContext, tmp_path: Path) -> None:
    plan_ctx = Context()
    parts = EvenlyDistributedPartitionNode(
        plan_ctx, (numbers(plan_ctx),), 3, partition_by_rows=True
    )
    script = PythonScriptNode(plan_ctx, (parts,), process_func=write_name)
    link = DataSinkNode(plan_ctx, (script,), str(tmp_path / "link"))
    copy = DataSinkNode(plan_ctx, (script,), str(tmp_path / "copy"), type="copy")
    only = DataSinkNode(plan_ctx, (script,), str(tmp_path / "list"), manifest_only=True)
    rows = DataSinkNode(plan_ctx, (parts,), str(tmp_path / "rows"))
    run(RootNode(plan_ctx, (link, copy, only, rows)), plan_ctx, ctx)
    for folder in ("link", "copy"):
        texts = sorted(p.read_text() for p in (tmp_path / folder).glob("f*"))
        assert texts == ["33", "33", "34"]  # names that clash are numbered
    assert [p.name for p in (tmp_path / "list").iterdir()] == [".MANIFEST.txt"]
    assert ParquetDataSet([str(tmp_path / "rows")]).num_rows == 100


@pytest.mark.parametrize(
    "make",
    [
        lambda c, s: DataSinkNode(c, (s,), "relative"),
        lambda c, s: DataSinkNode(c, (s,), "/x", type="teleport"),
        lambda c, s: HashPartitionNode(c, (s,), 3),
        lambda c, s: HashPartitionNode(c, (s,), 0, ["i"]),
        lambda c, s: SqlEngineNode(c, (s,), []),
        lambda c, s: SqlEngineNode(c, (s,), "select 1", output_name="/bad"),
        lambda c, s: ArrowComputeNode(c, (s,), process_func=3),
        lambda c, s: RangePartitionNode(c, (s,), [1]),
    ],
)
def test_wrong_nodes_are_refused(make: Any) -> None:
    plan_ctx = Context()
    with pytest.raises(PlanError):
        make(plan_ctx, numbers(plan_ctx))


def test_dimensions_that_differ_are_refused(ctx: RuntimeContext) -> None:
    plan_ctx = Context()
    source = numbers(plan_ctx)
    left = EvenlyDistributedPartitionNode(plan_ctx, (source,), 2, dimension="A")
    for right in (
        EvenlyDistributedPartitionNode(plan_ctx, (source,), 2, dimension="B"),
        EvenlyDistributedPartitionNode(plan_ctx, (source,), 4, dimension="A"),
    ):
        for pair in ((left, right), (right, left)):
            root = SqlEngineNode(plan_ctx, pair, "select * from {0} join {1} using (i)")
            with pytest.raises(AssertionError, match="not compatible"):
                Planner(ctx).create_exec_plan(LogicalPlan(plan_ctx, root))


def test_what_is_fused_and_what_is_not() -> None:
    plan_ctx = Context()
    parts = EvenlyDistributedPartitionNode(plan_ctx, (numbers(plan_ctx),), 2)
    first = SqlEngineNode(plan_ctx, (parts,), "select i + 1 as i from {0}")
    second = SqlEngineNode(plan_ctx, (first,), "select '{{' || i as t from {0}")
    fused = optimize(second)
    assert isinstance(fused, SqlEngineNode) and fused.input_deps == (parts,)
    assert (
        "'{{' || i" in fused.sql_queries[0] and "select i + 1 as i from {0}" in fused.sql_queries[0]
    )
    twice = SqlEngineNode(plan_ctx, (first,), "select * from {0} a join {0} b using (i)")
    assert optimize(twice).input_deps == (first,)  # read twice: by `second` too
    named = SqlEngineNode(plan_ctx, (parts,), "select * from {0}", output_name="kept")
    assert optimize(SqlEngineNode(plan_ctx, (named,), "select 1 from {0}")).input_deps == (named,)


def test_driver_reads_both_kinds_of_arguments(tmp_path: Path) -> None:
    driver = Driver()
    driver.add_argument("-n", "--npartitions", type=int, default=10)
    driver.parse_arguments(["scheduler", "-n", "2", "--data_root", str(tmp_path), "--job_id", "j"])
    assert driver.get_arguments() == {"npartitions": 2}
    assert (driver.mode, driver.job_id, driver.num_executors) == ("scheduler", "j", 0)
    plan_ctx = Context()
    root = SqlEngineNode(plan_ctx, (numbers(plan_ctx),), "select count(*) as n from {0}")
    plan = driver.run(LogicalPlan(plan_ctx, root), stop_process_on_done=False)
    assert plan.final_output.to_arrow_table().to_pylist() == [{"n": 100}]
    assert Path(plan.final_output_path, ".MANIFEST.txt").exists()


def test_an_edited_module_of_the_users_changes_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "helper_of_mine.py"
    prints = []
    for factor in (3, 5):
        file.write_text(f"def g(x):\n    return x * {factor}\n", encoding="utf-8")
        helper = importlib.import_module("helper_of_mine")
        prints.append(fingerprint.fingerprint(helper))
    sys.modules.pop("helper_of_mine")
    assert prints[0] != prints[1]


@pytest.mark.parametrize("wrong", [-1, 1.5, "7", True])
def test_counts_of_rows_are_whole_numbers(wrong: Any) -> None:
    plan_ctx = Context()
    with pytest.raises(PlanError, match=f"LimitNode: limit is {wrong!r}, wanted a whole number >="):
        LimitNode(plan_ctx, numbers(plan_ctx), wrong)
    with pytest.raises(PlanError, match=f"CopyStream: streaming_batch_size is {wrong!r}, wanted a"):
        CopyStream(plan_ctx, (numbers(plan_ctx),), streaming_batch_size=wrong)
