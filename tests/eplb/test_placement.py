"""Placement against the published algorithm, brute force, and the rules every placement keeps."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall import eplb
from whalefall.eplb import arguments, cpu, published
from whalefall.errors import ConfigError, DtypeError, LimitError, MissingError, ShapeError

# the original's README example; placement and loads as measured from the original
EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
EXAMPLE_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
EXAMPLE_SIZES = (16, 4, 2, 8)


def published_load(weight: np.ndarray, sizes: tuple[int, int, int, int]) -> np.ndarray:
    """Largest GPU load of the oracle's placement [layers]."""
    loads = arguments.check_loads(weight)
    shape = arguments.check_shape(loads, *sizes)
    phy2log = published.rebalance_experts_hierarchical(loads, *shape.published())[0]
    return eplb.gpu_loads(loads, phy2log, shape.gpus).max(1)


def broken_rules(placement: eplb.Placement, sizes: tuple[int, int, int, int]) -> list[str]:
    """What a placement violates; empty if nothing."""
    replicas, groups, nodes, _ = sizes
    layers, experts = placement.logcnt.shape
    broken = []
    if (placement.logcnt < 1).any() or (placement.logcnt.sum(1) != replicas).any():
        broken.append("counts")
    for layer in range(layers):
        for expert in range(experts):
            slots = placement.log2phy[layer, expert, : placement.logcnt[layer, expert]]
            if (placement.phy2log[layer, slots] != expert).any():
                broken.append("log2phy")
        if groups % nodes == 0:
            home = np.arange(replicas) // (replicas // nodes)
            group = placement.phy2log[layer] // (experts // groups)
            if len(set(zip(group.tolist(), home.tolist(), strict=True))) != groups:
                broken.append("groups")
    sums = np.zeros((layers, experts))
    np.add.at(sums, (np.arange(layers)[:, None], placement.phy2log), placement.share)
    if not np.allclose(sums, 1):
        broken.append("shares")
    return broken


