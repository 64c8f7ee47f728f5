"""Scale layouts: MN-major, aligned, packed; what DeepGEMM's kernels want their scales in.

The products of this room take scales in any strides; these helpers are for code that prepares
scales for the original, and give the same shapes, strides and bits.
Source: DeepGEMM `csrc/apis/layout.hpp`, `csrc/jit_kernels/impls/smxx_layout.hpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from whalefall.arguments import flag, whole, wholes
from whalefall.dtypes import as_numpy, float_to_ue8m0, restore, view
from whalefall.errors import ConfigError, DtypeError, ShapeError
from whalefall.gemm.casts import align, ceil_div, item
from whalefall.gemm.config import get_mk_alignment_for_contiguous_layout

__all__ = [
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_tma_aligned_size",
    "transform_sf_into_required_layout",
]


def get_tma_aligned_size(x: Any, element_size: Any, /) -> int:
    """x rounded up to a multiple of 16 bytes' worth of elements; both as in `ceil_div`.

    Raises: ConfigError for an x below 0, or elements of which 16 bytes hold no whole number.
    """
    x = whole("get_tma_aligned_size: x", item(x), 0)
    size = whole("get_tma_aligned_size: element_size", item(element_size), 1)
    if 16 % size:
        raise ConfigError(
            f"get_tma_aligned_size: element_size is {size}, wanted 1, 2, 4, 8 or 16; "
            "pass the itemsize"
        )
    return align(x, 16 // size)


def _mn_major(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy [.., mn, k] whose mn axis has stride 1 and whose k axis is 16-byte aligned."""
    *groups, mn, k = values.shape
    pitch = get_tma_aligned_size(mn, values.itemsize)
    memory = np.zeros((*groups, k, pitch), values.dtype)
    memory[..., :mn] = values.swapaxes(-1, -2)
    return memory.swapaxes(-1, -2)[..., :mn, :]


