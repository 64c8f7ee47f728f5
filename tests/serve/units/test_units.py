"""Units of processes give the answers of one process, bit for bit, whoever dies meanwhile."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

import whalefall
from tests.serve.units.conftest import collect, requests, units
from whalefall import comm, trace
from whalefall.engine import SamplingParams
from whalefall.engine.structured import StructuredOutputs
from whalefall.errors import ConfigError, RankFailure
from whalefall.serve.core import DecodeLoad, ExpertRule, Place, ScaleRule

pytestmark = pytest.mark.ranks
LAYOUTS = [
    ("1x1", "1x1", {"transfer": "tcp"}),
    ("1x2", "1x2", {"transfer": "shm"}),
    ("1x2", "1x2", {"transfer": "tcp", "overlap": False, "redundant": 4}),
    ("2x2", "2x4", {"redundant": 3}),
]


@pytest.mark.parametrize(("prefill", "decode", "settings"), LAYOUTS, ids=lambda v: str(v))
def test_layouts_give_the_tokens_and_logprobs_of_one_process(
    model, alone, prefill, decode, settings
) -> None:
    wanted = requests(8)
    with units(model, prefill, decode, **settings) as gateway:
        assert collect(gateway, wanted) == alone(wanted)
        by_kind = counted(gateway)
    assert by_kind["decode"]["prompt_tokens"] == 0
    assert by_kind["prefill"]["prompt_tokens"] > 0
    answers = sum(params.n for _, params in wanted)
    assert by_kind["prefill"]["generated_tokens"] == answers  # the first token of each
    assert by_kind["decode"]["generated_tokens"] == answers * 11
    assert comm.sweep("kv-") == []


@pytest.mark.parametrize("compute", ["w8a8", "fp32"])
def test_computes_give_the_bits_of_one_process(model, alone, compute) -> None:
    wanted = requests(4)
    with units(model, "1x2", "1x2", engine={"compute": compute}) as gateway:
        assert collect(gateway, wanted) == alone(wanted, compute=compute)


BUNDLED = str(Path(whalefall.__file__).parent / "model" / "bundled")
DRAFTING = {"speculative": True, "draft_tokens": 2, "max_model_len": 1024}


@pytest.mark.parametrize("killed", ["", "decode", "prefill"])
def test_units_that_draft_answer_as_one_process_that_does_not(alone_on, killed) -> None:
    wanted, done = requests(5, tokens=30), []

    def between(count: int) -> None:
        if killed and count > 40 and not done:
            kill_one(gateway, killed)
            done.append(count)

    with units(BUNDLED, "1x2", "1x2", engine=DRAFTING) as gateway:
        assert collect(gateway, wanted, between) == alone_on(BUNDLED, wanted, max_model_len=1024)
        time.sleep(0.3)
        stats = gateway.stats()
    assert 0 < stats.spec_accepted < stats.spec_drafted


def counted(gateway) -> dict[str, dict[str, int]]:
    """Counters by kind of unit, once all ranks have reported."""
    time.sleep(0.3)
    found: dict[str, dict[str, int]] = {}
    for place, stats in gateway.unit_stats().items():
        sums = found.setdefault(place.unit.split("-")[0], {})
        for name in ("prompt_tokens", "generated_tokens"):
            sums[name] = sums.get(name, 0) + getattr(stats, name)
    return found


def kill_one(gateway, kind: str) -> None:
    """kill -9 the last rank of the first unit of a kind."""
    unit = next(u for u in gateway.fleet.units.values() if u.kind == kind)
    os.kill(unit.pids[-1], signal.SIGKILL)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_unit_killed_in_mid_stream_changes_no_answer(model, alone, kind) -> None:
    wanted, killed = requests(10, tokens=40), []

    def between(count: int) -> None:
        if count > 30 and not killed:
            kill_one(gateway, kind)
            killed.append(count)

    with units(model, "1x2", "2x2") as gateway:
        assert collect(gateway, wanted, between) == alone(wanted)
        assert killed and gateway.fleet.restarts == 1
        again = requests(3)
        assert collect(gateway, again) == alone(again)  # on units that were started again
        assert all(unit.up for unit in gateway.fleet.units.values() if unit.kind == "prefill")


def test_the_only_units_killed_again_and_again_change_no_answer(model, alone) -> None:
    wanted, killed = requests(6, tokens=60), []

    def between(count: int) -> None:
        if count > 60 * (len(killed) + 1) and len(killed) < 3:
            with contextlib.suppress(StopIteration, ProcessLookupError):
                kill_one(gateway, "prefill" if len(killed) % 2 else "decode")
                killed.append(count)

    with units(model, "1x1", "1x2") as gateway:
        assert collect(gateway, wanted, between) == alone(wanted)
        assert len(killed) == 3 and gateway.fleet.restarts >= 3


def test_a_stopped_gateway_leaves_no_process_and_no_memory(model) -> None:
    with units(model, "1x2", "1x1") as gateway:
        pids = [pid for unit in gateway.fleet.units.values() for pid in unit.pids]
        folder = gateway.fleet.folder
        gateway.add("r", list(range(5, 90)), SamplingParams(max_tokens=200, ignore_eos=True))
        while not any(delta.token_ids for delta in gateway.step()):
            pass
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not folder.exists()
    assert comm.sweep("kv-") == []


def test_units_that_do_not_start_say_why(model) -> None:
    with pytest.raises(RankFailure, match=r"do not start: ConfigError: .*kv_cache_bytes is 1") as e:
        with units(model, "1x1", "1x1", engine={"num_blocks": None, "kv_cache_bytes": 1}):
            pass
    assert "\n" not in str(e.value)  # and no second try, which would say the same


def test_each_rank_leaves_a_trace_where_asked(model, tmp_path) -> None:
    with units(model, "1x1", "1x2", trace=str(tmp_path)) as gateway:
        collect(gateway, requests(2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["decode-1-0.json.gz", "decode-1-1.json.gz", "prefill-0-0.json.gz"]
    found = trace.summarize(tmp_path / names[0])
    assert {"ep.dispatch", "MLP0.0", "MLP1.1"} <= {kernel.name for kernel in found.kernels}


@pytest.fixture(scope="module")
def pair(model):
    """Units that several tests use, one after another: a start takes seconds."""
    with units(model, "1x1", "1x2") as gateway:
        yield gateway


def test_a_cancelled_request_frees_its_ranks(pair) -> None:
    gateway = pair
    for number in range(5):
        params = SamplingParams(max_tokens=900, ignore_eos=True, n=2)
        gateway.add(f"r{number}", list(range(5, 90)), params)
    count = 0
    while count < 20:
        count += sum(len(delta.token_ids) for delta in gateway.step())
    for number in range(5):
        gateway.cancel(f"r{number}")
    finish = []
    while gateway.has_work():
        finish += [d.finish_reason for d in gateway.step() if d.finish_reason]
    assert finish == ["cancelled"] * 10
    deadline = time.monotonic() + 10
    while sum(s.kv_used for s in gateway.unit_stats().values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sum(s.kv_used for s in gateway.unit_stats().values()) == 0
    assert all(gateway.router.is_empty(name) for name in gateway.router.units)


def test_units_follow_the_load_up_and_down_without_losing_an_answer(model, alone) -> None:
    wanted = requests(8, tokens=100)
    rule = ScaleRule(set_point=20.0, calm_s=1.0)
    with units(model, "1x1", "1-2x1", decode_rule=rule, engine={"max_sequences": 2}) as gateway:
        deadline, right = time.monotonic() + 30, alone(wanted)
        while decode_units(gateway) < 2 and time.monotonic() < deadline:
            assert collect(gateway, wanted) == right
        assert decode_units(gateway) == 2
        assert collect(gateway, wanted) == right
        while decode_units(gateway) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert decode_units(gateway) == 1
        assert gateway.fleet.restarts == 0
        assert collect(gateway, wanted) == right


def decode_units(gateway) -> int:
    return sum(u.kind == "decode" and u.up for u in list(gateway.fleet.units.values()))


def skewed(count: int) -> list:
    """Prompts of one token over and over: a few experts get most of the work."""
    return [([7 + i % 2] * 60, SamplingParams(max_tokens=60, temperature=0)) for i in range(count)]


def test_experts_are_placed_anew_while_answers_flow(model, alone) -> None:
    rule = ExpertRule(interval_s=0.2, balance=0.97, max_moves=3)
    wanted = skewed(16)
    with units(model, "1x2", "1x2", experts=rule, redundant=4) as gateway:
        found = collect(gateway, wanted)
        time.sleep(0.3)
        balances = [b for b in gateway.experts.units.values() if b.version]
        versions = {p: s.placement for p, s in gateway.unit_stats().items()}
    assert found == alone(wanted)
    assert balances and all(b.after < b.before for b in balances)
    assert any(versions.values()) and gateway.fleet.restarts == 0


def spread(gateway) -> list[int]:
    """Tokens that each of two decode ranks generates for four equal answers."""

    def generated() -> dict[Place, int]:
        time.sleep(0.3)
        stats = sorted(gateway.unit_stats().items())
        return {p: s.generated_tokens for p, s in stats if p.unit.startswith("decode")}

    before = generated()  # a rank that never worked has not reported yet
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
    collect(gateway, [([9, 8, 7 + i], params) for i in range(4)])
    return [late - before.get(place, 0) for place, late in generated().items()]


def simulated_peak() -> float:
    """The fullest of the simulator's decode units, as a share of all."""
    from whalefall.serve.simulate import Cluster
    from whalefall.serve.simulated_cluster import ClusterSpec, Day

    spec = ClusterSpec(1, 1, 1e6, lambda batch: 0.05, 64, 1e6, 1e6, 1e6)
    cluster = Cluster(spec, Day((1.0,), 1e9, 0.0, 1e8, weight=1), 0)
    made = [type(cluster.decode[0])(0.0) for _ in range(4)]
    cluster.decode[:] = made
    for _ in range(8):
        cluster.place(0.0, 100.0, 100.0, 0.0)
    return max(len(unit.finish) for unit in made) / 8


