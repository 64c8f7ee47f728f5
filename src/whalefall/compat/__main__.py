"""`python -m whalefall.compat [--device cpu] script.py …`: a script of the originals, on whalefall.

Prints nothing of its own; the script's exit code is the exit code.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from whalefall.compat.children import begin
from whalefall.errors import ConfigError, MissingError, WhalefallError


def main(arguments: list[str]) -> int:
    """Run `script.py` with the stand-ins installed; 2 for a bad command line."""
    device = None
    try:
        while arguments and arguments[0].startswith("--"):
            option, _, value = arguments.pop(0).partition("=")
            if option != "--device":
                raise ConfigError(f"whalefall.compat: option {option}, wanted --device cpu")
            device = value or (arguments.pop(0) if arguments else "")
            if device not in ("cpu", "cuda"):
                raise ConfigError(f"whalefall.compat: --device {device!r}, wanted cpu or cuda")
        if not arguments:
            raise ConfigError("usage: python -m whalefall.compat [--device cpu] script.py …")
        script = Path(arguments[0])
        if not script.is_file():
            raise MissingError(f"whalefall.compat: no script {script}")
    except WhalefallError as error:
        print(error, file=sys.stderr)
        return 2
    begin(device)
    sys.argv = arguments
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
