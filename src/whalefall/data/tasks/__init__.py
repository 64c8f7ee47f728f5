"""Tasks: what a plan's nodes become, one for each partition; each runs alone in a process.

In: the data sets of its inputs, a folder to write to. Out: a data set, or one for each part where
it divides its input. A task's `key` is a hash of what it does and of its inputs' keys.
"""

from whalefall.data.tasks.base import Input, Ref, Task, resolve_input

__all__ = ["Input", "Ref", "Task", "resolve_input"]
