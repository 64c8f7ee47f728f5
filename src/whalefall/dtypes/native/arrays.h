// Arrays read without running Python: numpy's by the public fields of its array object, torch's by
// its C shim. Python compares what is read of a few probes with what the libraries say themselves
// before either is used (calls.py).
#pragma once
#include "python.h"

namespace wf::calls {
using python::Object;
constexpr int kMostAxes = 8, kMostWords = 320, kMostArrays = 12;

// What a call looks like, without addresses: two calls with the same words pass the same checks.
struct Key {
  int64_t words[kMostWords];
  int count = 0;

  bool add(int64_t word) {
    if (count == kMostWords) return false;
    words[count++] = word;
    return true;
  }
};

struct Seen {
  Object* object = nullptr;  // null where the argument is None
  int64_t address = 0;
  int64_t low = 0, high = 0;  // the bytes it reaches over; equal where it has no element
};

enum Tag : int64_t { kNone = 1, kNumpy, kTorch, kYes, kNo, kWhole, kReal, kText, kTuple, kSome };

// numpy's dtypes that kernels know: descriptors by id, kept alive by Python.
constexpr int kMostDtypes = 24;
struct Dtypes {
  const Object* descriptor[kMostDtypes];
  int64_t itemsize[kMostDtypes];
  int32_t torch_code[kMostDtypes];  // -1: torch has none, or is not there
  int64_t count = 0;
};
inline Dtypes dtypes;

// PyArray_NewFromDescr, of numpy's table of functions.
using NumpyMake = Object* (*)(Object* type, Object* descriptor, int axes, const int64_t* shape,
                              const int64_t* strides, void* data, int flags, Object* parent);
inline NumpyMake numpy_make = nullptr;

// The shim of libtorch_cpu, and what it lacks, of torch's other libraries. A handle is
// the address of the tensor's field in its Python object.
struct Torch {
  int32_t (*layout)(const void*, int32_t*);
  int32_t (*device)(const void*, int32_t*);
  int32_t (*dtype)(const void*, int32_t*);
  int32_t (*dim)(const void*, int64_t*);
  int32_t (*sizes)(const void*, int64_t**);
  int32_t (*strides)(const void*, int64_t**);
  int32_t (*data)(const void*, void**);
  int32_t (*storage_bytes)(const void*, int64_t*);
  int32_t (*storage_offset)(const void*, int64_t*);
  bool (*requires_grad)(const void*);  // of the implementation that a handle points to
  bool (*is_neg)(const void*);
  bool (*records)();
  bool (*any_mode)(bool);
  int32_t (*make)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
  int32_t (*let_go)(void*);
  Object* (*wrap)(const void*);  // THPVariable_Wrap: a Python object for what a handle points to
  int64_t handle_offset;
  int32_t strided, cpu;
};
inline Torch torch;
inline bool torch_is_known = false;

inline bool add_axes(Key& key, Seen& seen, const int64_t* shape, const int64_t* strides,
                     int64_t axes, int64_t itemsize, int64_t stride_bytes) {
  bool empty = false;
  int64_t low = 0, high = itemsize;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t reach = (shape[i] - 1) * strides[i] * stride_bytes;
    if (!key.add(shape[i]) || !key.add(strides[i])) return false;
    empty = empty || shape[i] == 0;
    (reach < 0 ? low : high) += reach;
  }
  seen.low = seen.address + (empty ? 0 : low);
  seen.high = seen.address + (empty ? 0 : high);
  return true;
}

