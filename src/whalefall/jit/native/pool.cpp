// One pool for all kernels of the process: workers spin while a step runs and sleep soon after.
//
// A call posts a job (function, context, task count) under a new generation number; workers and the
// caller take tasks from an atomic counter until none is left. A worker that finds no new
// generation spins for kSpin rounds (about 100 us), yielding now and then, and then sleeps on a
// futex: waking one costs 16-60 us, so the spin must outlast the gaps between the kernels of one
// step. A caller that finds the pool taken (another Python thread computes) runs its tasks itself.
//
// A worker enters a job through its gate, and the caller closes the gate when no task is left: it
// waits for workers inside, never for one that sleeps or has lost its core to another process. So
// on a machine with other work a job takes as long as one thread needs, not as long as the
// scheduler's next turn for every worker.
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#define WF_POOL_ITSELF
#include "whalefall/pool.h"

namespace {
constexpr int kSpin = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  void (*call)(void*, int64_t, int);
  void* context;
  int64_t tasks;
};

struct State {
  std::mutex busy;
  std::atomic<uint32_t> generation{0};
  std::atomic<int> sleepers{0};
  std::atomic<int64_t> next{0};
  // High half: the generation of the open job, 0 while none is open; low half: workers inside.
  std::atomic<uint64_t> gate{0};
  Job job{};
  int wanted = 1;
  int started = 1;  // threads that exist, the caller included
  std::atomic<int> active{1};
};
State* state = new State;  // never destroyed: workers outlive static destructors

void take_tasks(const Job& job, int thread) {
  for (;;) {
    int64_t task = state->next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.tasks) return;
    job.call(job.context, task, thread);
  }
}

constexpr uint64_t kInside = 0xffffffff;

bool enter(uint32_t generation) {
  uint64_t gate = state->gate.load(std::memory_order_acquire);
  while (gate >> 32 == generation)
    if (state->gate.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
  return false;
}

void sleep_while(uint32_t seen) {
  state->sleepers.fetch_add(1);
  if (state->generation.load() == seen)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&state->generation), FUTEX_WAIT_PRIVATE, seen,
            nullptr, nullptr, 0);
  state->sleepers.fetch_sub(1);
}

void* work(void* argument) {
  int thread = static_cast<int>(reinterpret_cast<intptr_t>(argument) & 0xffff);
  uint32_t seen = static_cast<uint32_t>(reinterpret_cast<intptr_t>(argument) >> 16);
  for (;;) {
    uint32_t now;
    for (int spin = 0; (now = state->generation.load(std::memory_order_acquire)) == seen; ++spin) {
      relax();
      if (spin % 512 == 511) sched_yield();
      if (spin > kSpin) {
        sleep_while(seen);
        spin = 0;
      }
    }
    seen = now;
    if (thread < state->active.load(std::memory_order_relaxed) && enter(now)) {
      take_tasks(state->job, thread);
      state->gate.fetch_sub(1, std::memory_order_release);
    }
  }
  return nullptr;
}

void start_workers() {
  while (state->started < state->wanted) {
    pthread_t thread;
    intptr_t argument = (static_cast<intptr_t>(state->generation.load()) << 16) | state->started;
    if (pthread_create(&thread, nullptr, work, reinterpret_cast<void*>(argument)) != 0) break;
    pthread_detach(thread);
    ++state->started;
  }
}

void run(int64_t tasks, void (*call)(void*, int64_t, int), void* context) {
  std::unique_lock<std::mutex> lock(state->busy, std::try_to_lock);
  if (!lock.owns_lock() || state->wanted == 1) {
    for (int64_t i = 0; i < tasks; ++i) call(context, i, 0);
    return;
  }
  if (state->started < state->wanted) start_workers();
  int active = state->wanted < state->started ? state->wanted : state->started;
  state->job = {call, context, tasks};
  state->active.store(active, std::memory_order_relaxed);
  state->next.store(0, std::memory_order_relaxed);
  uint32_t generation = state->generation.load(std::memory_order_relaxed) + 1;
  generation += generation == 0;
  state->gate.store(uint64_t(generation) << 32, std::memory_order_release);
  state->generation.store(generation, std::memory_order_seq_cst);
  if (state->sleepers.load() > 0)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&state->generation), FUTEX_WAKE_PRIVATE, 1 << 20,
            nullptr, nullptr, 0);
  take_tasks(state->job, 0);
  state->gate.fetch_and(kInside, std::memory_order_acq_rel);
  for (int spin = 0; state->gate.load(std::memory_order_acquire) != 0; ++spin) {
    relax();
    if (spin % 1024 == 1023) sched_yield();
  }
}

int count() { return state->wanted; }
const wf::Pool kPool = {run, count};
// A child of fork() has the caller's thread only: start from a fresh state.
void after_fork_in_child() {
  int wanted = state->wanted;
  state = new State;
  state->wanted = wanted;
}
const int kRegistered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
}  // namespace

WF_EXPORT const wf::Pool* wf_pool() { return &kPool; }
WF_EXPORT int wf_pool_get_threads() { return count() + 0 * kRegistered; }
WF_EXPORT void wf_pool_set_threads(int threads) {
  std::lock_guard<std::mutex> lock(state->busy);
  state->wanted = threads < 1 ? 1 : threads;
}
