"""Putting a result into a folder so that it is there completely or not at all.

The files are gathered in a folder beside the target, which then takes the target's name in one
step; what the target held before (an earlier result) goes away, files that no manifest lists stay.
What a killed process leaves beside a target goes away when the next one writes there. On a store
without renames (s3) the files are put one by one, and the manifest last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whalefall.data.errors import WriteError, writing
from whalefall.data.paths import is_url
from whalefall.data.scratch import scratch_folder
from whalefall.errors import ConfigError, WhalefallError

__all__ = [
    "MANIFEST",
    "Placed",
    "check_target",
    "commit_folder",
    "fsync_path",
    "write_atomic",
    "write_manifest",
]

MANIFEST = ".MANIFEST.txt"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Placed:
    """A file to place; its number of rows where that is known."""

    path: str
    num_rows: int | None = None


def fsync_path(path: str) -> None:
    """Have a file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def write_atomic(path: str, text: str, sync: bool = True) -> None:
    """Write a small file: temporary, sync, rename.

    Args:
        sync: False where a crash of the machine may lose it, and a reader minds no broken file.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def write_manifest(folder: str, paths: Sequence[str]) -> None:
    """Write a folder's list of files, one a line."""
    write_atomic(os.path.join(folder, MANIFEST), "".join(path + "\n" for path in paths))


def unique_names(paths: Sequence[str]) -> list[str]:
    """The files' base names; where one is taken, `.{index}` before the suffix."""
    taken: set[str] = set()
    names = []
    for index, path in enumerate(paths):
        name = os.path.basename(path)
        if name in taken:
            stem, suffix = os.path.splitext(name)
            name = f"{stem}.{index}{suffix}"
        taken.add(name)
        names.append(name)
    return names


def check_target(target: Any) -> None:
    """Refuse, before anything is computed, what cannot be a folder of results.

    Raises: ConfigError for a file, an unknown protocol or one whose library is not installed;
        WriteError for a folder that this user may not write to.
    """
    if not isinstance(target, str) or not target:
        raise ConfigError(f"the folder to write to is {target!r}, wanted a path or an fsspec URL")
    if is_url(target):
        import fsspec

        try:
            fsspec.get_filesystem_class(target.split("://", 1)[0])
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{target}: {error}") from None
        return
    if os.path.exists(target) and not os.path.isdir(target):
        raise ConfigError(f"{target} is a file, wanted a folder to write to")
    with writing(target):
        above = os.path.dirname(os.path.abspath(target))  # "" has nothing above it
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above):
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is no folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{above}: permission denied")


def commit_folder(target: str, files: Sequence[Placed], link: bool = True) -> list[str]:
    """Make `target` the folder of exactly these files (and of what no manifest of ours listed).

    Args:
        target: a local folder or an fsspec URL.
        files: local files.
        link: hard links where the file system allows, copies elsewhere.
    Returns: where the files lie now.
    Raises: ConfigError where the folder holds Parquet files that no manifest lists, which a reader
        of the folder would take for part of the result; WriteError where it cannot be written.
    """
    check_target(target)
    names = unique_names([file.path for file in files])
    if is_url(target):
        return _commit_remote(target, [file.path for file in files], names)
    with writing(target):
        return _commit_local(os.path.abspath(target), files, names, link)


def _commit_local(
    target: str, files: Sequence[Placed], names: Sequence[str], link: bool
) -> list[str]:
    foreign = foreign_entries(target)
    with scratch_folder(target) as temporary:
        for file, name in zip(files, names, strict=True):
            _place(file.path, os.path.join(temporary, name), link)
        for name in foreign:
            if name not in names:
                _carry(os.path.join(target, name), os.path.join(temporary, name))
        placed = [os.path.join(target, name) for name in names]
        write_manifest(temporary, placed)
        fsync_path(temporary)
        _swap(temporary, target)
    return placed


