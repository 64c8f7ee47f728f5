"""Metadata operations: POSIX's rules, races between transactions, retries."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fs.mutations import Mutation, broken
from whalefall.fs.kv import Conflict, MemoryKV
from whalefall.fs.meta.core import directories, files
from whalefall.fs.meta.core.records import ROOT, Context, Inode, InodeKind, MetaError, inod, load
from whalefall.fs.meta.server import MetaServer
from whalefall.fs.meta.service import Answer, MetaService, Who


class Names:
    """A service on a store in memory, called as a client would."""

    def __init__(self, store: MemoryKV | None = None) -> None:
        self.now = 1000.0
        self.store = store or MemoryKV()
        self.service = MetaService(self.store, lambda: self.now, lambda: (1, 2, 3))
        self.request = 0

    def answer(self, name: str, uid: int = 0, request: int | None = None, **args: Any) -> Answer:
        self.request += 1
        who = Who("client", self.request if request is None else request, uid, uid)
        return self.service.call(name, who, args)

    def __call__(self, name: str, uid: int = 0, **args: Any) -> Any:
        answer = self.answer(name, uid, **args)
        if answer.errno:
            raise OSError(answer.errno, answer.detail, answer.path)
        return answer.value


@pytest.fixture
def fs() -> Names:
    return Names()


def refused(number: int, call: Callable[[], Any]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def make(fs: Names, path: str, uid: int = 0, mode: int = 0o644) -> Inode:
    inode: Inode = fs("create", uid=uid, path=path, mode=mode, session="")
    return inode


def test_parents_are_made_only_if_asked(fs: Names) -> None:
    refused(errno.ENOENT, lambda: fs("mkdir", path="/a/b"))
    fs("mkdir", path="/a/b/c", parents=True)
    refused(errno.EEXIST, lambda: fs("mkdir", path="/a/b/c", parents=True))
    fs("mkdir", path="/a/b/c", exist_ok=True)
    assert [n for n, _ in fs("list", path="/a")] == ["b"]


def test_links_and_mtime_of_a_directory_follow_its_content(fs: Names) -> None:
    fs("mkdir", path="/d")
    fs.now = 2000.0
    fs("mkdir", path="/d/sub")
    make(fs, "/d/file")
    there = fs("stat", path="/d")
    assert (there.nlink, there.mtime) == (3, 2000.0)


def test_remove_follows_posix(fs: Names) -> None:
    fs("mkdir", path="/d")
    make(fs, "/d/f")
    refused(errno.ENOTEMPTY, lambda: fs("remove", path="/d", directory=True))
    refused(errno.EISDIR, lambda: fs("remove", path="/d", directory=False))
    refused(errno.ENOTDIR, lambda: fs("remove", path="/d/f", directory=True))
    fs("remove", path="/d/f")
    fs("remove", path="/d")
    refused(errno.ENOENT, lambda: fs("stat", path="/d"))


def test_names_have_limits(fs: Names) -> None:
    make(fs, "/" + "x" * 255)
    refused(errno.ENAMETOOLONG, lambda: make(fs, "/" + "x" * 256))
    refused(errno.ENOTDIR, lambda: fs("stat", path="/" + "x" * 255 + "/below"))


def test_rename_replaces_as_posix_says(fs: Names) -> None:
    for path in ("/d", "/empty", "/full"):
        fs("mkdir", path=path)
    make(fs, "/full/x")
    make(fs, "/f")
    make(fs, "/g")
    refused(errno.EISDIR, lambda: fs("rename", old="/f", new="/empty"))
    refused(errno.ENOTDIR, lambda: fs("rename", old="/d", new="/f"))
    refused(errno.ENOTEMPTY, lambda: fs("rename", old="/d", new="/full"))
    refused(errno.EEXIST, lambda: fs("rename", old="/f", new="/g", replace=False))
    refused(errno.EINVAL, lambda: fs("rename", old="/full", new="/full/inside"))
    fs("rename", old="/d", new="/empty")
    fs("rename", old="/f", new="/g")
    assert [n for n, _ in fs("list", path="/")] == ["empty", "full", "g"]
    fs("link", old="/g", new="/h")
    fs("rename", old="/g", new="/h")  # two names of one file: both stay
    assert fs("stat", path="/g").nlink == 2


def test_symbolic_links_are_followed_and_loops_are_seen(fs: Names) -> None:
    fs("mkdir", path="/real")
    make(fs, "/real/f")
    fs("symlink", target="real", path="/short")
    assert fs("stat", path="/short/f").kind is InodeKind.FILE
    assert fs("stat", path="/short", follow=False).kind is InodeKind.SYMLINK
    assert fs("readlink", path="/short") == "real"
    fs("symlink", target="/two", path="/one")
    fs("symlink", target="/one", path="/two")
    refused(errno.ELOOP, lambda: fs("stat", path="/one"))


def test_permissions_are_checked(fs: Names) -> None:
    fs("mkdir", path="/private", mode=0o700)
    make(fs, "/private/f")
    refused(errno.EACCES, lambda: fs("stat", uid=7, path="/private/f"))
    make(fs, "/mine", uid=7, mode=0o600)
    refused(errno.EACCES, lambda: fs("open", uid=8, path="/mine", session=""))
    refused(errno.EACCES, lambda: fs("remove", uid=8, path="/mine"))  # the root is sticky
    refused(errno.EPERM, lambda: fs("set_attributes", uid=8, path="/mine", changes={"mode": 0}))
    assert not fs("access", uid=8, path="/mine", wanted=4)
    fs("remove", uid=7, path="/mine")


def test_a_retry_gets_the_first_answer(fs: Names) -> None:
    first = fs.answer("mkdir", request=99, path="/once")
    again = fs.answer("mkdir", request=99, path="/once")
    assert first.errno == again.errno == 0
    assert fs.answer("mkdir", request=100, path="/once").errno == errno.EEXIST
    assert fs.answer("remove", request=101, path="/once").errno == 0
    assert fs.answer("remove", request=101, path="/once").errno == 0
    assert fs.answer("remove", request=102, path="/once").errno == errno.ENOENT
    assert fs.answer("mkdir", request=102, path="/late").errno == errno.ENOENT  # remembered


def test_bad_arguments_are_refused_in_words(fs: Names) -> None:
    assert fs.answer("mkdir", path=3).errno == errno.EINVAL
    assert fs.answer("mkdir", way="/x").errno == errno.EINVAL
    missing = fs.answer("mkdir", mode=0o755)
    assert missing.errno == errno.EINVAL and missing.detail == "missing ['path']"
    assert fs.answer("mkdir", path="/x", t={}).errno == errno.EINVAL
    assert fs.answer("fly").errno == errno.ENOSYS
    bad = fs.answer("create", path="/f", mode=0o644, session="", layout={"chunk_bytes": 1000})
    assert bad.errno == errno.EINVAL and "power of two" in bad.detail


@pytest.mark.parametrize("write", [False, True])
def test_an_open_file_outlives_its_name(fs: Names, write: bool) -> None:
    inode = make(fs, "/f")
    fs("open", path="/f", session="s1", write=write)
    fs("remove", path="/f")
    assert fs("condemn", inode=inode.id) is None
    assert fs("stat_inode", inode=inode.id).nlink == 0
    fs("close", inode=inode.id, session="s1")
    assert fs("condemn", inode=inode.id).id == inode.id
    fs("forget", inode=inode.id)
    assert fs("garbage") == []


def test_a_file_appears_when_it_is_published(fs: Names) -> None:
    old = make(fs, "/f")
    fresh = fs("begin", mode=0o644, session="s")
    assert fs("stat", path="/f").id == old.id
    fs("publish", inode=fresh.id, path="/f", session="s", length=77)
    there = fs("stat", path="/f")
    assert (there.id, there.length, there.nlink) == (fresh.id, 77, 1)
    assert [inode for inode, _ in fs("garbage")] == [old.id]


def test_a_file_never_published_is_collected_when_its_writer_is_gone(fs: Names) -> None:
    fresh = fs("begin", mode=0o644, session="s")
    assert fs("condemn", inode=fresh.id) is None
    fs.now += 1000
    ((key, number, _),) = fs.service.dead_sessions(300.0)
    assert number == fresh.id
    fs.store.transact(lambda t: t.delete(key))
    assert fs("condemn", inode=fresh.id).id == fresh.id


def test_only_a_writer_that_died_settles_the_length(fs: Names) -> None:
    inode = make(fs, "/f")
    make(fs, "/g")
    fs("create", path="/f", mode=0o644, session="writer")
    fs("open", path="/g", session="reader")
    fs.now += 1000
    settled: list[int] = []
    server: Any = SimpleNamespace(
        service=fs.service, silent_s=300.0, _connection=lambda: SimpleNamespace(close=lambda: None),
        _settle=lambda _, number: settled.append(number),
    )  # fmt: skip
    assert MetaServer.prune(server) == 2
    assert settled == [inode.id]
    assert fs.service.dead_sessions(300.0) == []


def test_length_grows_by_reports_and_shrinks_only_by_truncation(fs: Names) -> None:
    inode = make(fs, "/f")
    fs("report", inode=inode.id, length=100, truncate_version=0)
    fs("report", inode=inode.id, length=50, truncate_version=0)
    assert fs("stat", path="/f").length == 100
    fs("set_length", inode=inode.id, length=10)
    stale_report_is_void(fs, inode.id)


def stale_report_is_void(fs: Names, inode: int) -> None:
    asks = context([0])
    fs.store.transact(lambda t: files.report_length(t, asks, inode, 100, 0))
    assert fs("stat_inode", inode=inode).length == 10, "the file grew back"


# ---- races: two transactions that began on the same snapshot


def context(number: list[int]) -> Context:
    def new() -> int:
        number[0] += 1
        return number[0]

    return Context("c", 0, 0, 0, (), 1.0, new)


def race(fs: Names, *calls: Callable[[Any, Context], Any]) -> list[str]:
    """Run calls on one snapshot, then commit them in turn; the errors' names, "" for none."""
    numbers = [10**6]
    begun = [fs.store.begin() for _ in calls]
    outcome = []
    for transaction, call in zip(begun, calls, strict=True):
        call(transaction, context(numbers))
    for transaction in begun:
        try:
            fs.store.commit(transaction)
            outcome.append("")
        except Conflict:
            outcome.append("conflict")
    return outcome


