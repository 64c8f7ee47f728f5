"""The block cache: on a folder and on a cluster, over restarts, damage and eviction."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from whalefall.errors import ConfigError
from whalefall.fs import KVCache, LocalCluster

BLOCK = 4096


def blocks(*numbers: int) -> dict[bytes, bytes]:
    return {
        hashlib.sha256(bytes([n])).digest(): hashlib.shake_128(bytes([n])).digest(BLOCK)
        for n in numbers
    }


@pytest.fixture(params=["folder", "cluster"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path)
    cluster: LocalCluster = request.getfixturevalue("cluster")
    return f"{cluster.url}/kv-{os.urandom(4).hex()}"


def test_blocks_come_back_in_order_and_survive_a_restart(place: str) -> None:
    cache = KVCache(place, BLOCK, "model")
    there = blocks(*range(20))
    assert cache.put_many(there) == 20
    assert cache.put_many(blocks(19, 20)) == 1
    for again in (cache, KVCache(place, BLOCK, "model")):
        keys = [*there, b"nothing", *blocks(20)]
        wanted = [*there.values(), None, *blocks(20).values()]
        assert again.get_many(keys) == wanted
        assert again.exists(keys) == [w is not None for w in wanted]
    assert len(KVCache(place, BLOCK, "other")) == 0
    assert len(KVCache(place, 2 * BLOCK, "model")) == 0


def test_another_process_sees_them_after_a_refresh(place: str) -> None:
    one, two = KVCache(place, BLOCK), KVCache(place, BLOCK)
    one.put_many(blocks(1))
    assert two.get_many(list(blocks(1))) == [None]
    assert two.refresh() == 1
    assert two.get_many(list(blocks(1))) == list(blocks(1).values())
    assert one.delete(blocks(1)) == 1
    assert two.get_many(list(blocks(1))) == [None]


def test_the_least_recently_used_leave_first(place: str) -> None:
    cache = KVCache(place, BLOCK, capacity_bytes=3 * BLOCK)
    for number in (1, 2, 3):
        cache.put_many(blocks(number))
    cache.get_many(list(blocks(1)))
    cache.put_many(blocks(4))
    held = [cache.exists(list(blocks(n)))[0] for n in (1, 2, 3, 4)]
    assert held == [True, False, True, True] and cache.used_bytes <= 3 * BLOCK


def test_old_blocks_are_gone(tmp_path: Path) -> None:
    cache = KVCache(tmp_path, BLOCK, ttl_s=0.2)
    cache.put_many(blocks(1))
    assert cache.exists(list(blocks(1))) == [True]
    time.sleep(0.25)
    assert cache.exists(list(blocks(1))) == [False]
    assert KVCache(tmp_path, BLOCK, ttl_s=0.2).refresh() == 0
    assert list(tmp_path.rglob("*.kv")) == []


def test_torn_and_changed_blocks_are_never_returned(tmp_path: Path) -> None:
    cache = KVCache(tmp_path, BLOCK)
    cache.put_many(blocks(1, 2))
    (path,) = tmp_path.rglob("*.kv")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for order in ((1, 2), (2, 1)):
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        cache = KVCache(tmp_path, BLOCK)
        wanted = [blocks(1).get(key) for key in blocks(*order)]
        assert cache.get_many(list(blocks(*order))) == wanted
        assert cache.damaged == 1 and not path.exists()
    for damaged in (whole[:-1], whole[:40], whole[: len(whole) // 2], b"7 bytes", b"",
                    b"x" * len(whole), whole[:50] + b"x" + whole[51:]):  # fmt: skip
        path.write_bytes(damaged)
        cache = KVCache(tmp_path, BLOCK)
        assert cache.get_many(list(blocks(1, 2))) == [None, None]
        assert cache.damaged == 1 and not path.exists()
        assert cache.put_many(blocks(1, 2)) == 2
        (path,) = tmp_path.rglob("*.kv")
        assert KVCache(tmp_path, BLOCK).get_many(list(blocks(1, 2))) == list(blocks(1, 2).values())


def test_a_file_cut_while_it_is_known_goes_and_is_written_again(tmp_path: Path) -> None:
    cache = KVCache(tmp_path, BLOCK)
    cache.put_many(blocks(1, 2))
    (path,) = tmp_path.rglob("*.kv")
    path.write_bytes(path.read_bytes()[: BLOCK + 500])
    assert cache.get_many(list(blocks(2, 1))) == [None, *blocks(1).values()]
    assert cache.damaged == 1 and len(cache) == 0 and not path.exists()
    assert cache.put_many(blocks(1, 2)) == 2


def test_a_whole_file_of_another_format_is_left_alone(tmp_path: Path) -> None:
    KVCache(tmp_path, BLOCK).put_many(blocks(1))
    (path,) = tmp_path.rglob("*.kv")
    path.write_bytes(b"WFkv0002" + path.read_bytes()[8:])
    cache = KVCache(tmp_path, BLOCK)
    assert cache.get_many(list(blocks(1))) == [None]
    assert cache.damaged == 0 and path.exists()


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_that_cannot_be_removed_is_counted_once(tmp_path, monkeypatch, cut) -> None:
    cache = KVCache(tmp_path, BLOCK)
    cache.put_many(blocks(1))
    (path,) = tmp_path.rglob("*.kv")
    whole = path.read_bytes()
    path.write_bytes(b"7 bytes" if cut else whole[:-1] + bytes([whole[-1] ^ 1]))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(cache.fs), "rm_file", refuse)
    cache = KVCache(tmp_path, BLOCK)
    for _ in range(2):
        assert cache.get_many(list(blocks(1))) == [None]
        assert cache.refresh() == 0 and cache.damaged == 1
    assert cache.put_many(blocks(1)) == 1
    assert cache.get_many(list(blocks(1))) == list(blocks(1).values())


def test_wrong_sizes_and_names_are_refused(tmp_path: Path) -> None:
    cache = KVCache(tmp_path, BLOCK)
    with pytest.raises(ConfigError, match="has 5 bytes, wanted 4096"):
        cache.put("key", b"short")
    with pytest.raises(ConfigError, match="wanted > 0"):
        KVCache(tmp_path, 0)
    with pytest.raises(ConfigError, match="namespace"):
        KVCache(tmp_path, BLOCK, "a/b")
    assert cache.put("a key of any length", bytes(BLOCK)) == 1
    assert cache.get("a key of any length") == bytes(BLOCK)
