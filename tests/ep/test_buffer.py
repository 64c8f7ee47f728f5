"""ep.Buffer: the original's API on gloo ranks; checks run in the ranks (buffer_children.py)."""

import ast
import inspect
import json
from functools import cache
from pathlib import Path

import pytest

import whalefall.ep
from whalefall import ep, launch
from whalefall.errors import ConfigError

HERE = Path(__file__).parent
CHECKS = [
    node.name.removeprefix("check_")
    for node in ast.parse((HERE / "buffer_children.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
GROUPS = [(2, 2), (4, 2), (4, 4)]  # ranks, ranks a host


@pytest.fixture(scope="module")
def buffers(tmp_path_factory, start):
    """(ranks, ranks a host) → what every check said on every rank."""

    @cache
    def run(size: int, per_host: int) -> list[dict[str, str]]:
        folder = str(tmp_path_factory.mktemp("group"))
        hosts = [f"host {r // per_host}" for r in range(size)] if per_host < size else None
        tasks = start("all_checks", size, module="buffer_children", folder=folder, hosts=hosts)
        return launch.run(tasks, 120)

    return run


@pytest.mark.ranks
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: "{}x{}".format(*g))
def test_check_holds_on_every_rank(buffers, group: tuple[int, int], check: str) -> None:
    said = [rank.get(check, "not reached") for rank in buffers(*group)]
    assert not any(said), "\n".join(f"rank {r}: {text}" for r, text in enumerate(said) if text)


def without_a_rank(start, folder: Path, victim: int, hosts: list[str] | None) -> list[list]:
    """What the other three of four ranks say of two steps with it, two without it, and a mask."""
    tasks = start(
        "go_on_without_a_rank", 4, module="buffer_children", folder=str(folder), victim=victim,
        hosts=hosts,
    )  # fmt: skip
    said = []
    with launch.Group(tasks) as group:
        for member in (group.members[f"rank {r}"] for r in range(4) if r != victim):
            member.process.wait(timeout=100)
            assert member.exit().code == 0, str(member.exit())
            said.append(member.value())
    return said


UNEVEN = ["a", "b", "b", "c"]  # 1 serves 0 and 3 on host b, 2 serves nobody


@pytest.mark.ranks
@pytest.mark.parametrize(("victim", "hosts"), [(1, None), (0, UNEVEN), (2, UNEVEN), (3, UNEVEN)])
def test_with_shrink_the_others_go_on_without_a_dead_rank(start, tmp_path, victim, hosts) -> None:
    whole, gone = [[], True], [[victim], True]
    for said in without_a_rank(start, tmp_path, victim, hosts):
        assert said[:-1] == [whole, whole, gone, gone]
        assert said[-1] == [1, 0, 0, 0]


@pytest.mark.ranks
def test_with_shrink_a_dead_proxy_is_named_and_no_living_rank_masked(start, tmp_path) -> None:
    whole = [[], True]
    for said in without_a_rank(start, tmp_path, 1, UNEVEN):
        assert said[:-1] == [whole, whole, 1, 1]


@pytest.mark.ranks
def test_what_is_under_way_outlives_the_buffer_and_then_its_thread_ends(start, tmp_path) -> None:
    tasks = start("drop_under_way", 2, module="buffer_children", folder=str(tmp_path))
    assert launch.run(tasks, 60) == [[True, [], True, []]] * 2


@pytest.mark.ranks
def test_a_destroyed_buffer_says_so(start, tmp_path) -> None:
    tasks = start("use_after_destroy", 2, module="buffer_children", folder=str(tmp_path))
    said = ["ep: the Buffer (or engine) is destroyed; make a new one"] * 10
    assert launch.run(tasks, 60) == [said] * 2


SIGNATURES = json.loads((HERE / "signatures.json").read_text())
METHODS = [
    (name, method)
    for name in ("Buffer", "Config", "EventHandle", "EventOverlap")
    for method in SIGNATURES[name]
]


@pytest.mark.parametrize(("name", "method"), METHODS, ids=lambda x: x)
def test_signatures_are_the_originals(name: str, method: str) -> None:
    if (name, method) == ("EventHandle", "__init__"):
        return  # ours takes what it waits for, by keyword of our own
    function = getattr(getattr(ep, name), method)
    ours = [
        [p.name, "required" if p.default is p.empty else p.default]
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]
    assert ours == SIGNATURES[name][method]


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_what_goes_between_hosts_by_name_gets_each_argument(monkeypatch, name: str) -> None:
    function = getattr(ep.Buffer, f"internode_{name}")
    values = {p: object() for p in inspect.signature(function).parameters if p != "self"}
    monkeypatch.setattr(ep.Buffer, name, lambda self, *given: given)
    buffer = object.__new__(ep.Buffer)
    buffer.runtime = None
    given = list(function(buffer, *values.values()))
    if name == "dispatch":
        assert given.pop(9) == 0  # num_worst_tokens, which the original has not here
    assert given == list(values.values())
    with pytest.raises(ConfigError, match=f"config is None; get_{name}_config gives it"):
        function(buffer, *list(values.values())[:2])


def test_names_are_pinned() -> None:
    names = """Buffer Config Engine EventHandle EventOverlap FileGroup Group Handle Layout Received
    RoutingError TcpGroup TorchGroup hosts_touched route"""
    assert sorted(whalefall.ep.__all__) == sorted(names.split())
    for name in whalefall.ep.__all__:
        assert getattr(whalefall.ep, name).__doc__


def test_the_room_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, whalefall.ep; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("ranks", "nvl", "rdma"), [(8, 335_709_824, 0), (16, 377_673_984, 91_887_744)]
)
def test_buffer_sizes_are_the_originals(ranks: int, nvl: int, rdma: int) -> None:
    config = ep.Buffer.get_dispatch_config(ranks)
    assert config.get_nvl_buffer_size_hint(14336, ranks) == nvl
    assert config.get_rdma_buffer_size_hint(14336, ranks) == rdma


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [((128, 7168, 8, 288), 2_146_961_792), ((16, 5120, 8, 256), 170_395_776)],
)
def test_low_latency_sizes_are_the_originals(arguments: tuple[int, ...], wanted: int) -> None:
    assert ep.Buffer.get_low_latency_rdma_size_hint(*arguments) == wanted


