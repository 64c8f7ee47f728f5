"""The structs of `native/*.h`, mirrored: what a native entry is given by address."""

from __future__ import annotations

import ctypes

__all__ = [
    "ACTIVATIONS",
    "FORMS",
    "KINDS",
    "PACKED",
    "WHOSE",
    "DenseCall",
    "Expert",
    "ExpertsCall",
    "Grouped",
    "Input",
    "Layout",
    "LinearCall",
    "Output",
    "Product",
    "Segment",
    "Weight",
]

KINDS = {"float32": 0, "bfloat16": 1, "float8_e4m3fn": 2}
PACKED = 2  # the kind of rows that `wf_pack` made
FORMS = {"few": 0, "many": 1}
ACTIVATIONS = {"keep": 0, "e4m3": 1, "half": 2}  # what a product does to fp32 activations first
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Weight(ctypes.Structure):
    """`wf::gemm::Weight`."""

    _fields_ = (
        ("data", _POINTER),
        ("scale", _POINTER),
        ("rows", _INT64),
        ("cols", _INT64),
        ("scale_pitch", _INT64),
        ("first_row", _INT64),
        ("kind", _INT32),
        ("unused", _INT32),
    )


class Input(ctypes.Structure):
    """`wf::gemm::Input`."""

    _fields_ = (("data", _POINTER), ("pitch", _INT64), ("kind", _INT32), ("unused", _INT32))


class Output(ctypes.Structure):
    """`wf::gemm::Output`."""

    _fields_ = (
        ("data", _POINTER),
        ("pitch", _INT64),
        ("index", _POINTER),
        ("factor", _POINTER),
        ("kind", _INT32),
        ("unused", _INT32),
    )


class LinearCall(ctypes.Structure):
    """`LinearCall` of native/linear.cpp."""

    _fields_ = (
        ("weight", Weight),
        ("x", Input),
        ("y", Output),
        ("count", _INT64),
        ("form", _INT32),
        ("activations", _INT32),
    )


class Expert(ctypes.Structure):
    """`wf::gemm::Expert`."""

    _fields_ = (("w1", Weight), ("w3", Weight), ("w2", Weight))


class ExpertsCall(ctypes.Structure):
    """`ExpertsCall` of native/linear.cpp."""

    _fields_ = (
        ("experts", _POINTER),
        ("num_experts", _INT64),
        ("topk_idx", _POINTER),
        ("tokens", _INT64),
        ("topk", _INT64),
        ("x", Input),
        ("rows", Output),
        ("form", _INT32),
        ("activations", _INT32),
        ("shared", _POINTER),
        ("shared_rows", Output),
    )


class Layout(ctypes.Structure):
    """`wf::gemm::Layout`."""

    _fields_ = (
        ("row_stride", _INT64),
        ("k_stride", _INT64),
        ("scale_row_stride", _INT64),
        ("scale_k_stride", _INT64),
        ("scale_rows", _INT64),
        ("scale_k", _INT64),
        ("kind", _INT32),
        ("packing", _INT32),
    )


class Product(ctypes.Structure):
    """`wf::gemm::Product`."""

    _fields_ = (
        ("segments", ctypes.c_void_p),
        ("num_segments", _INT64),
        ("n", _INT64),
        ("d_pitch", _INT64),
        ("c_pitch", _INT64),
        ("a", Layout),
        ("b", Layout),
        ("d_kind", _INT32),
        ("length", _INT32),
    )


class Segment(ctypes.Structure):
    """`wf::gemm::Segment`."""

    _fields_ = (
        *((name, _POINTER) for name in ("a", "a_scale", "b", "b_scale", "d", "c")),
        ("m", _INT64),
        ("k", _INT64),
    )


class DenseCall(ctypes.Structure):
    """A product of one segment, with the segment."""

    _fields_ = (("product", Product), ("segment", Segment))


class Grouped(ctypes.Structure):
    """`wf::gemm::Grouped`."""

    _fields_ = (
        ("product", Product),
        *((name, _POINTER) for name in ("a", "a_scale", "b", "b_scale", "d", "whose")),
        *((name, _INT64) for name in ("whose_step", "rows", "groups", "k")),
        *((name, _INT64) for name in ("a_row", "a_scale_row", "d_row")),
        *((name, _INT64) for name in ("a_group", "a_scale_group", "b_group", "b_scale_group")),
        ("d_group", _INT64),
        ("alignment", _INT64),
        ("form", _INT32),
        ("zero_gaps", _INT32),
    )


WHOSE = {"index": 0, "ends": 1, "counts": 2}  # what says whose rows are whose
