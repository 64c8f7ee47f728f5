"""LogFMT-10, as low-latency combine sends rows, against its definition in float64."""

import ml_dtypes
import numpy as np
import pytest

from whalefall.ep.library import library

BLOCK, STEPS, OCTAVES = 128, 510, 32


def through(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows after the way, and the bytes between."""
    out = np.empty(x.shape, np.float32)
    return out, library().wf_ep_through_log(x.ctypes.data, *x.shape, out.ctypes.data)


def steps_of(block: np.ndarray) -> tuple[float, float] | None:
    """(smallest logarithm, step) of a block [128] that is coded."""
    sizes = np.abs(block)
    if not sizes.max() < 1 or sizes.max() == sizes.min():  # NaN is no number below 1
        return None
    high = np.log2(sizes.max())
    low = max(np.log2(sizes.min()) if sizes.min() else -np.inf, high - OCTAVES)
    return low, (high - low) / STEPS


def values(low: float, step: float) -> np.ndarray:
    """All magnitudes of a block."""
    return np.concatenate([[0.0], np.exp2(low + step * np.arange(STEPS + 1))])


def rows(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((8, 1024)).astype(np.float32) * 0.2
    if kind == "with zeros":
        x[rng.random(x.shape) < 0.01] = 0
    elif kind == "of all sizes":
        x *= 10.0 ** rng.uniform(-37, 0, x.shape).astype(np.float32)
    elif kind == "tiny":
        x *= 1e-38
    elif kind == "one size":
        x = np.sign(x) * np.float32(0.25)
    elif kind == "large":
        x[:, ::BLOCK] = -1
    elif kind == "no numbers":
        x[0, 5], x[1, 200], x[2, 300], x[3, :512] = np.nan, np.inf, -np.inf, 0
    return x.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "kind",
    ["normal", "with zeros", "of all sizes", "tiny", "one size", "large", "no numbers"],
)
def test_values_go_to_the_nearest_of_their_block(kind: str) -> None:
    x = rows(kind)
    got, nbytes = through(x)
    expected_bytes = 0
    for before, after in zip(
        x.astype(np.float64).reshape(-1, BLOCK), got.reshape(-1, BLOCK), strict=True
    ):
        coded = steps_of(before)
        expected_bytes += 4 + (2 * BLOCK if coded is None else BLOCK * 10 // 8)
        if coded is None:
            assert np.array_equal(before, after, equal_nan=True)
            continue
        every = values(*coded)
        size, after_size = np.abs(before), np.abs(after)
        nearest = np.abs(size[:, None] - every).min(axis=1)
        # 32 octaves below the largest, zero takes part of what is nearer to the smallest
        nearest[size < every[1]] = np.inf
        assert (np.abs(size - after_size) <= nearest + size * 2e-5).all()
        assert (after_size[size < every[1]] <= every[1] * 1.0001).all()
        assert (np.signbit(after) == np.signbit(before)).all()
    assert nbytes == expected_bytes


def test_ends_of_a_block_are_kept() -> None:
    x = rows("normal")
    got, _ = through(x)
    before, after = (np.abs(a.astype(np.float64)).reshape(-1, BLOCK) for a in (x, got))
    np.testing.assert_allclose(after.max(axis=1), before.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(after.min(axis=1), before.min(axis=1), rtol=1e-5)
