// A call of a public function whose like has passed every check before: its arguments are read and
// compared natively, and its kernel runs at once. Whatever is new, odd or refused is left to
// Python: `find` answers None, and the caller goes the long way, which has the words for every
// refusal.
//
// Python builds the struct of a first call, and `wf_calls_keep` takes it down with the places of
// the addresses in it. All of this runs under the interpreter's lock, but for the kernel.
#include "plans.h"
#include <cstdlib>

#define WF_EXPORT extern "C" __attribute__((visibility("default")))

namespace wf::calls {
using python::api;
using python::known;

struct Call {
  Key key;
  Seen arrays[kMostArrays];
  int num_arrays = 0;
};

bool add_text(const char* text, intptr_t length, Key& key) {
  if (!key.add(length) || length > 256) return false;
  for (intptr_t i = 0; i < length; i += 8) {
    int64_t word = 0;
    std::memcpy(&word, text + i, size_t(length - i < 8 ? length - i : 8));
    if (!key.add(word)) return false;
  }
  return true;
}

// None, a truth value, int, float or str by type and value, tuples of them; false for all others.
bool read_plain(Object* value, Key& key, int depth = 0) {
  if (value == known.none) return key.add(kNone);
  if (value == known.yes) return key.add(kYes);
  if (value == known.no) return key.add(kNo);
  Object* type = python::type_of(value);
  if (type == known.whole) {
    int overflow = 0;
    const int64_t number = api.PyLong_AsLongLongAndOverflow(value, &overflow);
    return !overflow && key.add(kWhole) && key.add(number);
  }
  if (type == known.real) {
    const double number = api.PyFloat_AsDouble(value);
    int64_t word;
    std::memcpy(&word, &number, sizeof word);
    return key.add(kReal) && key.add(word);
  }
  if (type == known.text) {
    intptr_t length = 0;
    const char* text = api.PyUnicode_AsUTF8AndSize(value, &length);
    return text && key.add(kText) && add_text(text, length, key);
  }
  if (type != known.tuple || depth > 2) return false;
  const intptr_t size = api.PyTuple_Size(value);
  if (!key.add(kTuple | size << 8)) return false;
  for (intptr_t i = 0; i < size; ++i)
    if (!read_plain(api.PyTuple_GetItem(value, i), key, depth + 1)) return false;
  return true;
}

bool read_one(Object* array, Call& call) {
  if (call.num_arrays == kMostArrays) return false;
  Seen& seen = call.arrays[call.num_arrays++];
  return array == known.none ? call.key.add(kNone) : read_array(array, call.key, seen);
}

bool read_pair(Object* pair, Call& call) {
  Object* type = python::type_of(pair);
  if (type == known.tuple)
    return api.PyTuple_Size(pair) == 2 && read_one(api.PyTuple_GetItem(pair, 0), call) &&
           read_one(api.PyTuple_GetItem(pair, 1), call);
  return type == known.list && api.PyList_Size(pair) == 2 &&
         read_one(api.PyList_GetItem(pair, 0), call) && read_one(api.PyList_GetItem(pair, 1), call);
}

// An object of which only the type counts, of an array also what it looks like.
bool read_object(Object* object, const Table& table, Key& key) {
  if (object == known.none) return key.add(kNone);
  Object* type = python::type_of(object);
  Seen unused;
  if (is_array(type)) return key.add(kSome) && read_array(object, key, unused);
  bool fits = false;
  for (Object* one : table.classes) fits = fits || type == one;
  return fits && key.add(kSome) && key.add(reinterpret_cast<int64_t>(type));
}

// None, or a whole number of at least `least` whose value counts no further.
bool read_unused(Object* value, int64_t least, Key& key) {
  if (value == known.none) return key.add(kNone);
  int overflow = 0;
  return python::type_of(value) == known.whole &&
         api.PyLong_AsLongLongAndOverflow(value, &overflow) >= least && !overflow &&
         key.add(kWhole);
}

// Letters: a: an array or None; p: a pair of arrays; s: a plain value; o: an object whose type
// counts, or an array that is not used; n and m: None, or a whole number of at least 0, or 1, that
// changes nothing.
bool read_arguments(const Table& table, Object* const* args, intptr_t count, Call& call) {
  if (count != intptr_t(table.kinds.size())) return false;
  const char* level = std::getenv("WHALEFALL_ISA");
  if (!add_text(level ? level : "", level ? intptr_t(std::strlen(level)) : 0, call.key))
    return false;
  for (intptr_t i = 0; i < count; ++i) {
    const char kind = table.kinds[size_t(i)];
    const bool read = kind == 'a'   ? read_one(args[i], call)
                      : kind == 'p' ? read_pair(args[i], call)
                      : kind == 's' ? read_plain(args[i], call.key)
                      : kind == 'o' ? read_object(args[i], table, call.key)
                                    : read_unused(args[i], kind == 'm', call.key);
    if (!read) return false;
  }
  if (table.accumulator < 0) return true;
  const Seen &to = call.arrays[table.written], &add = call.arrays[table.accumulator];
  return call.key.add(to.object && add.object && to.address == add.address);
}

// Whether what is written may meet an input; where extents meet, Python looks closer.
bool may_overlap(const Table& table, const Call& call) {
  if (table.written < 0 || !call.arrays[table.written].object) return false;
  const Seen& to = call.arrays[table.written];
  for (int i = 0; i < call.num_arrays; ++i) {
    const Seen& other = call.arrays[i];
    if (i == table.written || !other.object) continue;
    if (i == table.accumulator && other.address == to.address) continue;
    if (other.low < to.high && to.low < other.high) return true;
  }
  return false;
}

struct Results {
  Object* made[kMostResults] = {};
  int64_t address[kMostResults] = {};

