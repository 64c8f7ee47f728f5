"""The native side of `calls`, loaded and tried out: `native/calls.cpp`.

It reads arrays by numpy's and torch's own memory layout. Before either is used, what it reads of a
few probes is compared with what the library says itself; where they differ, or where there is no
compiler, or a Python of another kind, every call goes through Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whalefall import jit
from whalefall.dtypes.arrays import NUMPY_DTYPES, empty_like, view
from whalefall.errors import WhalefallError

__all__ = ["Made", "Native", "aside", "native"]

MOST_AXES, _MOST_DTYPES, _MOST_WORDS = 8, 24, 400
_NUMPY, _TORCH = 2, 3  # tags of arrays
_NAMES = list(NUMPY_DTYPES)
_NEW_FROM_DESCR = 94  # of numpy's table of C functions
_HEAD = 2 * ctypes.sizeof(ctypes.c_void_p)  # of any object: its count of references, its type
_Pointer, _Object = ctypes.c_void_p, ctypes.py_object


class _Known(ctypes.Structure):
    """`wf::python::Known`."""

    _fields_ = tuple(
        (name, _Pointer)
        for name in (
            *("none", "yes", "no", "tuple", "list", "whole", "real", "text"),
            *("ndarray", "memmap", "tensor", "parameter"),
        )
    )


class _Dtypes(ctypes.Structure):
    """`wf::calls::Dtypes`."""

    _fields_ = (
        ("descriptor", _Pointer * _MOST_DTYPES),
        ("itemsize", ctypes.c_int64 * _MOST_DTYPES),
        ("torch_code", ctypes.c_int32 * _MOST_DTYPES),
        ("count", ctypes.c_int64),
    )


class Made(ctypes.Structure):
    """`wf::calls::Made`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tag", "dtype", "axes")),
        ("shape", ctypes.c_int64 * MOST_AXES),
        ("strides", ctypes.c_int64 * MOST_AXES),
    )


# Names in libtorch, in the order of `wf::calls::Torch`: its C shim, then what the shim lacks.
_SHIM = [
    "layout",
    "device_type",
    "dtype",
    "dim",
    "sizes",
    "strides",
    "data_ptr",
    "storage_size",
    "storage_offset",
]
_MORE = (
    "_ZNK3c1010TensorImpl13requires_gradEv",  # c10::TensorImpl::requires_grad() const
    "_ZN2at6native6is_negERKNS_6TensorE",  # at::native::is_neg(const at::Tensor&)
    "_ZN3c108GradMode10is_enabledEv",  # c10::GradMode::is_enabled()
    "_ZN3c104impl20TorchDispatchModeTLS13any_modes_setEb",  # whether someone watches operations
    *("aoti_torch_empty_strided", "aoti_torch_delete_tensor_object"),
    "_Z16THPVariable_WrapRKN2at10TensorBaseE",  # THPVariable_Wrap(const at::TensorBase&)
)


class _Torch(ctypes.Structure):
    """`wf::calls::Torch`."""

    _fields_ = (
        ("functions", _Pointer * (len(_SHIM) + len(_MORE))),
        ("handle_offset", ctypes.c_int64),
        ("strided", ctypes.c_int32),
        ("cpu", ctypes.c_int32),
    )


class Native:
    """The loaded unit; its functions run under the interpreter's lock.

    Attributes:
        library: functions by their native names.
        torch: whether torch's tensors are read natively.
    """

    def __init__(self, library: ctypes.PyDLL) -> None:
        self.library = library
        self.torch: bool | None = None  # not asked yet
        library.wf_calls_begin.argtypes = [_Pointer, _Pointer, _Pointer]
        library.wf_calls_make.argtypes, library.wf_calls_make.restype = [_Pointer], _Object
        library.wf_calls_torch.argtypes = [_Pointer, _Object, _Object, _Pointer]
        library.wf_calls_torch.restype = library.wf_calls_forget.restype = None
        library.wf_calls_read.argtypes = [_Object, _Pointer]
        library.wf_calls_read.restype = ctypes.c_int64
        library.wf_calls_table.restype = _Pointer
        library.wf_calls_table.argtypes = [ctypes.c_char_p, *[ctypes.c_int32] * 3, _Pointer]
        library.wf_calls_table.argtypes += [ctypes.c_int32]
        library.wf_calls_forget.argtypes = [_Pointer]
        library.wf_calls_keep.argtypes = [_Pointer, _Object, _Pointer, ctypes.c_int64, _Pointer]
        library.wf_calls_keep.argtypes += [ctypes.c_int32, _Pointer, ctypes.c_int32]
        library.wf_calls_keep.argtypes += [_Pointer, ctypes.c_int32]

    def read(self, array: Any) -> list[int] | None:
        """Address, first and last byte + 1, and the words of an array's key; None: not read."""
        words = (ctypes.c_int64 * _MOST_WORDS)()
        count = self.library.wf_calls_read(array, words)
        return list(words[:count]) if count else None

    def make(self, made: Made) -> Any:
        """A new array as a call's result is made."""
        return self.library.wf_calls_make(ctypes.byref(made))

    def meet_torch(self) -> None:
        """Read tensors natively from now on, where torch is imported and as it was thought to be.

        Call it where a call had a tensor; the answer is found once.
        """
        torch = sys.modules.get("torch")
        if torch is None or getattr(torch.__spec__, "_initializing", False):
            return  # another thread may be importing it
        if self.torch is None:
            aside(self._meet_torch)

    def _meet_torch(self) -> None:
        if self.torch is not None:
            return
        self.torch = known = False
        try:
            known = _meet_torch(self)
        finally:
            if not known:
                forgotten = sys.modules["torch"].Tensor
                self.library.wf_calls_torch(None, forgotten, forgotten, None)
        self.torch = known