def is_tree(fs: Names) -> bool:
    """Every directory leads up to the root, and every entry to an inode."""
    rows = fs.store.read(lambda t: t.range(b"INOD", b"INOE"))
    inodes = {i.id: i for _, v in rows if (i := load(v, Inode)) is not None}
    for inode in inodes.values():
        seen: set[int] = set()
        here = inode
        while here.kind is InodeKind.DIRECTORY and here.id != ROOT:
            if here.id in seen or here.parent not in inodes:
                return False
            seen.add(here.id)
            here = inodes[here.parent]
    parents = {int.from_bytes(k[4:12], "little") for k, _ in fs.store.read(
        lambda t: t.range(b"DENT", b"DENU"))}  # fmt: skip
    return parents <= set(inodes)


def cross_renames(fs: Names) -> None:
    for path in ("/a", "/b", "/a/x", "/b/y"):
        fs("mkdir", path=path)
    race(
        fs,
        lambda t, c: directories.rename(t, c, "/a", "/b/y/a"),
        lambda t, c: directories.rename(t, c, "/b", "/a/x/b"),
    )
    assert is_tree(fs), "two renames made a loop"


def removal_against_create(fs: Names) -> None:
    fs("mkdir", path="/d")
    layout = fs.service.layout(1)
    race(
        fs,
        lambda t, c: files.create(t, c, "/d/f", 0o644, layout, ""),
        lambda t, c: directories.remove(t, c, "/d", True),
    )
    assert is_tree(fs), "a file lies in a directory that is gone"