  // No destructor: where Python ends while a thread is in a kernel, the thread is unwound without
  // the interpreter's lock, and nothing may be counted then.
  void drop() {
    for (Object*& one : made)
      if (one) api.Py_DecRef(std::exchange(one, nullptr));
  }
  bool make(const Plan& plan) {
    for (size_t i = 0; i < plan.results.size(); ++i) {
      made[i] = make_array(plan.results[i]);
      Key unused;
      Seen seen;
      if (!made[i] || !read_array(made[i], unused, seen)) return false;
      address[i] = seen.address;
    }
    return true;
  }
  Object* give(intptr_t count) {
    if (count == 1) return std::exchange(made[0], nullptr);
    Object* all = api.PyTuple_New(count);
    for (intptr_t i = 0; all && i < count; ++i)
      api.PyTuple_SetItem(all, i, std::exchange(made[i], nullptr));
    return all;
  }
};

int32_t run(const Plan& plan, const Call& call, const Results& results) {
  alignas(64) char block[kMostBytes];
  std::memcpy(block, plan.block.data(), plan.block.size() * sizeof(int64_t));
  for (const Patch& patch : plan.patches) {
    const int64_t word = patch.from == kArray    ? call.arrays[patch.which].address
                         : patch.from == kResult ? results.address[patch.which]
                                                 : reinterpret_cast<int64_t>(block + patch.which);
    std::memcpy(block + patch.offset, &word, sizeof word);
  }
  int32_t status = 0;
  void* thread = api.PyEval_SaveThread();
  if (plan.has_status)
    status = reinterpret_cast<int32_t (*)(void*)>(plan.entry)(block);
  else
    reinterpret_cast<void (*)(void*)>(plan.entry)(block);
  api.PyEval_RestoreThread(thread);
  return status;
}

Object* perform(const Table& table, const Plan& plan, const Call& call) {
  Results results;
  if (!results.make(plan)) {
    results.drop();
    return nullptr;
  }
  for (int i = 0; i < call.num_arrays; ++i)  // a list may lose them while the kernel runs
    if (call.arrays[i].object) api.Py_IncRef(call.arrays[i].object);
  const int32_t status = run(plan, call, results);
  Object* given = nullptr;
  if (status == 0) {
    if (!plan.results.empty())
      given = results.give(intptr_t(plan.results.size()));
    else
      api.Py_IncRef(given = table.returns < 0 ? known.yes : call.arrays[table.returns].object);
  }
  results.drop();
  for (int i = 0; i < call.num_arrays; ++i)
    if (call.arrays[i].object) api.Py_DecRef(call.arrays[i].object);
  return given;
}
}  // namespace wf::calls

using namespace wf::calls;

// Finds Python's functions. Returns: whether all are there.
WF_EXPORT int32_t wf_calls_begin(const wf::python::Known* ids, const Dtypes* numpy, void* make) {
  wf::python::known = *ids;
  dtypes = *numpy;
  numpy_make = reinterpret_cast<NumpyMake>(make);
  return wf::python::api.find();
}