_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


def aside(work: Callable[[], object]) -> None:
    """Do what is done once in a thread of its own, one at a time; if it fails, it has not been.

    There no mode of the caller's (torch has them by thread) changes what probes are or sees them,
    and no compiler traces them.
    """

    def run() -> None:
        with _lock, contextlib.suppress(Exception):
            work()

    with contextlib.suppress(RuntimeError):  # Python ends
        thread = threading.Thread(target=run, name="whalefall-known-calls")
        thread.start()
        thread.join()


_found: list[Native | None] = []


def native() -> Native | None:
    """The unit, or None where calls go through Python."""
    if not _found:
        aside(_find)
    return _found[0] if _found else None


def _find() -> None:
    if _found:
        return
    loaded = None
    try:
        loaded = _load()
    finally:
        _found.append(loaded)


def _load() -> Native | None:
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    if object.__basicsize__ != _HEAD or any(
        _word(one, _HEAD // 2) != id(type(one)) for one in (1, "", None, np.empty(0))
    ):
        return None
    try:  # the same bytes whatever WHALEFALL_ISA says
        path = jit.build(Path(__file__).parent / "native" / "calls.cpp", level="any").path
        loaded = Native(ctypes.PyDLL(str(path)))
    except (WhalefallError, OSError):  # whoever needs a kernel will say so
        return None
    return loaded if _numpy_is_known(loaded) else None


def _word(thing: Any, offset: int) -> int | None:
    """A word of an object's memory, which lives while it is read."""
    return ctypes.c_void_p.from_address(id(thing) + offset).value


def _numpy_is_known(loaded: Native) -> bool:
    probes = _numpy_probes()
    for probe in probes:  # within the object whatever the layout is
        if np.ndarray.__basicsize__ < 7 * 8 + 8 or (
            _word(probe, _HEAD) != probe.__array_interface__["data"][0]
            or _word(probe, _HEAD + 40) != id(probe.dtype)
            or ctypes.c_int.from_address(id(probe) + _HEAD + 8).value != probe.ndim
        ):
            return False
    names: dict[str, Any] = {
        "none": None,
        "yes": True,
        "no": False,
        "tuple": tuple,
        "list": list,
        "whole": int,
    }
    names |= {"real": float, "text": str, "ndarray": np.ndarray, "memmap": np.memmap}
    known = _Known(**{name: id(thing) for name, thing in names.items()})
    make = _numpy_function(_NEW_FROM_DESCR)
    if not make or not loaded.library.wf_calls_begin(
        ctypes.byref(known), ctypes.byref(_dtypes()), make
    ):
        return False
    return all(loaded.read(probe) == _expected(probe) for probe in probes) and _makes(loaded, False)


def _numpy_function(number: int) -> int | None:
    """The address of one of numpy's C functions, whose numbers never change."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = _Pointer, [_Object, ctypes.c_char_p]
    table = get(sys.modules[np.empty(0).__reduce__()[0].__module__]._ARRAY_API, None)
    return ctypes.c_void_p.from_address(table + number * ctypes.sizeof(_Pointer)).value


def result(
    tensor: bool, shape: Sequence[int], dtype: str, turned: tuple[int, int] | None = None
) -> Made:
    """A result to be made, row by row, then with two axes swapped where wanted."""
    itemsize = 1 if tensor else NUMPY_DTYPES[dtype].itemsize
    lengths, strides = list(shape), [itemsize] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(1, lengths[axis])
    if turned is not None:
        one, other = turned
        for numbers in (lengths, strides):
            numbers[one], numbers[other] = numbers[other], numbers[one]
    made = Made(_TORCH if tensor else _NUMPY, _NAMES.index(dtype), len(lengths))
    made.shape[: len(lengths)], made.strides[: len(lengths)] = lengths, strides
    return made


def _makes(loaded: Native, tensor: bool) -> bool:
    """Whether results are made as the library makes them itself."""
    like = sys.modules["torch"].empty(0, device="cpu") if tensor else np.empty(0)
    for dtype in ("bfloat16", "float32"):
        made = loaded.make(result(tensor, (2, 3, 4), dtype, (1, 2)))
        wanted = empty_like(like, (2, 3, 4), dtype).swapaxes(1, 2)
        if type(made) is not type(wanted) or view(made)[1:] != view(wanted)[1:]:
            return False
        if not tensor and not (made.flags.writeable and made.flags.owndata):
            return False
        if tensor and (made.requires_grad or made.untyped_storage().nbytes() != 24 * made.itemsize):
            return False
    return True


def _numpy_probes() -> list[np.ndarray[Any, Any]]:
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    frozen = np.zeros((3, 1), NUMPY_DTYPES["bfloat16"])
    frozen.flags.writeable = False
    return [cube, cube[:, ::-1, 1:], cube.T[::2], np.empty((0, 5), np.int32), frozen]


def _dtypes(torch_codes: dict[str, int] | None = None) -> _Dtypes:
    found = _Dtypes(count=len(NUMPY_DTYPES))
    for i, (name, dtype) in enumerate(NUMPY_DTYPES.items()):
        found.descriptor[i], found.itemsize[i] = id(dtype), dtype.itemsize
        found.torch_code[i] = (torch_codes or {}).get(name, -1)
    return found


def _expected(array: Any) -> list[int]:
    """What `Native.read` should say of an array, by Python's own words."""
    seen, is_numpy = view(array), isinstance(array, np.ndarray)
    size = NUMPY_DTYPES[seen.dtype].itemsize
    spans = [(n - 1) * s * size for n, s in zip(seen.shape, seen.strides, strict=True)]
    low, high = sum(s for s in spans if s < 0), sum(s for s in spans if s > 0) + size
    if 0 in seen.shape:
        low = high = 0
    writeable = array.flags.writeable if is_numpy else True
    tag = (_NUMPY if is_numpy else _TORCH) | _NAMES.index(seen.dtype) << 8
    tag |= int(writeable) << 16 | len(seen.shape) << 24
    strides = array.strides if is_numpy else seen.strides
    axes = [number for pair in zip(seen.shape, strides, strict=True) for number in pair]
    return [seen.address, seen.address + low, seen.address + high, tag, *axes]


def _meet_torch(loaded: Native) -> bool:
    torch = sys.modules["torch"]
    libraries = Path(torch._C.__file__).parent / "lib"
    cpu = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))
    python = ctypes.CDLL(str(libraries / "libtorch_python.so"))
    probe = torch.arange(24, dtype=torch.float32, device="cpu").reshape(2, 3, 4)
    if torch.Tensor.__basicsize__ < _HEAD + 8 or any(
        _word(one, _HEAD) != one._cdata for one in (probe, probe[1:], torch.zeros((), device="cpu"))
    ):
        return False
    names = [*(f"aoti_torch_get_{name}" for name in _SHIM), *_MORE]
    given = _Torch(handle_offset=_HEAD, strided=cpu.aoti_torch_layout_strided())
    given.cpu = cpu.aoti_torch_device_type_cpu()
    for i, name in enumerate(names):
        given.functions[i] = ctypes.cast(getattr(python, name), _Pointer).value
    codes = {}
    for name in NUMPY_DTYPES:
        if hasattr(torch, name) and hasattr(cpu, f"aoti_torch_dtype_{name}"):
            codes[name] = int(getattr(cpu, f"aoti_torch_dtype_{name}")())
    kept = _dtypes(codes).torch_code
    parameter = torch.nn.Parameter
    loaded.library.wf_calls_torch(ctypes.byref(given), torch.Tensor, parameter, kept)
    return _torch_is_known(loaded, torch, probe)


def _torch_is_known(loaded: Native, torch: Any, whole: Any) -> bool:
    """Whether probes are read as torch says they are, and those that Python must see are not."""
    plain = [whole, whole.transpose(0, 2)[1:], whole[0, :, 1:], whole.bfloat16(), whole[:0]]
    with torch.inference_mode(mode=False), torch.enable_grad():
        wanting = torch.nn.Parameter(whole.clone())
        negative = torch._neg_view(whole)
        cut, freed = whole.clone(), whole.clone()[1:]
        cut.untyped_storage().resize_(40)
        freed.untyped_storage().resize_(0)
        odd = [wanting, negative, cut, freed, whole.to("meta"), whole[:0].to("meta")]
        odd += [whole.to_sparse()]
        known = all(loaded.read(one) == _expected(one) for one in plain)
        known = known and all(loaded.read(one) is None for one in odd)
        with torch.no_grad():
            known = known and loaded.read(wanting) == _expected(wanting) and _makes(loaded, True)
    return known
