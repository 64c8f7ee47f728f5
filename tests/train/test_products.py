"""A linear layer's three products against float64 of the published numerics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whalefall import gemm
from whalefall.errors import ConfigError
from whalefall.pipeline.torch import WeightGradStore
from whalefall.train.casts import cast_blocks, cast_columns, cast_rows
from whalefall.train.functions import cross_entropy, linear, swiglu
from whalefall.train.products import Bf16, Fp8, Fp32, Precision

COUNTS = [0, 130, 7, 63]  # groups: empty, more than a tile, ragged


def wide_range(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values whose tiles have very different scales."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random) * torch.randn(*shape, generator=random).exp()


def decoded(values: torch.Tensor, scales: np.ndarray) -> np.ndarray:
    return values.float().numpy().astype(np.float64) * scales.astype(np.float64)


def rows_of(x: torch.Tensor) -> np.ndarray:
    values, scales = cast_rows(x)
    return decoded(values, np.repeat(scales.numpy(), 128, 1)[:, : x.shape[1]])


def blocks_of(w: torch.Tensor) -> np.ndarray:
    values, scales = cast_blocks(w)
    wide = np.repeat(np.repeat(scales.numpy(), 128, 1), 128, 2)
    return decoded(values, wide[:, : w.shape[1], : w.shape[2]])


def columns_of(x: torch.Tensor, counts: list[int]) -> np.ndarray:
    values, scales = cast_columns(x, counts)
    tiles = [min(128, c - at) for c in counts for at in range(0, c, 128)]
    return decoded(values, np.repeat(scales.numpy(), tiles, 0))


def relative(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.abs(found.numpy() - wanted).max() / np.abs(wanted).max())


def groups(counts: list[int]) -> list[slice]:
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def test_casts_are_gemms_own_bit_for_bit() -> None:
    x = wide_range(200, 300)
    for mine, theirs in (
        (cast_rows(x), gemm.per_token_cast_to_fp8(x, False)),
        (tuple(t[0] for t in cast_blocks(x[None])), gemm.per_block_cast_to_fp8(x, False)),
        (cast_columns(x[:128], [128]), gemm.per_channel_cast_to_fp8(x[:128], False)),
    ):
        assert torch.equal(mine[0].view(torch.uint8), theirs[0].view(torch.uint8))
        assert torch.equal(mine[1], theirs[1])


def test_tiles_of_columns_begin_anew_with_every_group() -> None:
    x = wide_range(200, 64)
    values, scales = cast_columns(x, COUNTS)
    first = 0
    for part in groups(COUNTS):
        rows = x[part]
        filled = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 128))
        wanted, wanted_scales = gemm.per_channel_cast_to_fp8(filled, False)
        found = values[part].view(torch.uint8)
        assert torch.equal(found, wanted[: len(rows)].view(torch.uint8))
        assert torch.equal(scales[first : first + len(wanted_scales)], wanted_scales)
        first += len(wanted_scales)
    assert first == len(scales)


def test_forward_multiplies_1x128_rows_by_128x128_blocks() -> None:
    x, w = wide_range(200, 192), wide_range(4, 136, 192, seed=1)
    found = Fp8().forward(x, w, COUNTS)
    wanted = np.concatenate(
        [rows_of(x[part]) @ blocks_of(w)[g].T for g, part in enumerate(groups(COUNTS))]
    )
    assert relative(found, wanted) < 1e-6  # fp32 sums of 192 terms


def test_input_gradient_casts_the_gradient_along_the_outputs() -> None:
    grad, w = wide_range(200, 136), wide_range(4, 136, 192, seed=1)
    found = Fp8().input_grad(grad, w, COUNTS)
    wanted = np.concatenate(
        [rows_of(grad[part]) @ blocks_of(w)[g] for g, part in enumerate(groups(COUNTS))]
    )
    assert relative(found, wanted) < 1e-6


def test_weight_gradient_casts_along_the_tokens_and_adds_in_fp32() -> None:
    grad, x = wide_range(200, 136), wide_range(200, 192, seed=1)
    products, into = Fp8(), torch.full((4, 136, 192), 0.5)
    products.weight_grad(grad, products.kept(x, COUNTS), COUNTS, into)
    left, right = columns_of(grad, COUNTS), columns_of(x, COUNTS)
    wanted = np.stack([0.5 + left[part].T @ right[part] for part in groups(COUNTS)])
    assert relative(into, wanted) < 1e-6


@pytest.mark.parametrize(("products", "tolerance"), [(Fp32(), 1e-5), (Bf16(), 0.02), (Fp8(), 0.1)])
def test_swiglu_and_linear_have_autograds_gradients(products, tolerance: float) -> None:
    x = torch.randn(200, 128, requires_grad=True)
    gate_up = torch.nn.Parameter(torch.randn(4, 64, 128) / 11)
    down = torch.nn.Parameter(torch.randn(4, 128, 32) / 6)
    head = torch.nn.Parameter(torch.randn(50, 128) / 11)
    labels = torch.arange(200) % 51 - 1

    def run(mine: bool) -> list[torch.Tensor]:
        for t in (x, gate_up, down, head):
            t.grad = None
        if mine:
            y = swiglu(x, gate_up, down, COUNTS, products)
            cross_entropy(y, head, labels, products).backward()
        else:
            parts = []
            for g, part in enumerate(groups(COUNTS)):
                gate, up = (x[part] @ gate_up[g].T).chunk(2, -1)
                parts.append((torch.nn.functional.silu(gate) * up) @ down[g].T)
            y = torch.cat(parts)
            torch.nn.functional.cross_entropy(
                y @ head.T, labels, ignore_index=-1, reduction="sum"
            ).backward()
        assert y.shape[0] == 200
        return [t.grad.clone() for t in (x, gate_up, down, head)]

    for mine, plain in zip(run(True), run(False), strict=True):
        assert (mine - plain).norm() / plain.norm() < tolerance


def test_a_weight_gradient_waits_in_the_store_until_it_is_popped() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 16))
    x = torch.randn(4, 16, requires_grad=True)
    WeightGradStore.clear()
    WeightGradStore.enabled = True
    try:
        linear(x, weight, Fp32()).sum().backward()
    finally:
        WeightGradStore.enabled = False
    assert x.grad is not None
    assert weight.grad is None
    WeightGradStore.flush()
    WeightGradStore.pop()
    assert torch.allclose(weight.grad, x.detach().sum(0).expand(8, 16), atol=1e-5)


def test_weights_are_prepared_anew_after_forget() -> None:
    precision = Precision("fp8")
    weight, x = torch.ones(1, 128, 128), torch.ones(1, 128)
    before = precision.linear.forward(x, weight, [1]).clone()
    weight.mul_(2)
    assert torch.equal(precision.linear.forward(x, weight, [1]), before)
    precision.forget()
    assert torch.equal(precision.linear.forward(x, weight, [1]), 2 * before)


def test_an_unknown_precision_is_one_line() -> None:
    with pytest.raises(ConfigError, match="precision 'fp4', wanted one of fp8, bf16, fp32"):
        Precision("fp4")
