"""Train room: the three matrix products of a linear layer, in FP8, BF16 or FP32.

In: activations or gradients [T, …] sorted by group, master weights [G, N, K] fp32. Out: forward
x·Wᵀ, gradient of the input g·W, and the gradient of the weight gᵀ·x *added* in fp32 to a buffer.
FP8: tiles of `casts`, products of `gemm`, fp32 sums. Source: DeepSeek-V3 report, 3.3, figure 6.

# T rows, G groups (experts), N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from whalefall import gemm
from whalefall.errors import ConfigError
from whalefall.train.casts import cast_blocks, cast_columns, cast_rows

__all__ = ["PRECISIONS", "Bf16", "Fp8", "Fp32", "Precision", "Products", "bf16_is_fast"]

Counts = Sequence[int]


class Products(Protocol):
    """One number format. `counts` says how many of the T rows belong to each of the G weights.

    `forget` must be called whenever weights have changed: prepared ones are kept until then.

    Attributes:
        multiple: groups had better have a multiple of so many rows (zero rows fill them up).
    """

    multiple: int

    def operand(self, x: Tensor) -> Tensor:
        """x in the dtype that the other calls start from: made once for all that read it."""

    def forward(self, x: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        """x [T, K] · weight[g] [N, K]ᵀ → [T, N], in the format's own output dtype."""

    def kept(self, x: Tensor, counts: Counts) -> Any:
        """What `weight_grad` will need of the forward's x."""

    def input_grad(self, grad: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        """grad [T, N] · weight[g] [N, K] → [T, K]."""

    def weight_grad(self, grad: Tensor, kept: Any, counts: Counts, into: Tensor) -> None:
        """into[g] [N, K] fp32 += grad[rows of g]ᵀ · x[rows of g]."""

    def forget(self) -> None:
        """Drop what was prepared of weights."""


class _Prepared:
    """Weights as a format wants them, made once a step however many chunks use them."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self._make = make
        self._made: dict[tuple[int, tuple[int, ...]], Any] = {}

    def __call__(self, weight: Tensor) -> Any:
        key = (weight.data_ptr(), tuple(weight.shape))
        if key not in self._made:
            self._made[key] = self._make(weight.detach())
        return self._made[key]

    def forget(self) -> None:
        self._made.clear()


class _Torch:
    """torch's own products, operands in one dtype."""

    multiple = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.prepared = _Prepared(lambda weight: weight.to(dtype))

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def forward(self, x: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        x, matrices = x.to(self.dtype), self.prepared(weight)
        out = x.new_empty(len(x), weight.shape[1])
        for matrix, rows in zip(matrices, _parts(counts), strict=True):
            torch.mm(x[rows], matrix.t(), out=out[rows])
        return out

    def kept(self, x: Tensor, counts: Counts) -> Any:
        return x.to(self.dtype)

    def input_grad(self, grad: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        grad, matrices = grad.to(self.dtype), self.prepared(weight)
        out = grad.new_empty(len(grad), weight.shape[2])
        for matrix, rows in zip(matrices, _parts(counts), strict=True):
            torch.mm(grad[rows], matrix, out=out[rows])
        return out

    def weight_grad(self, grad: Tensor, kept: Any, counts: Counts, into: Tensor) -> None:
        grad = grad.to(self.dtype)
        for target, rows in zip(into, _parts(counts), strict=True):
            if rows.stop > rows.start:
                target += grad[rows].t() @ kept[rows]

    def forget(self) -> None:
        self.prepared.forget()


class Fp32(_Torch):
    """Everything in fp32: the yardstick."""

    def __init__(self) -> None:
        super().__init__(torch.float32)


class Bf16(_Torch):
    """Operands and results in bf16; sums in fp32 inside a product."""

    # oneDNN compiles a kernel for each new shape, in milliseconds, and keeps about a thousand
    multiple = 32

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)


class Fp8:
    """Operands in E4M3 with block scales, sums and results in fp32."""

    multiple = 1

    def __init__(self) -> None:
        self.prepared = _Prepared(cast_blocks)

    def operand(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        out = torch.empty(len(x), weight.shape[1])
        gemm.m_grouped_fp8_gemm_nt_contiguous(
            cast_rows(x), self.prepared(weight), out, _layout(counts)
        )
        return out

    def kept(self, x: Tensor, counts: Counts) -> Any:
        return cast_columns(x, counts)

    def input_grad(self, grad: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        out = torch.empty(len(grad), weight.shape[2])
        gemm.m_grouped_fp8_gemm_nn_contiguous(
            cast_rows(grad), self.prepared(weight), out, _layout(counts)
        )
        return out

    def weight_grad(self, grad: Tensor, kept: Any, counts: Counts, into: Tensor) -> None:
        gemm.k_grouped_fp8_gemm_tn_contiguous(
            cast_columns(grad, counts), kept, into, list(counts), None, c=into
        )

    def forget(self) -> None:
        self.prepared.forget()


class Precision:
    """Which products a model uses.

    Args:
        name: "fp8" (linear layers in FP8; head and MTP projection in BF16), "bf16" or "fp32".
    Attributes:
        linear: attention's, MLPs' and experts' products.
        table: the head's and the MTP projection's, which the report keeps out of FP8.
    Raises: ConfigError for another name.
    """

    def __init__(self, name: str) -> None:
        if name not in PRECISIONS:
            raise ConfigError(f"train: precision {name!r}, wanted one of {', '.join(PRECISIONS)}")
        self.name = name
        kinds: dict[str, Callable[[], Products]] = {"fp8": Fp8, "bf16": Bf16, "fp32": Fp32}
        self.linear = kinds[name]()
        self.table = self.linear
        if name == "fp8":
            self.table = Bf16() if bf16_is_fast() else Fp32()

    def forget(self) -> None:
        """Drop prepared weights: call it after each change of the weights."""
        self.linear.forget()
        self.table.forget()


PRECISIONS = ("fp8", "bf16", "fp32")


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _parts(counts: Counts) -> list[slice]:
    parts, start = [], 0
    for count in counts:
        parts.append(slice(start, start + count))
        start += count
    return parts


def _layout(counts: Counts) -> Tensor:
    """Each row's group, int32."""
    groups = torch.arange(len(counts), dtype=torch.int32)
    return groups.repeat_interleave(torch.tensor(counts))
