"""Views of arrays by memory: numpy and torch alike, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

from whalefall import dtypes
from whalefall.dtypes import NUMPY_DTYPES, view
from whalefall.dtypes.written import refuse_overlap
from whalefall.errors import DtypeError, ShapeError, UnsupportedError


def test_a_view_is_address_shape_strides_and_name() -> None:
    array = np.zeros((4, 6), ml_dtypes.bfloat16)[:, ::2]
    seen = dtypes.view(array)
    assert seen.address == array.ctypes.data
    assert seen[1:] == ((4, 3), (6, 2), "bfloat16")
    assert not seen.contiguous
    assert dtypes.view(np.zeros((2, 3))).contiguous


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", sorted(dtypes.NUMPY_DTYPES))
def test_an_address_is_what_numpy_says(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whalefall.dtypes.arrays._ADDRESS_IS_FIRST", known)
    whole = np.zeros((4, 6), dtypes.NUMPY_DTYPES[name])
    for array in (whole, whole[1:, ::-2], whole.T[2], whole[0, 0, ...], np.zeros((0, 3))):
        assert dtypes.view(array).address == array.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int64", "uint8"])
def test_torch_memory_is_shared_both_ways(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(3, 4, dtype=getattr(torch, dtype))
    array = dtypes.as_numpy(tensor)
    assert array.dtype.name == dtype
    array.view(np.uint8)[1] = 1
    assert tensor.view(torch.uint8)[1].eq(1).all()
    back = dtypes.restore(array, tensor)
    assert back.dtype == tensor.dtype
    assert back.data_ptr() == tensor.data_ptr()
    assert dtypes.view(tensor.T)[1:] == ((4, 3), (1, 4), dtype)
    made = dtypes.empty_like(tensor, (2, 5), "bfloat16")
    assert made.dtype == torch.bfloat16


def test_other_things_are_refused_by_name() -> None:
    with pytest.raises(DtypeError, match="weights: a list, wanted a numpy array"):
        dtypes.view([1, 2], "weights")
    with pytest.raises(DtypeError, match="dtype complex128"):
        dtypes.view(np.zeros(2, complex))


def test_tensors_whose_memory_does_not_hold_their_values_are_refused() -> None:
    torch = pytest.importorskip("torch")
    plain = torch.arange(6.0).reshape(2, 3)
    complex_view = torch.complex(plain, plain).conj().imag
    for lazy in (torch._neg_view(plain), complex_view):
        with pytest.raises(UnsupportedError, match=r"x: a tensor negated.*call \.resolve_neg\(\)"):
            dtypes.view(lazy, "x")
        with pytest.raises(UnsupportedError, match="negated lazily"):
            dtypes.as_numpy(lazy)
        assert (dtypes.as_numpy(lazy.resolve_neg()) == -plain.numpy()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse CSR is in beta
        sparse = [plain.to_sparse(), plain.to_sparse_csr()]
    for tensor in sparse:
        with pytest.raises(DtypeError, match=r"x: a tensor of layout torch\.sparse.*to_dense\(\)"):
            dtypes.view(tensor, "x")


def test_tensors_that_reach_beyond_their_storage_are_refused() -> None:
    import torch

    for size, at in ((0, 0), (0, 1), (20, 0), (4 * 12 - 1, 1)):
        cut = torch.zeros(4, 3)[at:]
        cut.untyped_storage().resize_(size)
        with pytest.raises(ShapeError, match=rf"x: a tensor .* holds {size} bytes, wanted 48;"):
            view(cut, "x")
        with pytest.raises(ShapeError, match="freed or cut"):
            dtypes.as_numpy(cut)
        cut.untyped_storage().resize_(48)
        assert view(cut).address == cut.data_ptr()
    tail = torch.arange(12.0).as_strided((2, 2), (3, 1), 4)  # ends at element 8 of 12
    tail.untyped_storage().resize_(36)
    assert dtypes.as_numpy(tail).tolist() == [[4, 5], [7, 8]]
    tail.untyped_storage().resize_(35)
    with pytest.raises(ShapeError, match="holds 35 bytes, wanted 36"):
        view(tail)
    none = torch.zeros(0, 3)
    none.untyped_storage().resize_(0)
    assert view(none).shape == (0, 3)


@pytest.mark.filterwarnings("ignore")  # torch says that fake addresses will be errors
def test_tensors_without_memory_of_their_own_are_refused() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(4, 3)
    for without in (fake, fake[1:], torch._efficientzerotensor((4, 3))):
        with pytest.raises(ShapeError, match="holds 0 bytes, wanted 48"):
            view(without)
    x = torch.zeros(4, 3)
    with pytest.raises(UnsupportedError, match=r"x: .* without memory of its own"):
        torch.vmap(lambda row: view(row, "x"))(x)
    with pytest.raises(UnsupportedError, match=r"outside of torch\.func"):
        torch.func.grad(lambda given: view(given, "x"))(x)
    with pytest.raises(UnsupportedError, match="unbind"):
        view(torch.nested.nested_tensor([x, x]), "x")


def test_rows_that_lie_no_whole_number_of_elements_apart_are_refused() -> None:
    buffer = np.zeros((4, 257), np.uint8)
    rows = buffer[:, :256].view(NUMPY_DTYPES["bfloat16"])
    with pytest.raises(UnsupportedError, match=r"x: strides of \(257, 2\) bytes"):
        view(rows, "x")
    field = np.zeros(4, [("v", "<f4"), ("p", "u1")])["v"]
    with pytest.raises(UnsupportedError, match="multiples of the 4"):
        view(field, "d")
    assert view(rows[:1], "x").shape == (1, 128)  # one row: its distance says nothing
    assert view(rows[:0], "x").shape == (0, 128)


def test_memory_is_shared_where_numpy_says_so_and_where_that_takes_long() -> None:
    memory, refused = np.zeros(60, np.float32), set()
    for start, step in ((0, 8), (4, 8), (7, 8), (3, 5), (32, 8)):
        a, b = (
            memory[:32].reshape(4, 8)[:, :4],
            np.lib.stride_tricks.as_strided(memory[start:], (3, 4), (4 * step, 4)),
        )
        try:
            refuse_overlap("f", "d", view(a), (view(b),))
        except ShapeError:
            refused.add((start, step))
        assert ((start, step) in refused) == np.shares_memory(a, b)
    assert refused == {(0, 8), (7, 8), (3, 5)}
    bytes_ = np.zeros(1 << 22, np.uint8)  # numbers that make numpy search
    hard = [
        np.lib.stride_tricks.as_strided(bytes_[at:], (9,) * 6, strides)
        for at, strides in ((0, (12223, 12224, 36674, 61119, 85569, 97792)), (7, (12225,) * 6))
    ]
    with pytest.raises(ShapeError, match=r"f: d .* overlaps an input"):
        refuse_overlap("f", "d", view(hard[0]), (view(hard[1]),))


def test_an_array_without_elements_has_no_gaps() -> None:
    wide = np.zeros((4, 8), np.float32)[:, :4]
    assert not view(wide).contiguous and view(wide[:0]).contiguous
    assert view(np.zeros((0, 3, 32), np.float32)).contiguous
    assert view(np.zeros((3, 0, 32), np.float32)).contiguous


def test_importing_the_rooms_imports_no_torch() -> None:
    code = "import sys, whalefall.gemm, whalefall.dtypes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
