"""Packed folders: names, order, damaged and hostile trees, shards joined again."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest

from whalefall.errors import ConfigError, CorruptError, DtypeError, MissingError
from whalefall.record import FileReader, FileWriter, PackedFolder, pack_folder, pack_shards
from whalefall.record.packed import MAGIC


@pytest.fixture
def tree(tmp_path):
    """A folder of six files, an empty folder and a link."""
    root = tmp_path / "tree"
    for name in ("b/1.txt", "b/0.txt", "a/deep/x", "a/y", "z", "10"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "empty").mkdir()
    os.symlink(root / "a", root / "link")
    return root


@pytest.fixture
def packed(tree, tmp_path):
    pack_folder(tree, tmp_path / "p.ffr")
    return PackedFolder(tmp_path / "p.ffr")


def test_files_are_numbered_depth_first_and_sorted(packed):
    names = ["10", "a/deep/x", "a/y", "b/0.txt", "b/1.txt", "link/deep/x", "link/y", "z"]
    assert list(packed.walk()) == list(zip(names, range(8), strict=True))


def test_the_trailer_is_a_pickle_of_ordered_dicts(packed):
    raw = packed.reader.read_one(packed.reader.n - 1).tobytes()
    d = OrderedDict
    a = d([("deep", d(x=1)), ("y", 2)])
    b = d([("0.txt", 3), ("1.txt", 4)])
    link = d([("deep", d(x=5)), ("y", 6)])
    wanted = d([("10", 0), ("a", a), ("b", b), ("empty", d()), ("link", link), ("z", 7)])
    assert raw[:9] == b"piouhjgbr"
    assert pickle.loads(raw[9:]) == wanted
    assert type(pickle.loads(raw[9:])) is OrderedDict


def test_contents_are_found_by_name(packed):
    assert packed.read_one("b/1.txt").tobytes() == b"b/1.txt"
    assert [d.tobytes() for d in packed.read(["z", Path("a/deep/x")])] == [b"z", b"a/deep/x"]
    assert packed.num_files() == 8


def test_kinds_of_names(packed):
    assert packed.is_file("a/y")
    assert packed.is_dir("a")
    assert packed.is_dir("")
    assert not packed.is_file("a")
    assert not packed.exists("a/nothing")
    assert not packed.exists("z/below a file")
    assert packed.exists("empty")


def test_listing(packed):
    assert packed.list("b") == ["0.txt", "1.txt"]
    assert packed.list() == ["10", "a", "b", "empty", "link", "z"]
    assert packed.list("a", list_file=False) == ["deep"]
    assert packed.list("a", recursive=True) == ["deep", Path("deep/x"), "y"]
    assert packed.list("a", list_dir=False, recursive=True) == [Path("deep/x"), "y"]


@pytest.mark.parametrize("name", ["none", "a", "z/x"])
def test_reading_what_is_no_file_is_refused(packed, name):
    with pytest.raises(MissingError, match=name):
        packed.read_one(name)


def test_listing_what_is_no_folder_is_refused(packed):
    with pytest.raises(MissingError, match="does not exist"):
        packed.list("none")
    with pytest.raises(MissingError, match="is a file"):
        packed.list("z")
    with pytest.raises(DtypeError, match="wanted a list"):
        packed.read("z")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "tree", [Bomb(), {"x": Bomb()}, {"x": 5}, {"x": -1}, {"x": "text"}, [1], {1: 0}, {"x": True}]
)
def test_a_hostile_tree_is_refused_and_runs_nothing(tmp_path, monkeypatch, tree):
    monkeypatch.chdir(tmp_path)
    with FileWriter("a.ffr", 2) as writer:
        writer.write_one(b"data")
        writer.write_one(MAGIC + pickle.dumps(tree, 4))
    with pytest.raises(CorruptError, match="tree"):
        PackedFolder("a.ffr")
    assert not Path("exploded").exists()


def test_a_plain_file_is_no_packed_folder(tmp_path):
    for number, count in enumerate((0, 1)):
        with FileWriter(tmp_path / f"{number}.ffr", count) as writer:
            for _ in range(count):
                writer.write_one(b"data")
        with pytest.raises(ValueError, match="not a packed folder"):
            PackedFolder(tmp_path / f"{number}.ffr")


def test_a_link_in_a_circle_is_refused(tree, tmp_path):
    os.symlink(tree, tree / "a" / "up")
    with pytest.raises(CorruptError, match="circle"):
        pack_folder(tree, tmp_path / "p.ffr")


def test_shards_are_joined_again(tree, tmp_path, packed):
    shards = pack_shards(tree, tmp_path / "out", 3, workers=2)
    assert len(shards) == 3
    joined = PackedFolder(tmp_path / "out")
    assert sorted(name for name, _ in joined.walk()) == sorted(name for name, _ in packed.walk())
    assert joined.num_files() == 8
    assert joined.is_dir("empty")
    for name, _ in packed.walk():
        assert joined.read_one(name).tobytes() == packed.read_one(name).tobytes()
    with pytest.raises(ConfigError, match="already"):
        pack_shards(tree, tmp_path / "out", 2)


def test_the_same_name_in_two_shards_is_refused(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for number in range(2):
        pack_folder(tree / "b", out / f"{number}.ffr")
    with pytest.raises(CorruptError, match="in another shard too"):
        PackedFolder(out)


def test_one_sample_a_file_and_the_tree(packed):
    assert FileReader(packed.reader.fnames).n == 9


def hostile(tmp_path: Path, trailer: bytes) -> Path:
    path = tmp_path / "hostile.ffr"
    with FileWriter(path, 2) as writer:
        writer.write_one(b"a file")
        writer.write_one(MAGIC + trailer)
    return path


def test_a_tree_that_holds_itself_is_corrupt(tmp_path):
    with pytest.raises(CorruptError, match="holds a folder twice"):
        PackedFolder(hostile(tmp_path, b"\x80\x04}\x94(\x8c\x01ah\x00u."))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_folders_too_deep_to_walk_are_corrupt(tmp_path, kind):
    def trailer(depth):  # written by hand: pickle itself recurses
        if kind is dict:
            return b"\x80\x04" + b"}\x8c\x01a" * depth + b"}\x8c\x01aK\x00s" + b"s" * depth + b"."
        made = b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R\x8c\x01a"
        return b"\x80\x04" + made * depth + made + b"K\x00s" + b"s" * depth + b"."

    folder = PackedFolder(hostile(tmp_path, trailer(500)))
    assert len(list(folder.walk())) == 1 and len(folder.list(recursive=True)) == 501
    with pytest.raises(CorruptError, match="more than 512 deep"):
        PackedFolder(hostile(tmp_path, trailer(3000)))
