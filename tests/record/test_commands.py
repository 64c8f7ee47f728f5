"""`whalefall record`, as a user runs it."""

import json

import pytest

from whalefall.cli import main
from whalefall.record import FileWriter, dump


@pytest.fixture
def run(capfd):
    """Run the command; gives exit status, output and errors."""

    def call(*args):
        try:
            main(["record", *map(str, args)])
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        out = capfd.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture
def tree(tmp_path):
    for name in ("a/x", "a/y", "b"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"I am {name}\n")
    return tmp_path / "tree"


@pytest.mark.parametrize("shards", [1, 2])
def test_pack_and_unpack_give_the_same_files(run, tree, tmp_path, shards):
    out = tmp_path / ("p.ffr" if shards == 1 else "p")
    assert run("pack", tree, out, "--shards", shards)[:2] == (0, f"{out}: 3 files\n")
    assert run("unpack", out, tmp_path / "again")[0] == 0
    for path in tree.rglob("*"):
        again = tmp_path / "again" / path.relative_to(tree)
        assert again.is_dir() if path.is_dir() else again.read_bytes() == path.read_bytes()
    status, _, error = run("unpack", out, tmp_path / "again")
    assert status == 2
    assert "is there already" in error


def test_ls_and_cat(run, tree, tmp_path):
    run("pack", tree, tmp_path / "p.ffr")
    assert run("ls", tmp_path / "p.ffr", "-r")[1].split() == [
        "a/",
        "9",
        "a/x",
        "9",
        "a/y",
        "7",
        "b",
    ]
    rows = json.loads(run("ls", tmp_path / "p.ffr", "a", "--json")[1])
    assert rows == [{"name": "x", "bytes": 9}, {"name": "y", "bytes": 9}]
    assert run("cat", tmp_path / "p.ffr", "b", "a/x")[1] == "I am b\nI am a/x\n"
    status, _, error = run("cat", tmp_path / "p.ffr", "none")
    assert status == 2
    assert "has no none" in error
    assert "Traceback" not in error


def test_samples_without_names(run, tmp_path):
    dump([b"zero", b"one", b"two"], tmp_path / "set", 3)
    rows = json.loads(run("ls", tmp_path / "set", "--json")[1])
    assert [row["samples"] for row in rows] == [1, 1, 1]
    assert run("cat", tmp_path / "set", "2")[1] == "two"
    run("unpack", tmp_path / "set", tmp_path / "out")
    assert (tmp_path / "out" / "000001.bin").read_bytes() == b"one"


def test_verify_names_what_is_damaged(run, tmp_path):
    path = tmp_path / "a.ffr"
    with FileWriter(path, 3) as writer:
        for i in range(3):
            writer.write_one(bytes([i]) * 9)
    assert run("verify", path)[:2] == (0, "3 samples in 1 files, 0 damaged\n")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    status, out, error = run("verify", path)
    assert (status, out) == (1, "3 samples in 1 files, 1 damaged\n")
    assert "sample 2" in error
    assert len(json.loads(run("verify", path, "--json")[1])["damaged"]) == 1


def test_a_name_that_leads_out_is_refused(run, tmp_path):
    import pickle
    from collections import OrderedDict

    with FileWriter(tmp_path / "evil.ffr", 2) as writer:
        writer.write_one(b"data")
        writer.write_one(b"piouhjgbr" + pickle.dumps(OrderedDict({"..": OrderedDict(x=0)}), 4))
    status, _, error = run("unpack", tmp_path / "evil.ffr", tmp_path / "out")
    assert status == 2
    assert "leads out" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["ls", "verify", "cat", "unpack", "pack"])
def test_a_missing_source_is_one_line(run, tmp_path, command):
    extra = {"cat": ["0"], "unpack": [tmp_path / "o"], "pack": [tmp_path / "o.ffr"]}
    status, _, error = run(command, tmp_path / "none.ffr", *extra.get(command, []))
    assert status == 2
    assert len(error.strip().splitlines()) == 1
