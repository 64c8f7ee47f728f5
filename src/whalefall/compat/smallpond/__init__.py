"""Stands in for smallpond 0.15: `init`, and modules of the same names.

See docs/differences.md for what differs, and docs/data.md for which of its scripts and tests pass.
"""

from whalefall.data.session import Session, init

__all__ = ["Session", "__version__", "init"]

__version__ = "0.15.0"