inline bool read_numpy(Object* array, Key& key, Seen& seen) {
  using python::field;
  constexpr int64_t kHead = 2 * sizeof(intptr_t);
  constexpr int32_t kWriteable = 0x400;
  seen.object = array;
  seen.address = field<int64_t>(array, kHead);
  const int64_t axes = field<int32_t>(array, kHead + 8);
  const int64_t* shape = field<const int64_t*>(array, kHead + 16);
  const int64_t* strides = field<const int64_t*>(array, kHead + 24);
  const Object* descriptor = field<const Object*>(array, kHead + 40);
  const bool writeable = field<int32_t>(array, kHead + 48) & kWriteable;
  int64_t dtype = 0;
  while (dtype < dtypes.count && dtypes.descriptor[dtype] != descriptor) ++dtype;
  if (dtype == dtypes.count || axes > kMostAxes) return false;
  return key.add(kNumpy | dtype << 8 | int64_t(writeable) << 16 | axes << 24) &&
         add_axes(key, seen, shape, strides, axes, dtypes.itemsize[dtype], 1);
}

// False also for a tensor that the checks in Python may refuse whatever its shape: one whose
// storage was cut, one that wants a gradient while torch records, one that is negated lazily.
inline bool read_torch(Object* tensor, Key& key, Seen& seen) {
  if (!torch_is_known) return false;
  const char* handle = reinterpret_cast<const char*>(tensor) + torch.handle_offset;
  int32_t layout = -1, device = -1, code = -1;
  int64_t axes = 0, held = 0, before = 0, *shape = nullptr, *strides = nullptr;
  void* data = nullptr;
  const void* implementation = python::field<const void*>(tensor, torch.handle_offset);
  if (!implementation || torch.layout(handle, &layout) || layout != torch.strided ||
      torch.device(handle, &device) || device != torch.cpu || torch.dtype(handle, &code))
    return false;
  if (torch.is_neg(handle) || (torch.requires_grad(implementation) && torch.records()))
    return false;
  if (torch.dim(handle, &axes) || axes > kMostAxes || torch.sizes(handle, &shape) ||
      torch.strides(handle, &strides) || torch.storage_bytes(handle, &held) ||
      torch.storage_offset(handle, &before) || torch.data(handle, &data))
    return false;
  int64_t dtype = 0;
  while (dtype < dtypes.count && dtypes.torch_code[dtype] != code) ++dtype;
  if (dtype == dtypes.count) return false;
  const int64_t itemsize = dtypes.itemsize[dtype];
  seen.object = tensor;
  seen.address = reinterpret_cast<int64_t>(data);
  if (!key.add(kTorch | dtype << 8 | int64_t(1) << 16 | axes << 24) ||
      !add_axes(key, seen, shape, strides, axes, itemsize, itemsize))
    return false;
  if (seen.low == seen.high) return true;
  return seen.address > before * itemsize && held >= before * itemsize + (seen.high - seen.address);
}

inline bool is_array(Object* type) {
  return type && (type == python::known.ndarray || type == python::known.memmap ||
                  type == python::known.tensor || type == python::known.parameter);
}

inline bool read_array(Object* array, Key& key, Seen& seen) {
  Object* type = python::type_of(array);
  if (type == python::known.ndarray || type == python::known.memmap)
    return read_numpy(array, key, seen);
  return is_array(type) && read_torch(array, key, seen);
}

// A result to be made: strides in bytes for numpy, in elements for torch.
struct Made {
  int64_t tag, dtype, axes;
  int64_t shape[kMostAxes], strides[kMostAxes];
};

// A new array, not filled; null where there is no memory for it.
inline Object* make_array(const Made& made) {
  if (made.tag == kNumpy) {
    Object* descriptor = const_cast<Object*>(dtypes.descriptor[made.dtype]);
    python::api.Py_IncRef(descriptor);  // the call takes one
    return numpy_make(python::known.ndarray, descriptor, int(made.axes), made.shape, made.strides,
                      nullptr, 0, nullptr);
  }
  void* handle = nullptr;
  if (torch.make(made.axes, made.shape, made.strides, dtypes.torch_code[made.dtype], torch.cpu, 0,
                 &handle))
    return nullptr;
  Object* tensor = nullptr;
  try {
    tensor = torch.wrap(handle);
  } catch (...) {  // no memory
  }
  torch.let_go(handle);
  return tensor;
}
}  // namespace wf::calls