def _give_back(values: npt.NDArray[Any], like: Any) -> Any:
    """`restore` that keeps strides: the memory is given back, then viewed."""
    if isinstance(like, np.ndarray):
        return values
    strides = tuple(s // values.itemsize for s in values.strides)
    base = values.base if values.base is not None else values
    while base.base is not None:
        base = base.base
    whole = restore(np.asarray(base).reshape(-1), like)
    return whole.as_strided(values.shape, strides)


def get_mn_major_tma_aligned_tensor(sf: Any, /) -> Any:
    """Scales [.., mn, k] fp32 with strides (1, mn aligned to 4); itself where it has them."""
    v = view(sf, "get_mn_major_tma_aligned_tensor: sf")
    if v.dtype != "float32" or len(v.shape) not in (2, 3):
        raise ShapeError(
            f"get_mn_major_tma_aligned_tensor: sf is {v.dtype} {list(v.shape)}, wanted float32 "
            "with 2 or 3 axes; per_token_cast_to_fp8 makes it"
        )
    mn, k = v.shape[-2:]
    pitch = get_tma_aligned_size(mn, 4)
    as_wanted = v.strides[-2:] == (1, pitch)
    if len(v.shape) == 3:
        as_wanted = as_wanted and v.strides[0] == pitch * k
    return sf if as_wanted else _give_back(_mn_major(as_numpy(sf)), sf)


def _pack_along_k(where: str, scales: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """[.., mn, k] powers of two as [.., mn, ceil(k / 4)] int32; missing bytes are 0."""
    *lead, mn, k = scales.shape
    codes = np.zeros((*lead, mn, align(k, 4)), np.uint8)
    codes[..., :k] = float_to_ue8m0(scales, where)
    return codes.view("<i4").astype(np.int32, copy=False)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Any, psum_layout: Any = None) -> Any:
    """Four UE8M0 scales an int32, [.., mn, ceil(k / 4)] with strides (1, mn aligned to 4).

    Args:
        sf: float32 powers of two [.., mn, k]. psum_layout: int32 ends of groups along mn; scales
            of the gaps between them are not looked at, and become 0.
    Raises: ShapeError where a scale is no power of two (the original's kernels trap).
    """
    return _packed("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, sf, psum_layout)


def _packed(where: str, sf: Any, like: Any, psum_layout: Any) -> Any:
    values = _float_scales(where, sf, (2, 3))
    if psum_layout is not None:
        ends = _ends(f"{where}: psum_layout", psum_layout)
        values = np.where(_rows_of_groups(ends, values.shape[-2])[:, None], values, 0.0)
        values = values.astype(np.float32)
    return _give_back(_mn_major(_pack_along_k(where, values)), like)


def _float_scales(where: str, sf: Any, axes: tuple[int, ...]) -> npt.NDArray[np.float32]:
    values = as_numpy(sf, f"{where}: sf")
    if values.dtype != np.float32:
        raise DtypeError(f"{where}: sf is {values.dtype}, wanted float32; convert it")
    if values.ndim not in axes:
        wanted = " or ".join(map(str, axes))
        raise ShapeError(f"{where}: sf is {list(values.shape)}, wanted {wanted} axes; reshape it")
    return values


def _ends(name: str, layout: Any) -> list[int]:
    """Where each group ends."""
    values = as_numpy(layout, name)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ShapeError(
            f"{name} is {values.dtype} {list(values.shape)}, wanted int32 with one "
            "axis; give the end of each group"
        )
    return [int(end) for end in values]


def _rows_of_groups(ends: list[int], rows: int) -> npt.NDArray[np.bool_]:
    inside = np.zeros(rows, bool)
    start = 0
    for end in ends:
        inside[start:end] = True
        start = align(max(start, end), get_mk_alignment_for_contiguous_layout())
    return inside


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Any,
    grouped_layout: Any,
    ks_cpu: Sequence[int] | None,
    gran_k: int,
    k_alignment: int,
    use_psum_layout: bool = False,
) -> Any:
    """Packs scales [Σ ceil(k_g / gran_k), mn] of K-grouped operands, each group on a new row.

    Returns: int32 [Σ ceil(k_g / (4 · gran_k)), mn], contiguous.
    """
    where = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    values, gran_k = _float_scales(where, sf, (2,)), whole(f"{where}: gran_k", gran_k, 1)
    k_alignment = whole(f"{where}: k_alignment", k_alignment, 1)
    ks = [] if ks_cpu is None else wholes(f"{where}: ks_cpu", ks_cpu, 0)
    sizes = ks
    if flag(f"{where}: use_psum_layout", use_psum_layout) and not ks:
        start, sizes = 0, []
        for end in _ends(f"{where}: grouped_layout", grouped_layout):
            sizes.append(max(0, end - start))
            start = align(max(start, end), k_alignment)
    counts = [ceil_div(k, gran_k) for k in sizes]
    if sum(counts) > values.shape[0]:
        raise ShapeError(
            f"{where}: sf has {values.shape[0]} rows, wanted {sum(counts)} for K {sizes} in steps "
            f"of {gran_k}; per_channel_cast_to_fp8 makes it"
        )
    parts, at = [], 0
    for count in counts:
        parts.append(_pack_along_k(where, values[at : at + count].T).T)
        at += count
    rows = sum(ceil_div(count, 4) for count in counts)
    if not ks:
        rows = max(rows, (values.shape[0] + 3 * len(sizes)) // 4)
    out = np.zeros((rows, values.shape[1]), np.int32)
    if parts:
        packed = np.concatenate(parts)
        out[: len(packed)] = packed
    return restore(out, sf)


def transform_sf_into_required_layout(
    sf: Any,
    mn: int,
    k: int,
    recipe: tuple[int, ...],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Any = None,
) -> Any:
    """Scales as the original's kernels want them: SM90's rule for fp32, SM100's for int32.

    Args:
        sf: float32 or packed int32 scales of `mn` × `k` values. recipe: (rows of a, rows of b, k)
            with `is_sfa`, or (rows, k) without.
        num_groups: of a leading group axis.
    Returns: float32 of (1, 128): MN-major and aligned; float32 of (128, 128) and int32: itself;
        float32 of 32 along K, or of 128 rows with packing elsewhere: repeated, packed int32.
    Raises: ShapeError, ConfigError.
    """
    where = "transform_sf_into_required_layout"
    rows, gran_k = _steps(where, recipe, is_sfa)
    mn, k = whole(f"{where}: mn", mn, 0), whole(f"{where}: k", k, 0)
    disable_ue8m0_cast = flag(f"{where}: disable_ue8m0_cast", disable_ue8m0_cast)
    v = view(sf, f"{where}: sf")
    lead = () if num_groups is None else (whole(f"{where}: num_groups", num_groups, 0),)
    if v.dtype == "int32" and rows == 1:
        wanted: tuple[int, ...] = (*lead, mn, ceil_div(k, 4 * gran_k))
        strides_ok = mn == 1 or v.strides[-2] == 1
        if v.shape != wanted or not strides_ok or v.strides[-1] != get_tma_aligned_size(mn, 4):
            raise ShapeError(
                f"{where}: sf is int32 {list(v.shape)} with strides {list(v.strides)}, wanted "
                f"{list(wanted)} with strides (1, {get_tma_aligned_size(mn, 4)}); "
                "get_mn_major_tma_aligned_packed_ue8m0_tensor makes it"
            )
        return sf
    wanted = (*lead, ceil_div(mn, rows), ceil_div(k, gran_k))
    if v.dtype != "float32" or v.shape != wanted:
        raise ShapeError(
            f"{where}: sf is {v.dtype} {list(v.shape)}, wanted float32 {list(wanted)} for {mn} x "
            f"{k} values and recipe {recipe}; a cast with that recipe makes it"
        )
    if gran_k == 128:
        return get_mn_major_tma_aligned_tensor(sf) if rows == 1 else sf
    if disable_ue8m0_cast:
        raise ConfigError(
            f"{where}: disable_ue8m0_cast is True with K in steps of {gran_k}, "
            "wanted steps of 128; leave it False"
        )
    wide = np.repeat(as_numpy(sf), min(rows, max(1, mn)), axis=-2)[..., :mn, :]
    return _packed(where, wide, sf, psum_layout)


def _steps(where: str, recipe: Any, is_sfa: bool | None) -> tuple[int, int]:
    """Rows and K that one scale covers."""
    steps = wholes(f"{where}: recipe", recipe, 1)
    if (len(steps) == 3) != (is_sfa is not None) or len(steps) not in (2, 3):
        raise ConfigError(
            f"{where}: recipe={recipe} and is_sfa={is_sfa}, wanted three numbers with is_sfa, or "
            "two without; pass is_sfa=True for the scales of a"
        )
    first = is_sfa is None or flag(f"{where}: is_sfa", is_sfa)
    return steps[0 if first else 1], steps[-1]
