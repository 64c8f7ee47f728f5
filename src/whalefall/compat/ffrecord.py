"""Compat: what `import ffrecord` gives.

In and out: as FFRecord 1.4.0; see docs/differences.md for what is refused here and was not there.
"""

from __future__ import annotations

import fcntl

from whalefall.record import FileReader, FileWriter, PackedFolder, pack_folder
from whalefall.record import shards as utils  # noqa: F401

__all__ = ["FileReader", "FileWriter", "PackedFolder", "checkFsAlign", "pack_folder"]

__version__ = "1.4.0+whalefall"
__path__: list[str] = []  # `ffrecord` is a package: `ffrecord.torch` is looked for in it

_ALIGN_REQUEST = 2147772004


def checkFsAlign(fd: int) -> bool:
    """Whether the file's file system asks for aligned direct reads (3FS does).

    Source: FFRecord `checkFsAlign`.
    """
    answer = bytearray(4)
    try:
        fcntl.ioctl(fd, _ALIGN_REQUEST, answer)
    except OSError:
        return False
    return int.from_bytes(answer, "little") == 1
