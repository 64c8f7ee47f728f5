"""Launch room: the first code of a started process. Not for users.

`python -m whalefall.launch.child PARENT RESULT_FD TARGET [ARGUMENTS…]`: ask the kernel to be
killed when the parent dies, then run the module or call the function; a function's return value
goes to the descriptor RESULT_FD as JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process (SIGKILL) as soon as `parent`, who started it, has died."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Run what the command line says."""
    parent, result, target = int(arguments[0]), int(arguments[1]), arguments[2]
    die_with(parent)
    if ":" not in target:
        os.close(result)
        sys.argv = [target, *arguments[3:]]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    import msgspec

    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    value = function(**msgspec.json.decode(arguments[3]))
    with open(result, "wb") as pipe:
        pipe.write(msgspec.json.encode(value))


if __name__ == "__main__":
    main(sys.argv[1:])