def truncation_against_report(fs: Names) -> None:
    inode = make(fs, "/f")
    fs("report", inode=inode.id, length=100, truncate_version=0)
    fs("set_length", inode=inode.id, length=10)
    stale_report_is_void(fs, inode.id)


META_MUTATIONS = [
    (
        Mutation(25, "rename without its ancestors' conflicts",
                 ((directories, "forbid_loop", "t.conflict(inod(above.id))", "pass"),), 0),
        cross_renames,
    ),
    (
        Mutation(26, "rmdir without the range of its children",
                 ((directories, "require_empty", "t.conflict_range(*children)", "pass"),
                  (directories, "claim", "t.conflict(inod(spot.parent.id))", "pass")), 0),
        removal_against_create,
    ),
    (
        Mutation(27, "a length report is kept across a truncation",
                 ((files, "report_length", "if truncate_version != old.truncate_version:",
                   "if False:"),), 0),
        truncation_against_report,
    ),
]  # fmt: skip


@pytest.mark.parametrize("proof", [p for _, p in META_MUTATIONS])
def test_races_leave_a_tree(fs: Names, proof: Callable[[Names], None]) -> None:
    proof(fs)


@pytest.mark.parametrize(
    ("mutation", "proof"), META_MUTATIONS, ids=[str(m.number) for m, _ in META_MUTATIONS]
)
def test_metadata_mutation_is_caught(
    fs: Names, mutation: Mutation, proof: Callable[[Names], None]
) -> None:
    with broken(mutation), pytest.raises(AssertionError):
        proof(fs)


