"""File-system room: text and compression over a file that is being written.

In: a `WhalefallFile`. Out: files whose `close` closes it too, and whose `with` block, if it
raises, leaves no file. fsspec's own wrappers leave a compressed file open, and publish half a text.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from fsspec.compression import compr
from fsspec.core import get_compression

from whalefall.fs.file import WhalefallFile

__all__ = ["CompressedFile", "TextFile"]


class CompressedFile(io.BufferedIOBase):
    """Writes through a compressor to `below`.

    Args:
        compression: a name fsspec knows, or "infer" from the path.
    """

    def __init__(self, below: WhalefallFile, compression: str) -> None:
        self.below, self.mode = below, below.mode
        self.packed: Any = below
        kind = get_compression(below.path, compression)
        if kind is not None:
            self.packed = compr[kind](below, mode=below.mode[0])

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Compress and write."""
        return int(self.packed.write(data))

    def close(self) -> None:
        """Write what is left, and close the file below."""
        if self.closed:
            return
        try:
            with self.below:  # gives up if the compressor fails
                self.packed.close()
        finally:
            super().close()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None and not self.closed:
            self.below.__exit__(kind, error, traceback)
            with contextlib.suppress(ValueError):  # the file below is closed
                self.packed.close()
            self.packed = self.below
        self.close()

    def __del__(self) -> None:
        # Nobody closed it: the file below is not published, as it would not be by itself.
        self.below.__del__()


class TextFile(io.TextIOWrapper):
    """Text over a file that is written."""

    def __init__(self, below: Any, **options: Any) -> None:
        self.below = below
        super().__init__(below, **options)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None or self.closed:
            self.close()
            return
        self.below.__exit__(kind, error, traceback)
        with contextlib.suppress(ValueError):  # the file below is closed
            self.close()

    def __del__(self) -> None:
        self.below.__del__()  # as above
