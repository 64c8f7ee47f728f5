"""What the room promises by name, and what its cores must not touch."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import whalefall.fs
from whalefall.errors import ConfigError
from whalefall.fs.client.filesystem import parse_url
from whalefall.fs.core.layout import chunk_id, chunk_index, shuffled, stripe

ROOM = Path(whalefall.fs.__file__).parent


def test_public_names() -> None:
    assert whalefall.fs.__all__ == [
        "ClusterError", "FileSystemClient", "FsError", "KVCache", "LocalCluster", "StorageError",
        "WhalefallFileSystem",
    ]  # fmt: skip
    for name in whalefall.fs.__all__:
        assert getattr(whalefall.fs, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = whalefall.fs.nothing


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", ["core", "meta/core"])
def test_cores_have_no_clock_no_chance_no_sockets_no_threads(folder: str) -> None:
    for path in (ROOM / folder).glob("*.py"):
        forbidden = imports(path) & {"time", "random", "socket", "threading", "os", "sqlite3"}
        assert not forbidden, (path.name, forbidden)


def test_layout_is_the_same_everywhere() -> None:
    # Recorded once: chunks are found again only while their ids do not change.
    assert shuffled(list(range(8)), 42) == [3, 1, 6, 2, 4, 0, 7, 5]
    assert stripe((5, 6, 7), 2, 1) == (6, 7)
    assert sorted(stripe((1, 2, 3), 8, 7)) == [1, 2, 3]
    assert chunk_id(258, 3).hex() == "00000000000000000102000000000003"
    assert chunk_index(chunk_id(258, 3)) == 3


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("chains", [2, 3, 4, 7, 16, 24])
def test_files_lie_on_all_chains_alike(width: int, step: int, chains: int) -> None:
    table = range(100, 100 + chains)
    for files, off in ((40 * chains, 0.1), (4 * chains, 0.5)):
        stripes = [stripe(table, width, 4096 + i * step) for i in range(files)]
        first = Counter(one[0] for one in stripes)  # all there is of a small file
        for used in (Counter(c for one in stripes for c in one), first):
            even = used.total() / chains
            assert set(used) == set(table)
            assert max(abs(n - even) for n in used.values()) <= off * even, used


def test_urls() -> None:
    assert parse_url("whalefall://a:1,b:2/x/y") == ([("a", 1), ("b", 2)], "/x/y")
    for bad in ("whalefall://host/x", "whalefall:///x", "whalefall://host:port/"):
        with pytest.raises(ConfigError, match="wanted whalefall://host:port/path"):
            parse_url(bad)