def test_creates_in_one_directory_do_not_conflict(fs: Names) -> None:
    layout = fs.service.layout(1)
    outcome = race(
        fs, *(lambda t, c, i=i: files.create(t, c, f"/f{i}", 0o644, layout, "") for i in range(3))
    )
    assert outcome == ["", "", ""]


def test_random_operations_agree_with_a_real_file_system(fs: Names, tmp_path: Any) -> None:
    """The host's own file system, as root or not, is the oracle of names and errnos."""
    chance = random.Random(5)
    names = ["/a", "/b", "/a/c", "/a/c/d", "/b/e"]
    real = str(tmp_path)
    for _ in range(600):
        kind = chance.choice(["mkdir", "create", "remove", "rmdir", "rename", "link"])
        one, two = chance.choice(names), chance.choice(names)
        ours: Callable[[], Any]
        theirs: Callable[[], Any]
        if kind == "mkdir":
            ours, theirs = lambda o=one: fs("mkdir", path=o), lambda o=one: os.mkdir(real + o)
        elif kind == "create":
            ours = lambda o=one: fs("create", path=o, mode=0o644, session="", exclusive=True)  # noqa: E731
            theirs = lambda o=one: open(real + o, "x").close()  # noqa: E731
        elif kind == "remove":
            ours = lambda o=one: fs("remove", path=o, directory=False)  # noqa: E731
            theirs = lambda o=one: os.unlink(real + o)  # noqa: E731
        elif kind == "rmdir":
            ours = lambda o=one: fs("remove", path=o, directory=True)  # noqa: E731
            theirs = lambda o=one: os.rmdir(real + o)  # noqa: E731
        elif kind == "rename":
            ours = lambda o=one, t=two: fs("rename", old=o, new=t)  # noqa: E731
            theirs = lambda o=one, t=two: os.rename(real + o, real + t)  # noqa: E731
        else:
            ours = lambda o=one, t=two: fs("link", old=o, new=t)  # noqa: E731
            theirs = lambda o=one, t=two: os.link(real + o, real + t)  # noqa: E731
        got, wanted = _errno(ours), _errno(theirs)
        # With two paths, two things may be wrong at once: which is named is not laid down.
        agree = bool(got) == bool(wanted) if kind in ("rename", "link") else got == wanted
        assert agree, (kind, one, two, got, wanted)
    for path in names:
        assert (_errno(lambda p=path: fs("stat", path=p)) == 0) == os.path.lexists(real + path)
    assert is_tree(fs)
    with pytest.raises(MetaError):
        raise MetaError(errno.ENOENT, "/")
    assert fs.store.read(lambda t: t.get(inod(ROOT))) is not None


def _errno(call: Callable[[], Any]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0
