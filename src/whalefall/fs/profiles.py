"""File-system room: the kinds of trouble of simulated schedules; data alone, as help texts ask too.

A profile forces some of a schedule's draws; what it leaves out is drawn.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PROFILES"]

# Where a kind of trouble is rare in mixed schedules, a profile is full of it.
PROFILES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "slow": {"slow": 0.3, "slow_s": 2.0, "duplicate": 0.3, "kinds": ["crash", "half cut"]},
    "cut": {"kinds": ["manager cut"], "replicas": 2, "nodes": 3, "clients": 3, "loss": 0.0},
    "many": {"kinds": ["crash", "freeze"], "chunks": 8, "slow": 0.3, "slow_s": 0.6},
    "managers": {"kinds": ["manager", "manager", "crash"], "managers": 2, "chains": 2},
    "together": {
        "kinds": ["crash", "freeze", "cut off", "half cut", "manager", "all", "full"],
        "chunks": 6,
        "together": True,
        "clients": 2,
        "retry_s": 8.0,
        "resync_chunks": 3,
    },
    "churn": {
        "kinds": ["crash", "freeze"],
        "removes": 40,
        "chunks": 3,
        "loss": 0.0,
        "resync_chunks": 1,
    },
}
