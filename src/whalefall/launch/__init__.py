"""Launch room: starts processes, watches them, stops them; none outlives its parent.

A `Task` is a Python module or function to run in a process of its own; a `Group` starts several,
waits for their results or names the one that failed, with its last words, and stops the rest.
"""

from whalefall.launch.group import Exit, Group, run
from whalefall.launch.task import Task

__all__ = ["Exit", "Group", "Task", "run"]
