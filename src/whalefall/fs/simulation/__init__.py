"""File-system room: the whole protocol in one process, on virtual time, with every fault.

Managers, storage nodes and clients are the very cores that the servers run. `run_schedule(seed)`
runs one schedule and checks the invariants; the same seed gives the same run.
"""

from whalefall.fs.simulation.schedule import PROFILES, Outcome, Violation, run_schedule

__all__ = ["PROFILES", "Outcome", "Violation", "run_schedule"]
