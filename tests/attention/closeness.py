"""FlashMLA's own measure of closeness: same places of inf and NaN, elementwise, and by cosine."""

from __future__ import annotations

from typing import Any

import numpy as np


class Closeness:
    """|Δ| < absolute or |Δ| / |want| < relative for each element, and 1 - cos <= cosine of all."""

    def __init__(self, absolute: float, relative: float, cosine: float) -> None:
        self.absolute, self.relative, self.cosine = absolute, relative, cosine
        self.sums = np.zeros(3)  # (got - want)², got² + want², want²

    def add(self, got: Any, want: Any) -> None:
        """One part of a result."""
        got, want = single(got), single(want)
        assert got.shape == want.shape
        with np.errstate(invalid="ignore"):
            error = np.abs(got - want)
        close = error < self.absolute
        finite = close.all()  # where want is inf or NaN, the error is
        if not finite:
            doubtful = ~close
            g, w, e = got[doubtful], want[doubtful], error[doubtful]
            same = (g == w) | (np.isnan(g) & np.isnan(w))
            with np.errstate(invalid="ignore"):
                near = np.isfinite(w) & (e / (np.abs(w) + 1e-6) < self.relative)
            assert (same | near).all(), e[~(same | near)].max()
            kept = np.isfinite(want)
            got, want = got[kept], want[kept]
        g, w = got.reshape(-1), want.reshape(-1)
        e = g - w
        self.sums += (e @ e, g @ g + w @ w, w @ w)

    def finish(self) -> None:
        """After the last part."""
        apart, both, want = self.sums
        if want >= 1e-12:  # (x-y)² / (x² + y²) is 1 - 2xy / (x² + y²), without its cancellation
            assert apart / both <= self.cosine


def single(x: Any) -> Any:
    """fp32, which holds bf16 and fp16 as they are, and lse to 1e-7 of itself."""
    x = np.asarray(x)
    if x.dtype.name == "bfloat16":
        return (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def assert_close(got: Any, want: Any, absolute: float, relative: float, cosine: float) -> None:
    """A result in one part."""
    measure = Closeness(absolute, relative, cosine)
    measure.add(got, want)
    measure.finish()


def close_decode(out: Any, want: Any, lse: Any, want_lse: Any) -> None:
    """The tolerances of the original's decode tests."""
    assert_close(out, want, 8e-4, 2.01 / 128, 5e-6)
    assert_close(lse, want_lse, 1e-6, 8.01 / 65536, 1e-7)
