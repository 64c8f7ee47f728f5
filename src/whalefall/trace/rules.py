"""Trace room: which events are compute, which communication.

In: an event's category and name. Out: "compute", "communication" or "other". Our own categories say
it outright; the PyTorch profiler's device events are told apart by name. The rules can be replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from whalefall.errors import ConfigError, MissingError

__all__ = ["DEFAULT", "DEVICE", "Rules", "load"]

# categories of events that ran on a device's stream, as the PyTorch profiler names them
DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
COMMUNICATION = (
    "dispatch|combine|notify|nccl|rccl|gloo|nvshmem|c10d::|memcpy|send_?recv|all_?reduce"
    "|all_?gather|reduce_?scatter|all_?to_?all|broadcast_kernel"
)
# (pattern searched for in the name, ignoring case; kind), the first that matches decides
DEFAULT: tuple[tuple[str, str], ...] = ((COMMUNICATION, "communication"), ("memset", "other"))
KINDS = ("compute", "communication", "other")
WORK = DEVICE | {"cpu_op"}  # compute unless a rule says otherwise


class Rules:
    """Decides an event's kind by category and name; remembers each pair."""

    def __init__(self, rules: tuple[tuple[str, str], ...] = DEFAULT) -> None:
        try:
            self._rules = [(re.compile(pattern, re.IGNORECASE), kind) for pattern, kind in rules]
        except re.error as error:
            raise ConfigError(f"trace: a rule is no regular expression: {error}") from None
        for _, kind in rules:
            if kind not in KINDS:
                raise ConfigError(f"trace: a rule has kind {kind!r}; wanted one of {KINDS}")
        self._known: dict[tuple[str, str], str] = {}

    def kind(self, category: str, name: str) -> str:
        """ "compute", "communication" or "other"."""
        key = (category, name)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._decide(category, name)
        return found

    def _decide(self, category: str, name: str) -> str:
        if category in ("compute", "communication"):
            return category
        if category not in WORK:
            return "other"
        for pattern, kind in self._rules:
            if pattern.search(name):
                return kind
        return "compute"


def load(path: str | Path) -> Rules:
    """Rules from a JSON file: [[pattern, kind], …], the first match decides.

    Raises: MissingError, ConfigError naming what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"trace: no file of rules {path}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return Rules(tuple((str(pattern), str(kind)) for pattern, kind in rows))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trace: {path}: {error}; wanted [[pattern, kind], …]") from None
