"""FlashMLA's own measure of closeness: same places of inf and NaN, elementwise, and by cosine."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_close(got: Any, want: Any, absolute: float, relative: float, cosine: float) -> None:
    """|Δ| < absolute or |Δ| / |want| < relative for each element, and 1 - cos <= cosine."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    for special in (np.inf, -np.inf):
        assert ((got == special) == (want == special)).all()
    assert (np.isnan(got) == np.isnan(want)).all()
    finite = np.isfinite(want)
    g, w = got[finite], want[finite]
    error = np.abs(g - w)
    assert ((error < absolute) | (error / (np.abs(w) + 1e-6) < relative)).all(), error.max()
    if (w * w).sum() >= 1e-12:
        assert 1 - 2 * (g * w).sum() / ((g * g).sum() + (w * w).sum()) <= cosine


def close_decode(out: Any, want: Any, lse: Any, want_lse: Any) -> None:
    """The tolerances of the original's decode tests."""
    assert_close(out, want, 8e-4, 2.01 / 128, 5e-6)
    assert_close(lse, want_lse, 1e-6, 8.01 / 65536, 1e-7)
