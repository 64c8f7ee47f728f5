"""Names of input files: globs, folders, relative paths and URLs, resolved to a sorted list."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from typing import Any

from whalefall.errors import MissingError

__all__ = ["has_magic", "is_url", "move", "resolve", "stamp", "to_absolute"]


def has_magic(text: str) -> bool:
    """Whether a path is a pattern (`*`, `?`, `[…]`)."""
    return glob.has_magic(text)


def is_url(path: str) -> bool:
    """Whether a path names another file system (`s3://…`); `file://` and plain paths do not."""
    return "://" in path


def to_absolute(path: str, root: str = "") -> str:
    """An absolute local path, or the URL as it is."""
    if is_url(path):
        return path
    return os.path.abspath(os.path.join(root, path) if root else path)


def resolve(
    paths: Iterable[str], root: str = "", recursive: bool = False, suffix: str = ""
) -> list[str]:
    """Expand patterns and folders, and sort; a name that is listed twice stays twice.

    Args:
        paths: files, patterns (`**` only where `recursive`), folders or fsspec URLs.
        root: what relative paths are relative to; default the current folder.
        recursive: whether `**` and folders reach into sub-folders.
        suffix: which files of a folder count; all where empty.
    Raises: MissingError for a pattern that nothing matches.
    """
    found: list[str] = []
    for path in paths:
        text = to_absolute(str(path), root)
        if is_url(text):
            found += _resolve_url(text, recursive, suffix)
        elif has_magic(text):
            found += _some(glob.glob(text, recursive=recursive), text)
        elif not text.endswith(suffix or "\0") and os.path.isdir(text):
            pattern = os.path.join(glob.escape(text), "**" if recursive else "", "*" + suffix)
            found += [name for name in glob.glob(pattern, recursive=recursive) if is_data(name)]
        else:
            found.append(text)
    return sorted(found)


def _some(names: list[str], pattern: str) -> list[str]:
    if not names:
        raise MissingError(f"{pattern}: no file matches; wanted a pattern that names one or more")
    return names


def is_data(path: str) -> bool:
    """Whether a file of a folder is data: a plain file, not hidden."""
    return os.path.isfile(path) and not os.path.basename(path).startswith((".", "_"))


def _resolve_url(url: str, recursive: bool, suffix: str) -> list[str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise MissingError(f"{url}: {error}") from None
    if has_magic(path):
        names = _some(filesystem.glob(path), url)
    elif not path.endswith(suffix or "\0") and filesystem.isdir(path):
        names = filesystem.glob(f"{path.rstrip('/')}/{'**/' if recursive else ''}*{suffix}")
    else:
        return [url]
    return [filesystem.unstrip_protocol(name) for name in names]


def move(path: str, old: str, new: str) -> str:
    """`path` with the folder `old` at its head replaced by `new`."""
    return new + path[len(old) :] if path.startswith(old + "/") else path


def stamp(path: str) -> list[Any]:
    """A file's name, size and modification time; only the name where that cannot be had."""
    try:
        if is_url(path):
            import fsspec

            filesystem, inner = fsspec.core.url_to_fs(path)
            info = filesystem.info(inner)
            return [path, info.get("size"), str(info.get("mtime") or info.get("ETag") or "")]
        status = os.stat(path)
    except (OSError, ImportError, ValueError):
        return [path]
    return [path, status.st_size, status.st_mtime_ns]
