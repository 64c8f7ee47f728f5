"""Arrays by memory: one view of numpy arrays and CPU torch tensors, without importing torch.

A kernel needs an address, a shape, strides and the name of a dtype; `view` reads them. Results are
allocated with the caller's library (`empty_like`), or computed in numpy over the same memory
(`as_numpy`) and given back in the caller's library (`restore`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from whalefall.errors import DtypeError, ShapeError, UnsupportedError

__all__ = [
    "NUMPY_DTYPES",
    "View",
    "as_numpy",
    "empty_like",
    "over_memory",
    "refuse_gradient",
    "restore",
    "view",
]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16")},
    **{name: np.dtype(name) for name in ("int64", "int32", "int16", "int8")},
    **{name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "uint8", "bool")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_TORCH_NAMES: dict[Any, str] = {}  # torch.dtype -> name, filled as dtypes are met


class View(NamedTuple):
    """What a kernel needs to know of an array; valid while the array lives.

    Attributes:
        address: of the first element.
        shape: lengths.
        strides: distances in elements.
        dtype: the name numpy and torch share ("float32", "bfloat16", "float8_e4m3fn", …).
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie row by row without gaps; where there are none, they do."""
        if 0 in self.shape:
            return True
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True


def view(array: Any, name: str = "array") -> View:
    """The memory of a numpy array or CPU torch tensor.

    Args:
        array: the array; `name` is how a refusal calls it.
    Raises: DtypeError for another kind of object or dtype and for a sparse tensor; UnsupportedError
        for a tensor that is not in the memory of this machine's CPU, or negated lazily; ShapeError
        for one that reaches beyond its storage, as after `untyped_storage().resize_(0)`.
    """
    if isinstance(array, np.ndarray):
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise DtypeError(f"{name}: dtype {array.dtype}, wanted {_REAL}; convert it")
        size = array.itemsize
        strides = tuple([s // size for s in array.strides])
        if size > 1 and any(s % size for s in array.strides):
            strides = _whole_strides(array, name)
        return View(_address(array), array.shape, strides, dtype)
    if hasattr(array, "data_ptr") and hasattr(array, "stride"):
        if array.device.type != "cpu":
            raise UnsupportedError(
                f"{name}: a tensor on {array.device}, wanted CPU memory; move it with .cpu()"
            )
        if array.layout is not sys.modules["torch"].strided:
            raise DtypeError(
                f"{name}: a tensor of layout {array.layout}, wanted a dense one; call .to_dense()"
            )
        if array.is_neg():  # its memory holds the values of the other sign
            raise UnsupportedError(
                f"{name}: a tensor negated lazily, wanted its values in memory; call .resolve_neg()"
            )
        return View(*_memory_of(array, name), _torch_name(array.dtype, name))
    raise DtypeError(
        f"{name}: a {type(array).__name__}, wanted a numpy array or a CPU torch tensor; convert it"
    )


_Word, _HEAD = ctypes.c_size_t, object.__basicsize__


def _address(array: np.ndarray[Any, Any]) -> int:
    """The address of the first element, in a third of the time that numpy takes to say it.

    In numpy's C ABI it follows an array object's head; checked once against what numpy says.
    """
    if _ADDRESS_IS_FIRST and type(array) is np.ndarray:
        return _Word.from_address(id(array) + _HEAD).value
    return int(array.__array_interface__["data"][0])


def _address_is_first() -> bool:
    probe = np.empty(1)
    return (
        sys.implementation.name == "cpython"
        and _Word.from_address(id(probe) + _HEAD).value == probe.__array_interface__["data"][0]
    )


_ADDRESS_IS_FIRST = _address_is_first()


def _memory_of(tensor: Any, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Address, shape and strides of a tensor, all of whose elements lie in its storage."""
    try:
        address, held = tensor.data_ptr(), tensor.untyped_storage().nbytes()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    except RuntimeError:  # a nested one, or what torch.func and vmap hand to a function
        raise UnsupportedError(
            f"{name}: a {type(tensor).__name__} without memory of its own, wanted a plain tensor; "
            "call outside of torch.func, or .unbind() a nested one"
        ) from None
    if 0 in shape:
        return address, shape, strides
    before, size = tensor.storage_offset(), tensor.itemsize
    if address <= before * size:  # the storage's own address is 0
        held = 0
    reach = sum([(n - 1) * s for n, s in zip(shape, strides, strict=True)])
    wanted = (before + reach + 1) * size
    if held < wanted:
        raise ShapeError(
            f"{name}: a tensor {list(shape)} whose storage holds {held} bytes, wanted {wanted}; it "
            "was freed or cut (resize_), or never had values: gather or make them first"
        )
    return address, shape, strides


