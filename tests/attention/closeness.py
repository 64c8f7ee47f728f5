"""FlashMLA's own measure of closeness: same places of inf and NaN, elementwise, and by cosine."""

from __future__ import annotations

from typing import Any

import numpy as np


class Closeness:
    """|Δ| < absolute or |Δ| / |want| < relative for each element, and 1 - cos <= cosine of all."""

    def __init__(self, absolute: float, relative: float, cosine: float) -> None:
        self.absolute, self.relative, self.cosine = absolute, relative, cosine
        self.products = np.zeros(3)  # got * want, got * got, want * want

    def add(self, got: Any, want: Any) -> None:
        """One part of a result."""
        got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
        assert got.shape == want.shape
        for special in (np.inf, -np.inf):
            assert ((got == special) == (want == special)).all()
        assert (np.isnan(got) == np.isnan(want)).all()
        finite = np.isfinite(want)
        g, w = got[finite], want[finite]
        error = np.abs(g - w)
        far = (error >= self.absolute) & (error / (np.abs(w) + 1e-6) >= self.relative)
        assert not far.any(), error[far].max()
        self.products += (g @ w, g @ g, w @ w)

    def finish(self) -> None:
        """After the last part."""
        both, got, want = self.products
        if want >= 1e-12:
            assert 1 - 2 * both / (got + want) <= self.cosine


def assert_close(got: Any, want: Any, absolute: float, relative: float, cosine: float) -> None:
    """A result in one part."""
    measure = Closeness(absolute, relative, cosine)
    measure.add(got, want)
    measure.finish()


def close_decode(out: Any, want: Any, lse: Any, want_lse: Any) -> None:
    """The tolerances of the original's decode tests."""
    assert_close(out, want, 8e-4, 2.01 / 128, 5e-6)
    assert_close(lse, want_lse, 1e-6, 8.01 / 65536, 1e-7)
