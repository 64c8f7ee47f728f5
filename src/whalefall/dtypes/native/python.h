// The few functions of Python's stable C interface that a call needs, found in the running process:
// a machine may have no Python.h, and the unit must load where there is no Python to link with.
#pragma once
#include <cstdint>
#include <dlfcn.h>

namespace wf::python {
struct Object;  // PyObject

// Name, result, arguments. All are in the stable interface of Python 3.11 and newer.
#define WF_PYTHON(X)                                            \
  X(Py_IncRef, void, (Object*))                                 \
  X(Py_DecRef, void, (Object*))                                 \
  X(PyTuple_Size, intptr_t, (Object*))                          \
  X(PyTuple_GetItem, Object*, (Object*, intptr_t))              \
  X(PyTuple_New, Object*, (intptr_t))                           \
  X(PyTuple_SetItem, int, (Object*, intptr_t, Object*))         \
  X(PyList_Size, intptr_t, (Object*))                           \
  X(PyList_GetItem, Object*, (Object*, intptr_t))               \
  X(PyLong_AsVoidPtr, void*, (Object*))                         \
  X(PyLong_AsLongLongAndOverflow, long long, (Object*, int*))   \
  X(PyFloat_AsDouble, double, (Object*))                        \
  X(PyUnicode_AsUTF8AndSize, const char*, (Object*, intptr_t*)) \
  X(PyObject_Call, Object*, (Object*, Object*, Object*))        \
  X(PyErr_Clear, void, ())                                      \
  X(PyEval_SaveThread, void*, ())                               \
  X(PyEval_RestoreThread, void, (void*))

struct Functions {
#define WF_POINTER(name, result, arguments) result(*name) arguments = nullptr;
  WF_PYTHON(WF_POINTER)
#undef WF_POINTER

  bool find() {
#define WF_FIND(name, result, arguments)                                    \
  name = reinterpret_cast<result(*) arguments>(dlsym(RTLD_DEFAULT, #name)); \
  if (!name) return false;
    WF_PYTHON(WF_FIND)
#undef WF_FIND
    return true;
  }
};

// Objects that a call is compared with; ids that Python hands over once, of objects it keeps.
struct Known {
  Object *none, *yes, *no;
  Object *tuple, *list, *whole, *real, *text;     // types: int, float and str
  Object *ndarray, *memmap, *tensor, *parameter;  // the last two null without torch
};

inline Functions api;
inline Known known;

inline Object* type_of(Object* object) {
  return *reinterpret_cast<Object**>(reinterpret_cast<char*>(object) + sizeof(intptr_t));
}
template <class T>
T field(const Object* object, int64_t offset) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(object) + offset);
}
}  // namespace wf::python
