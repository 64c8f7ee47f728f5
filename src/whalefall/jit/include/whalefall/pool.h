// The thread pool as a kernel sees it. A unit that includes this header exports wf_set_pool, which
// the loader calls with the process's one pool; before that (or in a C++ test) work runs inline.
//
//   wf::parallel_for(tasks, [&](int64_t task, int thread) { … });
//
// Tasks are handed out by an atomic counter: which thread runs a task is not fixed, so a task must
// own its outputs and its results must not depend on `thread` (0 <= thread < num_threads()).
//
// Tasks that stream neighbouring memory go through `parallel_runs` instead: each thread takes a run
// of neighbours, so that it reads on where it stopped, and helps others when it has done its own.
#pragma once
#include <atomic>
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

// Which of `runs` equal runs a thread works on; the first of `tasks` tasks that are its share.
struct Run {
  int64_t index, runs;
  int64_t first_of(int64_t tasks) const { return tasks * index / runs; }
};

// body(task, next, run): `next` is the task that this thread does after this one, -1 if it does not
// know; `run` its share, from which it can tell what it will do in the call after this one.
template <class Body>
inline void parallel_runs(int64_t tasks, Body&& body) {
  constexpr int64_t kMost = 64;
  struct alignas(64) Share {  // tasks [first, end) are left; both in one word
    std::atomic<uint64_t> left;
    int64_t take(bool from_front, bool& more) {
      uint64_t seen = left.load(std::memory_order_relaxed);
      for (;;) {
        const uint64_t first = seen >> 32, end = seen & 0xffffffff;
        if (first >= end) return -1;
        const uint64_t rest = from_front ? (first + 1) << 32 | end : first << 32 | (end - 1);
        more = first + 1 < end;
        if (left.compare_exchange_weak(seen, rest, std::memory_order_relaxed))
          return int64_t(from_front ? first : end - 1);
      }
    }
  };
  const int64_t threads = num_threads(), most = threads < kMost ? threads : kMost;
  const int64_t runs = tasks < most ? tasks : most;
  Share shares[kMost];
  for (int64_t i = 0; i < runs; ++i) {
    const Run run{i, runs}, after{i + 1, runs};
    shares[i].left.store(uint64_t(run.first_of(tasks)) << 32 | uint64_t(after.first_of(tasks)),
                         std::memory_order_relaxed);
  }
  parallel_for(runs, [&](int64_t own, int) {
    const Run run{own, runs};
    bool more = false;
    for (int64_t task; (task = shares[own].take(true, more)) >= 0;)
      body(task, more ? task + 1 : -1, run);
    for (int64_t i = 1; i < runs; ++i)
      for (int64_t task; (task = shares[(own + i) % runs].take(false, more)) >= 0;)
        body(task, int64_t(-1), run);
  });
}
}  // namespace wf

#ifndef WF_POOL_ITSELF
WF_EXPORT inline __attribute__((used)) void wf_set_pool(const wf::Pool* pool) {
  wf::pool_slot() = pool;
}
#endif
