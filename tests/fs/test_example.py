"""The example, the documentation's first code block, and the commands run and say what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whalefall.cli import main
from whalefall.fs import LocalCluster
from whalefall.fs.profiles import PROFILES

ROOT = Path(__file__).parents[2]
OUTPUT = """\
wrote 5120000 bytes, three times over
a node is dead, the file reads the same: True
names: ['day5.bin', 'moved.txt']
targets that serve again: 9
cached blocks after a restart of the cache: 8
"""


def run(code: str, tmp_path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin",
                           "HOME": str(Path.home())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_prints_what_it_should(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "05_fs.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 60
    assert run(code, tmp_path) == OUTPUT


def test_the_first_block_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "fs.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    assert run(block.group(1), tmp_path) == "b'hello'\n"


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["fs", *args])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_commands(
    cluster: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = cluster.url
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(b"123456789")
    assert command(capsys, "cp", str(source), f"{url}/cli/f")[0] == 0
    assert command(capsys, "ls", f"{url}/cli")[1] == "f\n"
    assert "123456789" not in command(capsys, "ls", "-l", f"{url}/cli")[1]
    assert command(capsys, "cp", f"{url}/cli/f", str(back))[0] == 0
    assert back.read_bytes() == b"123456789"
    assert command(capsys, "checksum", f"{url}/cli/f")[1].startswith("e3069283")
    found = json.loads(command(capsys, "stat", f"{url}/cli/f", "--json")[1])
    assert (found["size"], found["type"]) == (9, "file")
    assert "healthy" in command(capsys, "status", url)[1]
    for listing, count in (("nodes", 4), ("chains", 3), ("targets", 9)):
        assert len(json.loads(command(capsys, listing, url, "--json")[1])) == count
        assert command(capsys, listing, url)[0] == 0
    deadline = time.monotonic() + 20  # the nodes tell with their next heartbeat
    while not json.loads(command(capsys, "df", url, "--json")[1])["used_bytes"]:
        assert time.monotonic() < deadline
    assert "repaired 0" in command(capsys, "scrub", url)[1]
    assert command(capsys, "rm", "-r", f"{url}/cli")[0] == 0
    assert command(capsys, "gc", url)[0] == 0


def test_commands_refuse_in_one_line(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, words in (
        (("cat", f"{cluster.url}/none"), "No such file or directory"),
        (("ls", "whalefall://nowhere"), "wanted whalefall://host:port/path"),
        (("status", "whalefall://127.0.0.1:1"), "no cluster manager answered at 127"),
        (("cp", "a", "b"), "both are local"),
        (("drain", cluster.url, "--node", "77"), "there is no node 77"),
        (("drain", cluster.url, "--node", "1001"), "node 1001 is no storage node (meta)"),
        (("simulate", "--seed", "1", "--profile", "x"), "no profile 'x'"),
        (("simulate", "--seed", "1", "--count", "-3"), "--count is -3, wanted 1 to 1e+09"),
        (("bench", cluster.url, "--size-mib", "-5"), "--size-mib is -5, wanted 1 to"),
    ):
        code, _, err = command(capsys, *args)
        assert code == 2 and words in err and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("port", "99999", "port is 99999, wanted a whole number from 0 to 65535"),
        ("port", "-1", "port is -1, wanted a whole number from 0 to 65535"),
        ("lease", "0", "lease is 0.0, wanted 0.1 to 3600"),
        ("lease", "-1", "lease is -1.0, wanted 0.1 to 3600"),
        ("lease", "nan", "lease is nan, wanted 0.1 to 3600"),
        ("chains", "-1", "chains is -1, wanted a whole number from 1 to 999"),
        ("chains", "1000", "chains is 1000, wanted a whole number from 1 to 999"),
        ("meta", "0", "(meta) is 0, wanted a whole number from 1 to 99"),
        ("meta", "-1", "(meta) is -1, wanted a whole number from 1 to 99"),
        ("nodes", "0", "nodes is 0, wanted a whole number from 1 to 999"),
        ("nodes", "1000", "nodes is 1000, wanted a whole number from 1 to 999"),
        ("replicas", "0", "replicas on 3 nodes is 0, wanted a whole number from 1 to 3"),
        ("scrub", "-1", "scrub is -1.0, wanted 0 to 1e+09"),
    ],
)
def test_numbers_that_make_no_cluster_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    code, _, err = command(capsys, "up", str(tmp_path / "new"), f"--{option}", value)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_the_help_names_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    words = command(capsys, "simulate", "--help")[1]
    assert all(name in words for name in PROFILES)


def test_bench_writes_what_it_is_told_to(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "bench", cluster.url, "--size-mib", "33", "--json")
    assert code == 0 and set(json.loads(out)) == {"write MiB/s", "read MiB/s", "stat/s"}


def test_a_node_is_drained_and_let_back(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.wait_healthy()
    assert "leave" in command(capsys, "drain", cluster.url, "--node", "3")[1]
    fs = cluster.filesystem()
    fs.pipe_file("/drained", b"two replicas")
    states = {
        t["public"] for c in cluster.status()["chains"] for t in c["targets"] if t["node"] == 3
    }
    assert "SERVING" not in states
    assert "serve again" in command(capsys, "drain", cluster.url, "--node", "3", "--back")[1]
    cluster.wait_healthy()
    assert fs.cat_file("/drained") == b"two replicas"


def test_simulate_replays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "simulate", "--seed", "14")
    assert code == 0 and "HEAL" in out and "0 violations" in out
    assert command(capsys, "simulate", "--seed", "14")[1] == out