def duplicates(phy2log: np.ndarray, gpus: int) -> int:
    """Slots that hold an expert their GPU holds already."""
    rows = phy2log.reshape(-1, phy2log.shape[1] // gpus)
    return sum(len(row) - len(set(row.tolist())) for row in rows)


def test_the_oracle_reproduces_the_published_example() -> None:
    phy2log, rank, count = published.rebalance_experts_hierarchical(EXAMPLE, *EXAMPLE_SIZES)
    assert phy2log.tolist() == EXAMPLE_PHY2LOG
    assert count.tolist()[1] == [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]
    assert rank[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]


def test_the_published_example_comes_out_at_least_as_balanced() -> None:
    phy2log, log2phy, logcnt = eplb.rebalance_experts(EXAMPLE, *EXAMPLE_SIZES)
    assert phy2log.shape == (2, 16)
    assert log2phy.shape[:2] == (2, 12)
    assert logcnt.sum() == 32
    ours = eplb.gpu_loads(EXAMPLE, phy2log, 8).max(1)
    assert (ours <= published_load(EXAMPLE, EXAMPLE_SIZES)).all()
    assert duplicates(phy2log, 8) == 0


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    gpus = draw(st.sampled_from([1, 2, 4, 8, 16]))
    nodes = draw(st.sampled_from([n for n in (1, 2, 3, 4) if n == 3 or gpus % n == 0]))
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    if groups % nodes == 0 and gpus % nodes:
        nodes = 1
    experts = groups * draw(st.integers(1, 12))
    replicas = gpus * (-(-experts // gpus) + draw(st.integers(0, 3)))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["lognormal", "pareto", "small", "zipf", "one hot", "zero"]))
    shape = (3, experts)
    loads = {
        "lognormal": lambda: random.lognormal(0, 1.5, shape),
        "pareto": lambda: random.pareto(1, shape),
        "small": lambda: random.integers(0, 5, shape).astype(float),
        "zipf": lambda: random.permuted(np.tile(1 / np.arange(1, experts + 1), (3, 1)), axis=1),
        "one hot": lambda: np.eye(3, experts),
        "zero": lambda: np.zeros(shape),
    }[kind]()
    return loads, (replicas, groups, nodes, gpus)


@settings(max_examples=700, deadline=None, derandomize=True)
@given(cases())
def test_never_worse_than_published_never_below_the_bound(
    case: tuple[np.ndarray, tuple[int, int, int, int]],
) -> None:
    loads, sizes = case
    placement = eplb.rebalance(loads, *sizes)
    assert broken_rules(placement, sizes) == []
    assert (placement.load <= published_load(loads, sizes) * (1 + 1e-9)).all()
    assert (placement.load >= placement.bound * (1 - 1e-6)).all()
    assert (published_load(loads, sizes) >= placement.bound * (1 - 1e-6)).all()
    np.testing.assert_allclose(
        placement.load, eplb.gpu_loads(loads.astype(np.float32), placement.phy2log, sizes[3]).max(1)
    )


def best_of_all(weight: np.ndarray, replicas: int, gpus: int, apart: bool = True) -> float:
    """The lightest possible largest load, by trying every placement (with replicas apart)."""
    per_gpu, experts = replicas // gpus, len(weight)
    best = np.inf
    choose = itertools.combinations if apart else itertools.combinations_with_replacement
    sets = list(choose(range(experts), per_gpu))
    for chosen in itertools.combinations_with_replacement(sets, gpus):
        count = np.bincount(np.concatenate(chosen), minlength=experts)
        if count.min() > 0:
            best = min(best, max(sum(weight[e] / count[e] for e in s) for s in chosen))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("experts", "replicas", "gpus"), [(5, 8, 4), (4, 9, 3), (6, 8, 2)])
def test_small_cases_are_optimal(seed: int, experts: int, replicas: int, gpus: int) -> None:
    weight = np.random.default_rng(seed).pareto(1, (1, experts)).astype(np.float32)
    placement = eplb.rebalance(weight, replicas, 1, 1, gpus)
    assert placement.load[0] <= best_of_all(weight[0].astype(float), replicas, gpus) * (1 + 1e-9)


@pytest.mark.parametrize("mode", [(288, 8, 4, 32), (288, 1, 1, 32)])
@pytest.mark.parametrize("exponent", [0.8, 1.2])
def test_deployment_shapes_come_within_a_percent_of_the_bound(
    mode: tuple[int, int, int, int], exponent: float
) -> None:
    random = np.random.default_rng(0)
    zipf = np.tile(1 / np.arange(1, 257) ** exponent, (58, 1))
    placement = eplb.rebalance(random.permuted(zipf, axis=1), *mode)
    gap = placement.load / placement.bound - 1
    assert np.mean(gap) < 0.005
    assert np.mean(gap < 0.01) >= 0.95
    assert duplicates(placement.phy2log, 32) == 0


@pytest.mark.parametrize(
    ("layer", "within", "needs"),
    [
        (105, 0.005, "another packing than that of the lowest bound"),
        (101, 0.005, "counts that leave a GPU free of the hottest expert"),
        (177, 0.005, "a bound that knows how little room is left beside the hottest expert"),
        (110, 0.02, "a bound that knows how few light replicas there are"),
    ],
)
def test_a_layer_with_one_hot_expert_comes_close_to_its_bound(
    layer: int, within: float, needs: str
) -> None:
    loads = np.random.default_rng(7).pareto(1, (200, 256))[layer : layer + 1]
    placement = eplb.rebalance(loads, 288, 8, 4, 32)
    assert placement.load[0] <= placement.bound[0] * (1 + within), needs


def test_skewed_layers_of_more_packings_than_can_be_seen_come_close_to_their_bound() -> None:
    placement = eplb.rebalance(np.random.default_rng(7).pareto(1, (40, 256)), 512, 16, 4, 64)
    gap = placement.load / placement.bound - 1
    assert np.mean(gap) < 0.01 and np.mean(gap < 0.01) > 0.7


def test_no_bound_is_above_the_lightest_of_all_placements() -> None:
    random, sizes = np.random.default_rng(0), [(3, 6, 2), (4, 6, 3), (4, 8, 2), (3, 8, 4)]
    for experts, replicas, gpus in sizes * 8:
        for weight in (random.pareto(0.5, experts), random.integers(0, 30, experts) * 1.0):
            weight = weight.astype(np.float32).astype(float)
            best = best_of_all(weight, replicas, gpus, apart=False)
            bound = eplb.rebalance(weight[None], replicas, 1, 1, gpus).bound[0]
            assert bound <= best * (1 + 1e-6)


def test_a_hottest_expert_that_leaves_no_room_at_all_is_no_case_to_search() -> None:
    loads = np.array([[3, 9, 1, 3], [9, 5, 8, 5], [5, 6, 5, 7]])
    placement = eplb.rebalance(loads, 40, 2, 2, 8)
    assert (placement.load <= published_load(loads, (40, 2, 2, 8)) * (1 + 1e-9)).all()


def test_all_zero_loads_are_spread_evenly() -> None:
    _, _, logcnt = eplb.rebalance_experts(np.zeros((1, 8)), 12, 1, 1, 4)
    assert sorted(logcnt[0].tolist()) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_one_hundred_experts_of_which_twenty_take_most_tokens() -> None:
    loads = np.concatenate([np.full(20, 80 / 20), np.full(80, 20 / 80)])[None]
    before = eplb.gpu_loads(loads, np.arange(100)[None], 10)
    after = eplb.rebalance(loads, 120, 1, 1, 10)
    assert before.mean() / before.max() == pytest.approx(0.25)
    assert after.balance[0] > 0.99


@pytest.mark.parametrize(
    ("experts", "slots", "gpus"), [(16, 100_000, 100_000), (64, 60_000, 20_000)]
)
def test_many_replicas_are_placed_in_seconds(experts: int, slots: int, gpus: int) -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (1, experts))
    began = time.process_time()
    assert eplb.rebalance(loads, slots, 1, 1, gpus).balance[0] > 0.97
    assert time.process_time() - began < 30  # minutes where the work grows with slots × GPUs


def test_without_a_compiler_the_published_algorithm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise MissingError("no compiler")

    monkeypatch.setattr(cpu, "plan", missing)
    phy2log, _, _ = eplb.rebalance_experts(EXAMPLE, *EXAMPLE_SIZES)
    assert phy2log.tolist() == EXAMPLE_PHY2LOG
    _, _, logcnt = eplb.rebalance_experts(np.zeros((1, 8)), 12, 1, 1, 4)
    assert logcnt.max() == 2


def test_torch_tensors_in_torch_tensors_out() -> None:
    torch = pytest.importorskip("torch")
    outputs = eplb.rebalance_experts(torch.tensor(EXAMPLE), *EXAMPLE_SIZES)
    assert [(o.dtype, o.device.type) for o in outputs] == [(torch.int64, "cpu")] * 3
    arrays = eplb.rebalance_experts(EXAMPLE, *EXAMPLE_SIZES)
    assert all((o.numpy() == a).all() for o, a in zip(outputs, arrays, strict=True))


def test_torch_tensors_without_real_values_are_refused_in_one_line() -> None:
    torch = pytest.importorskip("torch")
    loads, rows = torch.tensor(EXAMPLE), torch.zeros(2, 16, dtype=torch.int64)
    for error, words, bad in (
        (ShapeError, "loads have layout torch.sparse_coo; give them .to_dense", loads.to_sparse()),
        (ShapeError, "loads are on the device meta", loads.to("meta")),
        (DtypeError, "loads have dtype torch.complex64; give real numbers", loads + 1j),
    ):
        with pytest.raises(error, match=words):
            eplb.rebalance_experts(bad, *EXAMPLE_SIZES)
    for bad in (rows.to_sparse(), rows.to("meta")):
        with pytest.raises(ShapeError, match=r"previous's rows (have layout|are on the device)"):
            eplb.rebalance(EXAMPLE, *EXAMPLE_SIZES, previous=bad)


@pytest.mark.parametrize(
    ("loads", "sizes", "error", "words"),
    [
        ([[1.0, -2.0]], (2, 1, 1, 2), ConfigError, "layer 0, expert 1 is -2.0"),
        ([[1.0, float("nan")]], (2, 1, 1, 2), ConfigError, "expert 1 is nan"),
        ([[1.0, 1e300]], (2, 1, 1, 2), ConfigError, "1e\\+300"),
        ([[1.0, 2.0]], (3, 1, 1, 2), ShapeError, "3 is not a multiple of num_gpus 2"),
        ([[1.0, 2.0, 3.0]], (2, 1, 1, 2), ShapeError, "num_replicas is 2, but there are 3"),
        ([[1.0, 2.0, 3.0]], (4, 2, 2, 2), ShapeError, "3 experts do not form 2 groups"),
        ([[1.0, 2.0]], (3, 2, 2, 3), ShapeError, "num_gpus 3 is not a multiple of num_nodes 2"),
        ([[1.0, 2.0]], (2, 1, 1, 0), ShapeError, "num_gpus is 0"),
        ([1.0, 2.0], (2, 1, 1, 2), ShapeError, "shape \\(2,\\)"),
        ([["a", "b"]], (2, 1, 1, 2), DtypeError, "real numbers"),
        ([[1.0, 2.0], [3.0]], (2, 1, 1, 2), ShapeError, "no array: .*give .layers, experts."),
        ([[1.0, 2.0]], (2.0, 1, 1, 2), DtypeError, "num_replicas is 2.0, wanted a whole number"),
        ([[1.0, 2.0]], (2, "1", 1, 2), DtypeError, "num_groups is '1', wanted a whole number"),
        ([[1.0, 2.0]], (2, 1, None, 2), DtypeError, "num_nodes is None, wanted a whole number"),
        ([[1.0, 2.0]], (2, 1, 1, True), DtypeError, "num_gpus is True, wanted a whole number"),
        ([[1.0, 2.0]], (2 * 10**30, 1, 1, 2), LimitError, "num_replicas is 20+; .* at most 2147"),
        ([[1.0, 2.0]], (1 << 28, 1, 1, 2), LimitError, "so num_replicas at most 134217728"),
    ],
)
def test_bad_input_is_one_clear_line(
    loads: list, sizes: tuple[int, int, int, int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        eplb.rebalance_experts(loads, *sizes)


def test_public_names() -> None:
    assert sorted(eplb.__all__) == [
        "DayForecast",
        "MovingAverage",
        "Placement",
        "Traffic",
        "Window",
        "count_experts",
        "count_traffic",
        "gpu_loads",
        "rebalance",
        "rebalance_experts",
    ]
