"""Record room: `FileWriter`, which makes one `.ffr` file and lets nobody see half of it.

In: a path or URL, the number of samples, then the samples. Out: the file, under its name only
when it is whole and on the disk. Source: FFRecord 1.4.0 `FileWriter`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from whalefall.arguments import whole
from whalefall.errors import ConfigError, DtypeError, LimitError, MissingError
from whalefall.record.checksum import crc32
from whalefall.record.layout import PREFIX_BYTES, header
from whalefall.record.source import is_url

__all__ = ["CountError", "FileWriter", "as_bytes", "checked_name"]

_BUFFER_BYTES = 1 << 20


class CountError(LimitError, RuntimeError):
    """More or fewer samples than were announced (FFRecord raises RuntimeError)."""


class FileWriter:
    """Writes `n` samples to one file, which appears under its name at `close()`.

    Args:
        fname: path or fsspec URL ending in `.ffr`; its folder must exist.
        n: how many samples will be written.
    Raises: ConfigError, DtypeError (n), MissingError.
    Source: FFRecord `FileWriter`.
    """

    def __init__(self, fname: Any, n: int) -> None:
        self._file: BinaryIO | None = None
        self._name = checked_name(fname)
        self._n = whole("FileWriter: n", n, error=DtypeError)
        if self._n < 0:
            raise ConfigError(f"FileWriter: n is {n}, wanted 0 or more samples")
        self._count = 0
        self._checksums = np.zeros(self._n, np.uint32)
        self._sizes = np.zeros(self._n, np.int64)
        self._temporary, file = self._open_temporary()
        file.seek(PREFIX_BYTES + 12 * self._n)
        self._file = file

    @property
    def n(self) -> int:
        """The number of samples announced."""
        return self._n

    @property
    def count(self) -> int:
        """The number of samples written so far."""
        return self._count

    def write_one(self, buffer: Any) -> None:
        """Append one sample: all bytes of a buffer, array or tensor.

        Raises: DtypeError for text and other non-buffers, CountError for one sample too many.
        """
        if self._file is None:
            raise ConfigError(f"record: {self._name} is closed, nothing can be written to it")
        data = as_bytes(buffer)
        if self._count >= self._n:
            raise CountError(
                f"record: {self._name}: sample {self._count + 1} of {self._n} announced; "
                "FileWriter(fname, n) needs the right n"
            )
        self._checksums[self._count] = crc32(data)
        self._sizes[self._count] = len(data)
        self._file.write(data)
        self._count += 1

    def close(self) -> None:
        """Write the header, sync, and give the file its name; a second time does nothing.

        Raises: CountError if fewer than n samples were written; the file then does not appear.
        """
        if self._file is None:
            return
        if self._count != self._n:
            self.abort()
            raise CountError(
                f"record: {self._name}: {self._count} samples written, wanted {self._n}; "
                "no file was made"
            )
        file, self._file = self._file, None
        try:
            file.seek(0)
            file.write(header(self._checksums, self._sizes))
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._publish()
        finally:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def abort(self) -> None:
        """Drop what was written; no file appears."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        self.abort()

    def _open_temporary(self) -> tuple[str, BinaryIO]:
        """A file beside the wanted one (or, for a URL, on this machine), not ending in .ffr."""
        folder, name = (None, "upload") if is_url(self._name) else os.path.split(self._name)
        if folder is not None:
            folder = folder or "."
            if not os.path.isdir(folder):
                raise MissingError(f"record: {self._name}: folder {folder} does not exist; make it")
        try:
            number, path = tempfile.mkstemp(".tmp", f".{name}.", folder)
        except OSError as error:
            raise ConfigError(f"record: {self._name}: {error.strerror}") from None
        return path, os.fdopen(number, "wb", _BUFFER_BYTES)

    def _publish(self) -> None:
        if is_url(self._name):
            import fsspec

            fs, path = fsspec.core.url_to_fs(self._name)
            fs.put_file(self._temporary, path + ".tmp")
            fs.mv(path + ".tmp", path)
            return
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(self._temporary, 0o666 & ~mask)
        os.replace(self._temporary, self._name)
        folder = os.open(os.path.dirname(self._name) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def checked_name(fname: Any) -> str:
    """The path as text; ConfigError if it does not end in .ffr."""
    if not isinstance(fname, (str, os.PathLike)):
        raise DtypeError(f"record: {fname!r} is {type(fname).__name__}, wanted a path or a URL")
    name = os.fsdecode(fname)
    if not name.endswith(".ffr"):
        raise ConfigError(f"record: {name} does not end in .ffr, wanted a name that does")
    return name


def as_bytes(buffer: Any) -> memoryview:
    """All bytes of a sample, in C order.

    Raises: DtypeError for what is no buffer.
    """
    if hasattr(buffer, "data_ptr"):
        buffer = buffer.contiguous().view(_torch_uint8(buffer)).numpy()
    try:
        view = memoryview(buffer)
        if "O" in view.format:
            raise TypeError("objects")
        return view.cast("B") if view.c_contiguous and view.nbytes else _copied(view)
    except (TypeError, ValueError, NotImplementedError):
        array = np.asarray(buffer) if hasattr(buffer, "__array_interface__") else None
    if array is None or array.dtype.hasobject:
        raise DtypeError(
            f"record: a sample is {type(buffer).__name__}, wanted bytes or an array of numbers"
        )
    return memoryview(np.ascontiguousarray(array).tobytes())


def _copied(view: memoryview) -> memoryview:
    return memoryview(view.tobytes())


def _torch_uint8(tensor: Any) -> Any:
    import sys

    return sys.modules["torch"].uint8
