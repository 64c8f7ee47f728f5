"""ep.routing: the gate chooses what the papers say, with the bits of the numpy definition."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from whalefall import ep, jit
from whalefall.ep import reference
from whalefall.errors import ConfigError, DtypeError, ShapeError

CASES = [  # E, K, groups, kept groups
    (256, 8, 8, 4),
    (160, 6, 8, 3),
    (64, 6, 1, 1),
    (8, 2, 8, 2),  # one expert a group
    (12, 12, 3, 3),
]


def slowly(x: list[float], bias: list[float], k: int, groups: int, kept: int, scoring: str) -> list:
    """One token after the papers' words, in lists and float64."""
    if scoring == "softmax":
        total = sum(math.exp(v - max(x)) for v in x)
        score = [math.exp(v - max(x)) / total for v in x]
    else:
        score = [1 / (1 + math.exp(-v)) for v in x]
    choice = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(x) // groups
    best = []
    for g in range(groups):
        inside = sorted(choice[g * size : (g + 1) * size], reverse=True)
        best.append((-(inside[0] if scoring == "softmax" else sum(inside[:2])), g))
    allowed = {g for _, g in sorted(best)[:kept]}
    order = sorted((-c, e) for e, c in enumerate(choice) if e // size in allowed)
    return [(e, score[e]) for _, e in order[:k]]


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_what_the_papers_say(case: tuple[int, ...], scoring: str) -> None:
    E, K, groups, kept = case
    rng = np.random.default_rng(E)
    logits = rng.standard_normal((40, E)).astype(np.float32)
    bias = (rng.standard_normal(E) * 0.2).astype(np.float32) if scoring == "sigmoid" else None
    idx, weight = ep.route(logits, bias, K, groups, kept, scoring, normalize=False)
    for t in range(40):
        zeros = np.zeros(E) if bias is None else bias
        wanted = slowly(logits[t].tolist(), zeros.tolist(), K, groups, kept, scoring)
        assert idx[t].tolist() == [e for e, _ in wanted]
        assert np.allclose(weight[t], [s for _, s in wanted], rtol=1e-6)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("case", CASES)
def test_native_code_has_the_bits_of_the_definition(case: tuple[int, ...], scoring: str) -> None:
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((130, case[0])) * 4).astype(np.float32)
    logits[::2] = np.round(logits[::2])  # many ties
    logits[5] = 0.0
    logits[6, 1:] = -300.0
    got = ep.route(logits, None, *case[1:], scoring, True, 2.5)
    wanted = reference.route(logits, None, *case[1:], scoring, True, 2.5)
    assert np.array_equal(got[0], wanted[0])
    assert np.array_equal(got[1], wanted[1])


def test_ties_go_to_the_lowest_index() -> None:
    idx, weight = ep.route(np.zeros((1, 16), np.float32), None, 4, 4, 2)
    assert idx.tolist() == [[0, 1, 2, 3]]
    assert weight.tolist() == [[0.25] * 4]


def test_a_dropped_group_never_wins_over_negative_choices() -> None:
    logits = np.full((1, 8), -20.0, np.float32)
    bias = np.array([-1, -1, -1, -1, -2, -2, -2, -2], np.float32)
    idx, _ = ep.route(logits, bias, 3, num_groups=2, topk_groups=1)
    assert idx.tolist() == [[0, 1, 2]]


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    logits = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    bias = np.array([0, 0, 0, 5], np.float32)
    idx, weight = ep.route(logits, bias, 2, normalize=False)
    assert idx.tolist() == [[3, 0]]
    assert weight[0, 0] == np.float32(0.5)


def test_weights_sum_to_the_scale_or_are_zero_where_every_score_is() -> None:
    rng = np.random.default_rng(0)
    _, weight = ep.route(rng.standard_normal((9, 32)).astype(np.float32), None, 8, scale=2.5)
    assert np.allclose(weight.sum(1), 2.5)
    _, weight = ep.route(np.full((1, 32), -1e30, np.float32), None, 8)
    assert np.isfinite(weight).all()


def test_threads_do_not_change_the_bits() -> None:
    logits = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    before = jit.get_num_threads()
    try:
        jit.set_num_threads(1)
        one = ep.route(logits, None, 6, 8, 3)
        jit.set_num_threads(2)
        two = ep.route(logits, None, 6, 8, 3)
    finally:
        jit.set_num_threads(before)
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])


