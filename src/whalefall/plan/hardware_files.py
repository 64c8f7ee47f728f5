"""Hardware files: peaks of a device, and the share of each peak that its kernels reach."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from whalefall.arguments import finite
from whalefall.errors import ConfigError, MissingError
from whalefall.jit import machine
from whalefall.plan.this_machine import shares

__all__ = ["Efficiency", "Hardware", "load_hardware", "names"]


@dataclass(frozen=True)
class Efficiency:
    """Shares (0 to 1) of a peak that a class of kernels reaches."""

    gemm: float
    gemm_wgrad: float
    attention_forward: float
    attention_backward: float
    mla_read: float
    mla_compute: float
    read: float
    rdma: float
    nvlink: float
    compute_sms: float


@dataclass(frozen=True)
class Hardware:
    """One kind of node.

    Attributes:
        memory_gb: memory of a device, GB (1e9 bytes).
        read_gb_s: memory bandwidth of a device.
        fp8_tflops, bf16_tflops: dense peaks of a device.
        nvlink_gb_s, rdma_gb_s: bandwidth of a device within and between nodes, one direction.
    """

    name: str
    gpus_per_node: int
    memory_gb: float
    read_gb_s: float
    fp8_tflops: float
    bf16_tflops: float
    nvlink_gb_s: float
    rdma_gb_s: float
    efficiency: Efficiency


def names() -> list[str]:
    """The hardware names there are."""
    folder = resources.files(__package__) / "hardware"
    files = sorted(p.name.removesuffix(".toml") for p in folder.iterdir())
    return [*files, "this"]


def load_hardware(name: str) -> Hardware:
    """A named hardware file, `this` machine as measured, or a TOML file's path.

    Raises: MissingError for an unknown name, ConfigError for a wrong file.
    """
    if name == "this":
        return this_machine()
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        resource = resources.files(__package__) / "hardware" / f"{name}.toml"
        if not resource.is_file():
            raise MissingError(f"hardware {name!r}: wanted one of {', '.join(names())}, or a .toml")
        text = resource.read_text(encoding="utf-8")
    try:
        return parse(tomllib.loads(text), name)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"hardware {name}: is not TOML ({error})") from None


def parse(raw: dict[str, Any], where: str) -> Hardware:
    """A `Hardware` from a parsed file; every number must be there and positive."""
    wanted = {f.name for f in dataclasses.fields(Hardware)} - {"name", "efficiency"}
    shares = {f.name for f in dataclasses.fields(Efficiency)}
    given = raw.get("efficiency", {})
    if not isinstance(given, dict):
        raise ConfigError(f"hardware {where}: efficiency is {given!r}, wanted a table of shares")
    missing = sorted((wanted - raw.keys()) | (shares - given.keys()))
    if missing:
        raise ConfigError(f"hardware {where}: lacks {', '.join(missing)}")
    for key in wanted:
        finite(f"hardware {where}: {key}", raw[key], 0, above=True)
    for key in shares:
        finite(f"hardware {where}: efficiency.{key}", given[key], 0, 1, above=True)
    efficiency = Efficiency(**{key: float(given[key]) for key in shares})
    numbers = {key: raw[key] for key in wanted}
    return Hardware(name=str(raw.get("name", where)), efficiency=efficiency, **numbers)


def this_machine() -> Hardware:
    """This CPU as measured, a node of one device, over whose "links", its memory, nothing goes.

    FP8 is decoded, so its peak is that of bf16.
    """
    read, peak = machine.limits()["read_bytes_s"] / 1e9, machine.bf16_flops() / 1e12
    memory = machine.memory_bytes() / 1e9
    share = Efficiency(**shares(), rdma=1.0, nvlink=1.0, compute_sms=1.0)
    return Hardware(machine.cpu_model(), 1, memory, read, peak, peak, read, read, share)
