"""Running a hand-made plan from a script: `Driver` reads its command line, `execute_plan` runs it.

Source: smallpond `execution.driver.Driver`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from whalefall.data.config import Config, parse_bytes
from whalefall.data.executor.base import Executor
from whalefall.data.executor.local import LocalExecutor
from whalefall.data.job import Job
from whalefall.data.optimizer import optimize
from whalefall.data.plan import LogicalPlan
from whalefall.data.planner import ExecutionPlan, Planner
from whalefall.data.runtime import JobId, RuntimeContext
from whalefall.data.storage import write_manifest

__all__ = ["Driver", "execute_plan"]

log = logging.getLogger(__name__)
MODES = ("executor", "scheduler", "ray")


def execute_plan(
    plan: LogicalPlan, runtime_ctx: RuntimeContext, ray_address: str | None = None
) -> ExecutionPlan:
    """Run a logical plan to its end.

    Args:
        runtime_ctx: the job; its folders are made where missing, results found there are reused.
        ray_address: a Ray cluster; default processes of this host.
    Returns: the plan with its results.
    """
    runtime_ctx.initialize("driver")
    executor: Executor
    if ray_address is not None:
        from whalefall.data.executor.ray import RayExecutor

        executor = RayExecutor(ray_address, runtime_ctx.usable_cpu_count)
    else:
        executor = LocalExecutor(runtime_ctx.usable_cpu_count, runtime_ctx.log_root)
    try:
        optimized = LogicalPlan(plan.ctx, optimize(plan.root_node))
        made = Planner(runtime_ctx).create_exec_plan(optimized)
        Job(runtime_ctx, executor).run(made)
    finally:
        executor.close()
    write_manifest(made.final_output_path, made.final_output.resolved_paths)
    return made


class Driver:
    """A script's command line: the script's own arguments, and the job's.

    The mode (scheduler, executor or ray), which the original demands first, may be left out.
    """

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(
            formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add = self.parser.add_argument_group("job").add_argument
        add("--job_id", help="names the job's folder; again: resume")
        add("--job_time", help="ISO 8601; names the job's folder")
        add("--job_name", help="for people")
        add("--data_root", help="where job folders lie (SP_DATA_ROOT)")
        add("--num_executors", type=int, help="workers of a Ray cluster; 0: this host")
        add("--ray_address", help="a Ray cluster")
        add("--output_path", help="folder for named outputs and the final results")
        add("--memory", help="bytes that tasks may take together, e.g. 4GB")
        self.parser.add_argument("mode", nargs="?", choices=MODES, default="scheduler")
        self._own = {"mode", *(a.dest for a in self.parser._actions)}
        self._args: argparse.Namespace | None = None

    def add_argument(self, *args: Any, **kwargs: Any) -> None:
        """Add an argument of the script's own (as argparse's)."""
        self.parser.add_argument(*args, **kwargs)

    def parse_arguments(
        self, args: Sequence[str] | None = None
    ) -> tuple[argparse.Namespace, argparse.Namespace]:
        """(the script's arguments, the job's), from `args` or the command line."""
        if self._args is None or args is not None:
            self._args = self.parser.parse_args(args)
        values = vars(self._args)
        user = {k: v for k, v in values.items() if k not in self._own}
        job = {k: v for k, v in values.items() if k in self._own}
        job["num_executors"] = job["num_executors"] or 0
        return argparse.Namespace(**user), argparse.Namespace(**job)

    def get_user_arguments(self, to_dict: bool = True) -> Any:
        """The script's arguments: by name, or as a namespace."""
        arguments = self.parse_arguments()[0]
        return vars(arguments) if to_dict else arguments

    get_arguments = get_user_arguments

    def get_driver_arguments(self, to_dict: bool = True) -> Any:
        """The job's arguments: by name, or as a namespace."""
        arguments = self.parse_arguments()[1]
        return vars(arguments) if to_dict else arguments

    @property
    def mode(self) -> str:
        """scheduler, executor or ray."""
        return str(self.get_driver_arguments()["mode"])

    @property
    def job_id(self) -> str:
        """The job's id, made where none was given."""
        job = self.get_driver_arguments()
        if not job["job_id"] and self._args is not None:
            self._args.job_id = os.environ.get("SP_JOBID") or JobId.new()
        return str(self._args.job_id if self._args is not None else "")

    @property
    def data_root(self) -> str:
        """Where the job's folder lies."""
        return self._config().data_root

    @property
    def num_executors(self) -> int:
        """Workers of a Ray cluster; 0: this host."""
        return int(self.get_driver_arguments()["num_executors"])

    def _config(self) -> Config:
        job = self.get_driver_arguments()
        address = job["ray_address"] or ("local" if self.mode == "ray" else None)
        return Config.from_args_and_env(
            job_id=self.job_id, job_time=job["job_time"], data_root=job["data_root"],
            num_executors=job["num_executors"], ray_address=address,
        )  # fmt: skip

    def run(
        self,
        plan: LogicalPlan,
        stop_process_on_done: bool = True,
        tags: Sequence[str] | None = None,
    ) -> ExecutionPlan:
        """Run the plan, say where its results lie, and exit.

        Args:
            stop_process_on_done: False returns the executed plan instead.
            tags: taken for the original's sake.
        """
        config, job = self._config(), self.get_driver_arguments()
        ctx = RuntimeContext(
            config.job_id, config.job_time if job["job_time"] else datetime.now(), config.data_root,
            num_executors=config.num_executors, output_path=job["output_path"],
        )  # fmt: skip
        if job["memory"]:
            ctx.usable_memory_size = min(ctx.usable_memory_size, parse_bytes(job["memory"]))
        made = execute_plan(plan, ctx, config.ray_address)
        log.info("results: %s", made.final_output_path)
        if stop_process_on_done:
            print(made.final_output_path)
            sys.exit(0)
        return made