// Null: tensors are left to Python from now on.
WF_EXPORT void wf_calls_torch(const Torch* given, Object* tensor, Object* parameter,
                              const int32_t* codes) {
  torch_is_known = given != nullptr;
  if (!given) return;
  torch = *given;
  known.tensor = tensor;
  known.parameter = parameter;
  std::memcpy(dtypes.torch_code, codes, sizeof dtypes.torch_code);
}

// What is read of an array: address, low, high, then the words of its key. Returns: how many words,
// 0 where it is left to Python.
WF_EXPORT int64_t wf_calls_read(Object* array, int64_t* words) {
  Key key;
  Seen seen;
  if (!read_array(array, key, seen)) return 0;
  const int64_t head[] = {seen.address, seen.low, seen.high};
  std::memcpy(words, head, sizeof head);
  std::memcpy(words + 3, key.words, sizeof(int64_t) * size_t(key.count));
  return key.count + 3;
}

WF_EXPORT Object* wf_calls_make(const Made* made) {
  Object* array = make_array(*made);
  if (!array) api.Py_IncRef(array = known.none);
  return array;
}

WF_EXPORT Table* wf_calls_table(const char* kinds, int32_t written, int32_t accumulator,
                                int32_t returns, Object* const* classes, int32_t num_classes) {
  Table* table = new Table;  // lives as long as its function, which is never unloaded
  table->kinds = kinds;
  table->written = written;
  table->accumulator = accumulator;
  table->returns = returns;
  table->classes.assign(classes, classes + num_classes);
  return table;
}

WF_EXPORT void wf_calls_forget(Table* table) {
  table->plans.clear();
  table->order.clear();
  table->next = 0;
}

// Keeps a call that passed its checks and has run.
// args: the tuple that `find` was given; block: its struct, `bytes` long; patches: where addresses
// are, all words that are pointers among them. Returns: whether it is kept; not where an address in
// the struct is no array's own, as of a copy.
WF_EXPORT int32_t wf_calls_keep(Table* table, Object* args, const char* block, int64_t bytes,
                                const Patch* patches, int32_t num_patches, const Made* results,
                                int32_t num_results, void* entry, int32_t has_status) {
  const intptr_t count = api.PyTuple_Size(args);
  std::vector<Object*> given;
  for (intptr_t i = 0; i < count; ++i) given.push_back(api.PyTuple_GetItem(args, i));
  Call call;
  const bool read = read_arguments(*table, given.data(), count, call);
  api.PyErr_Clear();
  if (!read || bytes > kMostBytes || bytes % 8 || num_results > kMostResults) return 0;
  auto plan = std::make_shared<Plan>();
  for (int32_t i = 0; i < num_patches; ++i) {
    const Patch& patch = patches[i];
    int64_t word;
    std::memcpy(&word, block + patch.offset, sizeof word);
    if (patch.from == kArray) {
      const bool given_none = patch.which < 0 || !call.arrays[patch.which].object;
      if (word != (given_none ? 0 : call.arrays[patch.which].address)) return 0;
      if (given_none) continue;
    }
    plan->patches.push_back(patch);
  }
  plan->key.assign(call.key.words, call.key.words + call.key.count);
  plan->block.resize(size_t(bytes) / 8);
  std::memcpy(plan->block.data(), block, size_t(bytes));
  plan->results.assign(results, results + num_results);
  plan->entry = entry;
  plan->has_status = has_status;
  table->keep(std::move(plan));
  return 1;
}

// The builtin (METH_FASTCALL); `self` holds the table's address. None: go the long way.
WF_EXPORT Object* wf_calls_find(Object* self, Object* const* args, intptr_t count) {
  const Table& table = *static_cast<const Table*>(api.PyLong_AsVoidPtr(self));
  Call call;
  Object* given = nullptr;
  if (read_arguments(table, args, count, call) && !may_overlap(table, call))
    if (std::shared_ptr<Plan> plan = table.find(call.key))  // held: a new tensor may run other code
      if (!torch_is_known || !torch.any_mode(false)) given = perform(table, *plan, call);
  if (given) return given;
  api.PyErr_Clear();
  api.Py_IncRef(known.none);
  return known.none;
}
