"""How many units of how many ranks: `--prefill 1x2 --decode 2-4x4`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from whalefall.errors import ConfigError
from whalefall.serve.core import ExpertRule, ScaleRule

__all__ = ["Layout", "UnitsConfig", "parse_layout", "units_config"]

MAX_RANKS = 64
DEFAULT_RULE = ExpertRule()
CALM_S, SMOOTH_S = 60.0, 10.0  # before a unit is drained; of the load's average


@dataclass(frozen=True)
class Layout:
    """Units of one kind.

    Attributes:
        units: at the start; also the fewest.
        most: units that load may bring about.
        ranks: processes of a unit.
    """

    units: int
    most: int
    ranks: int


def parse_layout(text: str, option: str) -> Layout:
    """`UNITSxRANKS`, or `LOW-HIGHxRANKS` for units that follow the load.

    Raises: ConfigError for anything else.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?x(\d+)", text)
    if found:
        low, ranks = int(found[1]), int(found[3])
        high = int(found[2] or low)
        if 1 <= low <= high <= MAX_RANKS and 1 <= ranks <= MAX_RANKS:
            return Layout(low, high, ranks)
    raise ConfigError(
        f"serve: {option} is {text!r}, wanted UNITSxRANKS such as 1x2 or 1-3x2, each 1 to "
        f"{MAX_RANKS}"
    )


@dataclass(frozen=True)
class UnitsConfig:
    """What the gateway runs.

    Attributes:
        prefill, decode: the units.
        engine: fields of `EngineConfig`, for each rank.
        transfer: how KV gets from prefill to decode: "shm" or "tcp".
        overlap: dual-batch overlap in units of several ranks.
        redundant: replicas of experts that a unit holds beside one of each.
        threads: of each rank; 0: the cores shared out.
        experts: when experts are placed anew, and how many move.
        prefill_rule, decode_rule: the autoscaler's, in tokens a second and unit.
        ahead: answers a prefill rank may have under way or keep KV of.
        ready_s: how long a unit may take to start.
        trace: a folder for the ranks' traces.
    """

    prefill: Layout
    decode: Layout
    engine: dict[str, Any]
    transfer: str = "shm"
    overlap: bool = True
    redundant: int = 0
    threads: int = 0
    experts: ExpertRule = DEFAULT_RULE
    prefill_rule: ScaleRule | None = None
    decode_rule: ScaleRule | None = None
    ahead: int = 4
    ready_s: float = 180.0
    trace: str = ""

    def __post_init__(self) -> None:
        if self.transfer not in ("shm", "tcp"):
            raise ConfigError(f"serve: --kv-transfer is {self.transfer!r}, wanted shm or tcp")
        if self.redundant < 0 or self.ahead < 1:
            raise ConfigError(
                f"serve: --redundant-experts {self.redundant}, ahead {self.ahead}; wanted at least "
                "0 and 1"
            )


def units_config(
    prefill: str,
    decode: str,
    engine: dict[str, Any],
    prefill_set_point: float,
    decode_set_point: float,
    **rest: Any,
) -> UnitsConfig:
    """The command line's options as a configuration; set points in tokens a second and unit.

    Raises: ConfigError for layouts or values that make no sense.
    """
    layouts = parse_layout(prefill, "--prefill"), parse_layout(decode, "--decode")
    rules = [
        ScaleRule(point, layout.units, layout.most, calm_s=CALM_S, smooth_s=SMOOTH_S)
        for point, layout in zip((prefill_set_point, decode_set_point), layouts, strict=True)
    ]
    return UnitsConfig(*layouts, engine, prefill_rule=rules[0], decode_rule=rules[1], **rest)
