"""What a job is: its id, its folders, its machine; and which partition a task works on.

Source: smallpond `execution.task` (`JobId`, `PartitionInfo`, `RuntimeContext`).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from whalefall.data.constants import TB, TOPLEVEL_DIMENSION
from whalefall.errors import ConfigError

__all__ = [
    "JobId",
    "PartitionInfo",
    "PartitionKey",
    "RuntimeContext",
    "available_cpus",
    "checked_job_id",
]

JOB_ID = re.compile(r"\w[\w.+=@:-]{0,127}", re.ASCII)


class JobId(str):
    """A job's name: any text that is safe in a folder's name."""

    @staticmethod
    def new() -> JobId:
        """A fresh, random one."""
        return JobId(uuid.uuid4().hex)

    @property
    def hex(self) -> str:
        """The text itself."""
        return str(self)


def checked_job_id(value: str) -> JobId:
    """The id of a job, which becomes part of a folder's name.

    Raises: ConfigError for one that would be a path, or that tools would trip over.
    """
    if not isinstance(value, str) or not JOB_ID.fullmatch(value):
        raise ConfigError(
            f"job_id is {value!r}, wanted 1 to 128 letters, digits and any of _ . + = @ : -, the "
            "first a letter, a digit or _"
        )
    return JobId(value)


@dataclass(frozen=True, order=False)
class PartitionInfo:
    """Which part of a dimension: number `index` of `npartitions`."""

    index: int = 0
    npartitions: int = 1
    dimension: str = TOPLEVEL_DIMENSION

    def __str__(self) -> str:
        return f"{self.dimension}:{self.index}/{self.npartitions}"

    def __lt__(self, other: PartitionInfo) -> bool:
        return (self.dimension, self.index) < (other.dimension, other.index)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PartitionInfo)
            and (self.dimension, self.index) == (other.dimension, other.index)
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.dimension, self.index))


# One entry a dimension, sorted; empty for what is not partitioned.
PartitionKey = tuple[PartitionInfo, ...]


def available_cpus() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes this process may take: physical memory, or the control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


# Arguments of the original's `RuntimeContext` that change nothing here.
WITHOUT_EFFECT = {
    "bind_numa_node",
    "disable_log_rotation",
    "enable_diagnostic_metrics",
    "enable_profiling",
    "enforce_memory_limit",
    "env_overrides",
    "max_num_missed_probes",
    "secs_wq_poll_interval",
    "shared_log_root",
}


class RuntimeContext:
    """A job's folders and limits; inside a task, `task` is the task that runs.

    Takes all arguments of the original's; those of its queues, probes and profiles
    (`WITHOUT_EFFECT`) change nothing here. The root is `{data_root}/{job_time}.{job_id}`. Finished
    tasks' results lie in `results` (or under `output` where the node has an output_name), what
    running tasks write in `staging`.
    """

    def __init__(
        self,
        job_id: str,
        job_time: datetime,
        data_root: str,
        *,
        num_executors: int = 1,
        random_seed: bytes | None = None,
        secs_executor_probe_interval: float = 30,
        fault_inject_prob: float = 0.0,
        max_usable_cpu_count: int = 1024,
        max_usable_gpu_count: int = 1024,
        max_usable_memory_size: int = 16 * TB,
        remove_empty_parquet: bool = False,
        skip_task_with_empty_input: bool = False,
        console_log_level: str = "INFO",
        file_log_level: str = "DEBUG",
        output_path: str | None = None,
        **without_effect: Any,
    ) -> None:
        if unknown := set(without_effect) - WITHOUT_EFFECT:
            raise ConfigError(f"RuntimeContext: unknown argument {min(unknown)!r}")
        self.job_id = checked_job_id(job_id)
        self.job_time = job_time
        self.data_root = os.path.abspath(os.path.expanduser(data_root))
        self.num_executors = num_executors
        self.random_seed = random_seed if random_seed is not None else str(job_id).encode()
        self.fault_inject_prob = fault_inject_prob
        self.secs_executor_probe_interval = secs_executor_probe_interval
        self.usable_cpu_count = max(1, min(available_cpus(), max_usable_cpu_count))
        self.usable_gpu_count = max_usable_gpu_count
        self.usable_memory_size = min(available_memory(), max_usable_memory_size)
        self.remove_empty_parquet = remove_empty_parquet
        self.skip_task_with_empty_input = skip_task_with_empty_input
        self.console_log_level, self.file_log_level = console_log_level, file_log_level
        self.output_path = output_path
        self.exec_id = ""
        self.task: Any = None

    @property
    def job_root_dirname(self) -> str:
        """The job's folder name."""
        return f"{self.job_time.strftime('%Y-%m-%d-%H-%M-%S')}.{self.job_id}"

    @property
    def job_root(self) -> str:
        """The job's folder."""
        return os.path.join(self.data_root, self.job_root_dirname)

    def _folder(self, name: str) -> str:
        return os.path.join(self.job_root, name)

    @property
    def config_root(self) -> str:
        return self._folder("config")

    @property
    def log_root(self) -> str:
        return self._folder("log")

    @property
    def queue_root(self) -> str:
        return self._folder("queue")

    @property
    def output_root(self) -> str:
        """Where nodes with an output_name leave their files."""
        return self.output_path or self._folder("output")

    @property
    def results_root(self) -> str:
        """Where all other finished tasks leave theirs, and the list of them all."""
        return self._folder("results")

    @property
    def staging_root(self) -> str:
        return self._folder("staging")

    @property
    def temp_root(self) -> str:
        return self._folder("temp")

    @property
    def job_status_path(self) -> str:
        """The file that says whether the job succeeded."""
        return os.path.join(self.log_root, ".STATUS")

    def initialize(
        self, exec_id: str = "driver", root_exist_ok: bool = True, cleanup_root: bool = False
    ) -> None:
        """Make the folders."""
        self.exec_id = exec_id or socket.gethostname()
        if cleanup_root:
            self.cleanup_root()
        os.makedirs(self.job_root, exist_ok=root_exist_ok)
        for name in ("config", "log", "queue", "output", "results", "staging", "temp"):
            os.makedirs(self._folder(name), exist_ok=True)

    def cleanup_root(self) -> None:
        """Remove the job's folder."""
        shutil.rmtree(self.job_root, ignore_errors=True)

    def cleanup(self, remove_output_root: bool = True) -> None:
        """Remove what only a running job needs, and the results too if `remove_output_root`."""
        roots = [self.queue_root, self.temp_root, self.staging_root]
        if remove_output_root:
            roots += [self._folder("output"), self.results_root]
        for root in roots:
            shutil.rmtree(root, ignore_errors=True)

    def for_worker(self) -> RuntimeContext:
        """A copy without the current task, to send to a worker."""
        copy = object.__new__(RuntimeContext)
        copy.__dict__.update(self.__dict__, task=None)
        return copy


def new_seed() -> int:
    """A random 32-bit number."""
    return secrets.randbits(32)
