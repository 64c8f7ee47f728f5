"""File-system room: a transactional key-value store — the one place where metadata lives.

`interface.py` is the contract, `memory.py` its plain form (simulator, tests), `sqlite.py` the
embedded one. One test suite runs on both.
"""

from whalefall.fs.kv.interface import Conflict, KeyValue, MaybeCommitted, Transaction
from whalefall.fs.kv.memory import MemoryKV
from whalefall.fs.kv.sqlite import SqliteKV

__all__ = ["Conflict", "KeyValue", "MaybeCommitted", "MemoryKV", "SqliteKV", "Transaction"]