def test_one_changed_line_of_a_balancer_shows_in_server_and_simulator(pair, monkeypatch) -> None:
    assert spread(pair) == [38, 38]
    assert simulated_peak() == 0.25
    lighter = DecodeLoad.pressure
    monkeypatch.setattr(DecodeLoad, "pressure", lambda self, kv: -lighter(self, kv))
    assert spread(pair) == [76, 0]
    assert simulated_peak() == 1.0


def test_an_answer_in_a_given_form_is_that_of_one_process_and_a_bad_form_is_refused(
    model, alone
) -> None:
    form = StructuredOutputs(regex="[a-f]{30}")
    wanted = [([9, 8, 7], SamplingParams(max_tokens=40, temperature=1.0, seed=3,
                                         structured_outputs=form))]  # fmt: skip
    right, killed = alone(wanted), []

    def between(count: int) -> None:
        if count > 8 and not killed:
            kill_one(gateway, "decode")
            killed.append(count)

    with units(model, "1x1", "1x1") as gateway:
        assert collect(gateway, wanted, between) == right
        bad = SamplingParams(structured_outputs=StructuredOutputs(regex="[a-"))
        with pytest.raises(ConfigError):
            gateway.add("bad", [5, 6], bad)
        with pytest.raises(ConfigError, match="token 999999"):
            gateway.add("bad", [5, 999999], SamplingParams())
        assert not gateway.has_work()
    assert set(right["r0", 0]["text"]) <= set("abcdef")
