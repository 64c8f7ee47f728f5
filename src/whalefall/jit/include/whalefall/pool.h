// The thread pool as a kernel sees it. A unit that includes this header exports wf_set_pool, which
// the loader calls with the process's one pool; before that (or in a C++ test) work runs inline.
//
//   wf::parallel_for(tasks, [&](int64_t task, int thread) { … });
//
// Tasks are handed out by an atomic counter: which thread runs a task is not fixed, so a task must
// own its outputs and its results must not depend on `thread` (0 <= thread < num_threads()).
#pragma once
#include <cstdint>
#include <type_traits>

#define WF_EXPORT extern "C" __attribute__((visibility("default")))

namespace wf {
struct Pool {
  void (*run)(int64_t tasks, void (*call)(void* context, int64_t task, int thread), void* context);
  int (*num_threads)();
};
inline const Pool*& pool_slot() {
  static const Pool* slot = nullptr;
  return slot;
}
inline int num_threads() { return pool_slot() ? pool_slot()->num_threads() : 1; }

template <class Body>
inline void parallel_for(int64_t tasks, Body&& body) {
  if (tasks <= 1 || !pool_slot()) {
    for (int64_t i = 0; i < tasks; ++i) body(i, 0);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  pool_slot()->run(
      tasks,
      [](void* context, int64_t task, int thread) {
        (*static_cast<Plain*>(context))(task, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}
}  // namespace wf

#ifndef WF_POOL_ITSELF
WF_EXPORT inline __attribute__((used)) void wf_set_pool(const wf::Pool* pool) {
  wf::pool_slot() = pool;
}
#endif