def test_any_number_of_ranks_has_a_config_and_nonsense_has_none() -> None:
    assert ep.Buffer.get_dispatch_config(3) == ep.Buffer.get_dispatch_config(4)
    assert ep.Buffer.get_combine_config(1000) == ep.Buffer.get_combine_config(160)
    with pytest.raises(ConfigError, match="wanted 0 < send < receive"):
        ep.Config(20, 300, 256)
    assert ep.Config(20, 6, 256, 100, 128).num_max_rdma_chunked_recv_tokens == 200


def test_the_number_of_sms_is_even() -> None:
    with pytest.raises(ConfigError, match="got 3, wanted an even number"):
        ep.Buffer.set_num_sms(3)


def test_events_wait_run_their_hook_once_and_can_be_released() -> None:
    ran = []
    event = ep.EventOverlap(ep.EventHandle())
    event.register_hook_after_wait(lambda: ran.append(1))
    with pytest.raises(ConfigError, match="registered already"):
        event.register_hook_after_wait(lambda: None)
    assert event(release_handle=True) is event
    event.current_stream_wait()
    event.current_stream_wait(release_handle=True)
    assert ran == [1] and event.event is None
    with pytest.raises(ConfigError, match="event is None"):
        event.current_stream_wait()
    with ep.EventOverlap():
        pass


def test_a_buffer_needs_a_group() -> None:
    with pytest.raises(ConfigError, match="neither group nor comm"):
        ep.Buffer(None)


@pytest.mark.ranks
def test_whatever_is_wrong_is_refused_in_one_line_and_leaves_no_rank_out_of_step(
    start, tmp_path
) -> None:
    tasks = start("refuse_everything", 1, module="bad_children", folder=str(tmp_path))
    said = launch.run(tasks, 100)[0]
    assert not said, "\n".join(said[:20])