def foreign_entries(target: str) -> list[str]:
    """What a folder holds that no manifest lists.

    Raises: ConfigError as `commit_folder`.
    """
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        return []
    listed, manifest = {MANIFEST}, os.path.join(target, MANIFEST)
    if os.path.exists(manifest):
        with open(manifest, encoding="utf-8") as file:
            listed |= {os.path.basename(line.rstrip("\n")) for line in file}
    foreign = [name for name in sorted(os.listdir(target)) if name not in listed]
    data = [name for name in foreign if name.endswith(".parquet")]
    if data:
        raise ConfigError(
            f"{target} holds {len(data)} Parquet file(s) that no {MANIFEST} lists, such as "
            f"{data[0]}: remove them or write to another folder"
        )
    return foreign


def _place(source: str, target: str, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            fsync_path(target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
    if is_url(source):
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(source)
        filesystem.get_file(path, target)
    else:
        shutil.copyfile(source, target)
    fsync_path(target)


def _carry(source: str, target: str) -> None:
    """Have a file or folder of the user's in the new folder too."""
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, target, copy_function=os.link, symlinks=True)
    elif os.path.islink(source):
        os.symlink(os.readlink(source), target)
    else:
        os.link(source, target)


def _swap(temporary: str, target: str) -> None:
    """Give the folder `temporary` the name `target`; after it, `temporary` is what was there."""
    if not os.path.exists(target):
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        old = temporary + ".old"
        os.rename(target, old)
        os.rename(temporary, target)
        os.rename(old, temporary)
    fsync_path(os.path.dirname(target))


def _exchange(first: str, second: str) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    code = call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return bool(code == 0)


def _commit_remote(target: str, files: Sequence[str], names: Sequence[str]) -> list[str]:
    import fsspec

    protocol = target.split("://", 1)[0]
    renames = protocol not in ("s3", "s3a", "gs", "gcs", "abfs", "az", "http", "https")
    made: list[str] = []  # to take back after a failure
    filesystem: Any = None
    try:
        filesystem, root = fsspec.core.url_to_fs(target)
        root = root.rstrip("/")
        placed = [f"{target.rstrip('/')}/{name}" for name in names]
        folder = f"{root}.{uuid.uuid4().hex[:8]}.tmp" if renames else root
        old = _listed(filesystem, f"{root}/{MANIFEST}")
        if renames:
            made.append(folder)
        filesystem.makedirs(folder, exist_ok=True)
        for file, name in zip(files, names, strict=True):
            if not renames and name not in old:
                made.append(f"{root}/{name}")
            filesystem.put_file(file, f"{folder}/{name}")
        manifest = "".join(p + "\n" for p in placed).encode()
        filesystem.pipe_file(f"{folder}/{MANIFEST}", manifest)
        _take_place(filesystem, folder, root, names, old)
    except Exception as error:  # a store's library raises what it likes
        for path in made:
            with contextlib.suppress(Exception):
                filesystem.rm(path, recursive=renames)
        if isinstance(error, WhalefallError):
            raise
        reason = (str(error) or "no message").splitlines()[0]
        raise WriteError(f"{target}: not written: {type(error).__name__}: {reason}") from None
    return placed


def _take_place(
    filesystem: Any, folder: str, root: str, names: Sequence[str], old: set[str]
) -> None:
    """Give the folder the target's name, or its files where there is one; drop what is `old`."""
    if folder != root and not filesystem.exists(root):
        filesystem.mv(folder, root, recursive=True)
        return
    if folder != root:
        for name in [*names, MANIFEST]:
            filesystem.mv(f"{folder}/{name}", f"{root}/{name}")
    for name in old - set(names):
        filesystem.rm_file(f"{root}/{name}")
    if folder != root:
        filesystem.rm(folder, recursive=True)


def _listed(filesystem: Any, manifest: str) -> set[str]:
    """The names that an earlier result's manifest lists; none where there is no manifest."""
    try:
        text = filesystem.cat_file(manifest).decode()
    except FileNotFoundError:
        return set()
    return {os.path.basename(line) for line in text.splitlines()}