def test_no_tokens_is_fine_and_nan_is_not() -> None:
    idx, weight = ep.route(np.zeros((0, 16), np.float32), None, 4)
    assert idx.shape == weight.shape == (0, 4)
    logits = np.zeros((40, 16), np.float32)
    logits[37, 3] = np.nan
    with pytest.raises(ep.RoutingError, match="token 37"):
        ep.route(logits, None, 4)


def test_grouping_bounds_the_hosts_a_token_touches() -> None:
    logits = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    idx, _ = ep.route(logits, None, 8, 8, 4)
    touched = ep.hosts_touched(idx, 256, 8)
    wanted = [len({e // 32 for e in row}) for row in idx.tolist()]
    assert touched.tolist() == wanted
    assert touched.max() <= 4
    assert ep.hosts_touched(np.array([[-1, -1], [0, -1]]), 4, 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits_TE": np.zeros((2, 8))}, DtypeError, "float64, wanted float32"),
        ({"logits_TE": np.zeros(8, np.float32)}, ShapeError, r"wanted \[tokens, experts\]"),
        ({"bias_E": np.zeros(7, np.float32)}, ShapeError, r"wanted float32 \[8\]"),
        ({"num_groups": 3}, ConfigError, "num_groups is 3"),
        ({"num_groups": 2, "topk_groups": 3}, ConfigError, "topk_groups is 3, wanted 1 … 2"),
        ({"num_groups": 2, "top_k": 5}, ConfigError, "top_k is 5, wanted 1 … 4"),
        ({"scoring": "tanh"}, ConfigError, "scoring is 'tanh'"),
    ],
)
def test_bad_arguments_are_refused(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"logits_TE": np.zeros((2, 8), np.float32), "bias_E": None, "top_k": 2}
    with pytest.raises(error, match=words):
        ep.route(**{**arguments, **change})


@pytest.mark.parametrize("normalize", [True, False])
def test_the_choice_is_that_of_transformers_v3_gate(normalize: bool) -> None:
    torch = pytest.importorskip("torch")
    v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    E, K, H, T = 256, 8, 32, 300
    config = SimpleNamespace(
        num_experts_per_tok=K, num_local_experts=E, hidden_size=H, routed_scaling_factor=2.5,
        n_group=8, topk_group=4, norm_topk_prob=normalize,
    )  # fmt: skip
    gate = v3.DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(gate.weight)
    gate.e_score_correction_bias.normal_(0, 0.3)
    logits, theirs, index = gate(torch.randn(T, H))
    bias = gate.e_score_correction_bias.numpy()
    idx, weight = ep.route(logits.detach().numpy(), bias, K, 8, 4, normalize=normalize, scale=2.5)
    same_as(idx, weight, index.numpy(), theirs.detach().numpy(), E)


@pytest.mark.parametrize("groups", [(8, 3), (1, 1)])
def test_the_choice_is_that_of_transformers_v2_gate(groups: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    v2 = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    E, K, H, T = 160, 6, 32, 300
    config = v2.DeepseekV2Config(
        n_routed_experts=E, num_local_experts=E, num_experts_per_tok=K, hidden_size=H,
        n_group=groups[0], topk_group=groups[1], routed_scaling_factor=16.0, norm_topk_prob=False,
        topk_method="group_limited_greedy" if groups[0] > 1 else "greedy",
    )  # fmt: skip
    gate = v2.DeepseekV2TopkRouter(config)
    torch.manual_seed(1)
    torch.nn.init.normal_(gate.weight)
    logits, theirs, index = gate(torch.randn(T, H))
    idx, weight = ep.route(
        logits.detach().float().numpy(), None, K, *groups, "softmax", normalize=False, scale=16.0
    )
    same_as(idx, weight, index.numpy(), theirs.detach().float().numpy(), E)


def same_as(
    idx: np.ndarray, weight: np.ndarray, other: np.ndarray, theirs: np.ndarray, experts: int
) -> None:
    """The same experts with the same weights; the peers leave the order open."""
    ours, wanted = np.zeros((len(idx), experts)), np.zeros((len(idx), experts))
    np.put_along_axis(ours, idx, weight, 1)
    np.put_along_axis(wanted, other, theirs, 1)
    assert (np.sort(idx, 1) == np.sort(other, 1)).all()
    np.testing.assert_allclose(ours, wanted, rtol=2e-6)
