"""Names read straight from a tree's pickle: the same tree as Python's own machine makes."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from whalefall.errors import WhalefallError
from whalefall.record import PackedFolder
from whalefall.record.names import FileNames, NamedTree, read_names
from whalefall.record.packed import MAGIC, pack_files, read_tree


def ordered(tree: dict[str, Any]) -> Any:
    return OrderedDict((k, ordered(v) if isinstance(v, dict) else v) for k, v in tree.items())


def plain(tree: Any) -> Any:
    return {k: plain(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def count(tree: dict[str, Any]) -> int:
    return sum(count(v) if isinstance(v, dict) else 1 for v in tree.values())


def grown(chance: random.Random, width: int, depth: int, made: list[int]) -> dict[str, Any]:
    """A tree whose files are numbered as they come."""
    tree: dict[str, Any] = {}
    for i in range(chance.randint(0, width)):
        name = chance.choice(["a", "ö", "名", "x" * 300]) + str(i)
        if depth and chance.random() < 0.3:
            tree[name] = grown(chance, width, depth - 1, made)
        else:
            tree[name] = made[0]
            made[0] += 1
    return tree


TREES = {
    "empty": {},
    "one file": {"a": 0},
    "one folder": {"d": {"a": 0}},
    "an empty folder": {"d": {}, "a": 0, "e": {}},
    "more than a batch of files": {str(i): i for i in range(2501)},
    "more than a batch of folders": {str(i): {"x": 2 * i, "y": 2 * i + 1} for i in range(1700)},
    "numbers of all widths": {f"{i}": i for i in range(70_000)},
    "samples in another order": {"a": 2, "b": {"c": 0, "d": 1}},
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_the_tree_is_the_pickles_tree(name: str, kind: type) -> None:
    tree = TREES[name]
    same(tree, kind is OrderedDict)


def same(tree: dict[str, Any], as_ordered: bool) -> None:
    data = pickle.dumps(ordered(tree) if as_ordered else tree, protocol=4)
    names = read_names(memoryview(data), count(tree))
    assert names is not None
    found = NamedTree(names, 0)
    assert plain(found) == tree and list(found) == list(tree) == found.texts()
    assert len(found) == len(tree)
    paths = dict(walked(tree, ""))
    assert list(FileNames(names)) == [paths[i] for i in range(len(paths))]


def walked(tree: dict[str, Any], above: str) -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from walked(value, f"{above}{key}/")
        else:
            yield value, above + key


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_is_the_same(seed: int) -> None:
    chance = random.Random(seed)
    same(grown(chance, chance.choice([3, 40]), 3, [0]), bool(seed % 2))


@pytest.mark.parametrize(
    ("tree", "files"),
    [
        ({"a": 0, "b": 0}, 2),  # one sample twice
        ({"a": 0, "b": 2}, 2),
        ({"a": 0}, 2),
        ({"a": -1}, 1),
        ({"a": 2**40}, 1),
        ({"a": "text"}, 1),
        ({1: 0}, 1),
        ([0], 1),
        (print, 1),
    ],
)
def test_what_is_no_such_tree_is_left_to_pythons_machine(tree: Any, files: int) -> None:
    assert read_names(memoryview(pickle.dumps(tree, protocol=4)), files) is None


def test_a_damaged_pickle_is_refused_or_is_some_tree_and_never_more() -> None:
    tree = ordered({"d": {str(i): i for i in range(30)}, "e": 30})
    good = pickle.dumps(tree, protocol=4)
    chance = random.Random(3)
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        names = read_names(memoryview(bytes(bad[: chance.choice([len(bad), len(bad) // 2])])), 31)
        if names is not None:
            assert len(FileNames(names)) == 31
    try:
        read_tree("x", MAGIC + good[:-5], 31)
    except WhalefallError:
        return
    pytest.fail("a cut pickle was taken")


def test_a_packed_folder_gives_its_names_in_the_order_of_its_samples(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}")
        files[-1].write_text(str(i))
    pack_files({"d": {"one": 0, "two": 1}, "z": 2}, files, tmp_path / "p.ffr")
    packed = PackedFolder(tmp_path / "p.ffr")
    assert list(packed.names) == ["d/one", "d/two", "z"] and packed.names[-1] == "z"
    assert isinstance(packed.structure, NamedTree) and packed.list("d") == ["one", "two"]
    pack_files({"y": 0}, files[:1], tmp_path / "q.ffr")
    both = PackedFolder([tmp_path / "p.ffr", tmp_path / "q.ffr"])
    assert list(both.names) == ["d/one", "d/two", "z", "y"]
