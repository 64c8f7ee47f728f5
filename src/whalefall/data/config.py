"""A session's settings: arguments win over smallpond's SP_* variables, these over the defaults."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from whalefall.arguments import whole
from whalefall.data.runtime import JobId, checked_job_id
from whalefall.errors import ConfigError, UnsupportedError

__all__ = ["Config", "parse_bytes"]

MAX_EXECUTORS = 1 << 16
UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_bytes(value: int | str) -> int:
    """Bytes of 4096, "512MB", "4GB" (KB = 1024 bytes).

    Raises: ConfigError for anything else.
    """
    size: float = math.nan
    if isinstance(value, str):
        text = value.strip().upper().removesuffix("IB").removesuffix("B")
        unit = text[-1:] if text[-1:] in UNITS else ""
        with contextlib.suppress(ValueError):
            size = float(text.removesuffix(unit)) * UNITS[unit]
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if not 1 <= size < 1 << 63:
        raise ConfigError(f"size is {value!r}, wanted bytes >= 1 or a text like 512MB")
    return int(size)


@dataclass(frozen=True)
class Config:
    """What a session runs with.

    Attributes:
        job_id, job_time: name the job's folder; the same ones again resume it.
        data_root: where job folders lie.
        num_executors: other hosts' workers; 0 is this host only.
        ray_address: a Ray cluster to run tasks on; None for processes of this host.
        memory: bytes that all tasks together may take; default all there is.
        cpus: cores for tasks; default all.
        remove_output_root: whether shutting down after a success removes the results.
        progress: whether to show a progress bar; None where standard error is a terminal.
    """

    job_id: str
    job_time: datetime
    data_root: str
    num_executors: int = 0
    ray_address: str | None = None
    memory: int | None = None
    cpus: int | None = None
    remove_output_root: bool = True
    progress: bool | None = None

    @staticmethod
    def from_args_and_env(
        job_id: str | None = None,
        job_time: datetime | float | str | None = None,
        data_root: str | None = None,
        num_executors: int | None = None,
        ray_address: str | None = None,
        platform: str | None = None,
        memory: int | str | None = None,
        cpus: int | None = None,
        _remove_output_root: bool = True,
        progress: bool | None = None,
        **ignored: Any,
    ) -> Config:
        """Settings from arguments, then SP_* variables, then defaults.

        Raises: ConfigError for a value that makes no sense, UnsupportedError for a platform or
            argument that does not exist here.
        """
        unknown = set(ignored) - {"job_name", "bind_numa_node", "memory_allocator"}
        if unknown:
            raise ConfigError(f"init: unknown argument {sorted(unknown)[0]!r}")
        platform = platform or os.environ.get("SP_PLATFORM")
        if platform not in (None, "local", "ray"):
            raise UnsupportedError(
                f"init: platform is {platform!r}; there are local processes and Ray (ray_address=…)"
            )
        address = ray_address or os.environ.get("SP_RAY_ADDRESS")
        count = num_executors
        if count is None:
            count = _integer("SP_NUM_EXECUTORS", os.environ.get("SP_NUM_EXECUTORS", "0"))
        whole("init: num_executors", count, 0, MAX_EXECUTORS)
        if cpus is not None:
            whole("init: cpus", cpus, 1, 1 << 20)
        if job_id is None:
            job_id = os.environ.get("SP_JOBID") or JobId.new()
        return Config(
            job_id=checked_job_id(job_id),
            job_time=_moment(job_time if job_time is not None else os.environ.get("SP_JOB_TIME")),
            data_root=_root(data_root),
            num_executors=count,
            ray_address=address or ("local" if platform == "ray" or count > 0 else None),
            memory=parse_bytes(memory) if memory is not None else None,
            cpus=cpus,
            remove_output_root=_remove_output_root,
            progress=progress,
        )


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, wanted a number") from None


def _root(given: str | os.PathLike[str] | None) -> str:
    root = os.environ.get("SP_DATA_ROOT") or "~/.smallpond/data" if given is None else given
    if not isinstance(root, str | os.PathLike) or not os.fspath(root) or "://" in str(root):
        raise ConfigError(f"init: data_root is {given!r}, wanted a local (or mounted) folder")
    return os.path.abspath(os.path.expanduser(root))


def _moment(value: datetime | float | str | None) -> datetime:
    if value is None:
        return datetime.now()
    if isinstance(value, datetime):
        return value
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value)
        return datetime.fromisoformat(value)
    except (ValueError, OverflowError, OSError, TypeError):
        raise ConfigError(
            f"init: job_time is {value!r}, wanted a datetime, seconds since 1970 or ISO 8601 "
            "(SP_JOB_TIME)"
        ) from None