def _whole_strides(array: np.ndarray[Any, Any], name: str) -> tuple[int, ...]:
    """Strides in elements of an array that may have some that are no whole number of them."""
    steps = [s if n > 1 else 0 for s, n in zip(array.strides, array.shape, strict=True)]
    if array.size and any(s % array.itemsize for s in steps):
        raise UnsupportedError(
            f"{name}: strides of {array.strides} bytes, wanted multiples of the {array.itemsize} "
            f"of {array.dtype}; pass a copy (np.ascontiguousarray)"
        )
    return tuple(s // array.itemsize for s in steps)


# Not their names: each argument takes some of them only.
_REAL = "real numbers in this machine's byte order"


def _torch_name(dtype: Any, of: str) -> str:
    name = _TORCH_NAMES.get(dtype)
    if name is None:
        name = str(dtype).removeprefix("torch.")
        if name not in NUMPY_DTYPES:
            raise DtypeError(f"{of}: dtype {dtype}, wanted {_REAL}; convert it")
        _TORCH_NAMES[dtype] = name
    return name


def is_torch(array: Any) -> bool:
    """Whether `array` is a torch tensor."""
    return not isinstance(array, np.ndarray) and hasattr(array, "data_ptr")


def refuse_gradient(
    where: str, arrays: Sequence[Any], instead: str = "", names: Sequence[str] = ()
) -> None:
    """UnsupportedError where torch records and one of `arrays` needs a gradient: results have none.

    Args:
        where: the function; `instead` is what to use where the gradient is wanted.
        names: what the arrays are called.
    """
    for i, array in enumerate(arrays):
        if getattr(array, "requires_grad", False) and sys.modules["torch"].is_grad_enabled():
            raise UnsupportedError(
                f"{where}: {names[i] if names else 'an input'} needs a gradient; call it under "
                f"torch.no_grad(){instead}"
            )


def as_numpy(array: Any, name: str = "array") -> np.ndarray[Any, Any]:
    """A numpy array over the same memory, whatever the dtype (bf16 and float8 of torch included).

    The result keeps `array` alive, and writing to one writes to the other.
    """
    if isinstance(array, np.ndarray):
        return array
    return over_memory(view(array, name), array)


def over_memory(seen: View, owner: Any = None) -> np.ndarray[Any, Any]:
    """A numpy array over the memory of a view, which is the caller's to keep without `owner`."""
    dtype = NUMPY_DTYPES[seen.dtype]
    if 0 in seen.shape:
        return np.empty(seen.shape, dtype)
    lowest = sum((n - 1) * s for n, s in zip(seen.shape, seen.strides, strict=True) if s < 0)
    highest = sum((n - 1) * s for n, s in zip(seen.shape, seen.strides, strict=True) if s > 0)
    size = (highest - lowest + 1) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(seen.address + lowest * dtype.itemsize)
    memory.owner = owner  # type: ignore[attr-defined]
    return np.ndarray(
        seen.shape,
        dtype,
        memory,  # type: ignore[arg-type]
        offset=-lowest * dtype.itemsize,
        strides=tuple(s * dtype.itemsize for s in seen.strides),
    )


def empty_like(array: Any, shape: Sequence[int], dtype: str) -> Any:
    """An uninitialised array of `shape` and `dtype`, made by the library that made `array`."""
    if is_torch(array):
        torch = sys.modules["torch"]  # a tensor exists, so torch is imported
        return array.new_empty(tuple(shape), dtype=getattr(torch, dtype), device="cpu")
    return np.empty(tuple(shape), NUMPY_DTYPES[dtype])


def restore(array: np.ndarray[Any, Any], like: Any) -> Any:
    """`array` (numpy) in the library of `like`, over the same memory."""
    if not is_torch(like):
        return array
    torch = sys.modules["torch"]
    dtype = getattr(torch, _NAMES[array.dtype])
    plain = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[array.itemsize]
    return torch.from_numpy(array.view(plain)).view(dtype)
