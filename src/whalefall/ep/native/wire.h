// What lies in shared memory between the ranks of a host, and how they wait for each other.
//
// Every rank s of the group has a stream on every host: a ring of slots that one process fills (s
// itself, or on another host its proxy) and all ranks of the host read. Time is counted in ticks:
// a collective takes a number of ticks that all ranks know, tick k uses slot k % slots. A slot may
// be filled again once every rank of the host has done the tick that used it before: so memory is
// bounded and a stalled reader stops the writers, losing nothing.
// A collective's header (counts) goes through a mailbox of its own, so that the next one can be
// announced while the data of this one still move.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "whalefall/pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wf_ep {

constexpr int64_t kSliceNs = 20'000'000;  // how often a waiting rank looks whether the other lives
constexpr int64_t kGoneNs = 1'500'000;    // a core that stayed away for so long is busy with others
constexpr int kSleeps = 64, kLooks = 128;
constexpr int64_t kDead = 1, kSilent = 1'000'001;  // status -(kDead + rank), -(kSilent + rank)
constexpr int kMaxRanks = 64;                      // of a host
constexpr int64_t kNoRoom = -2'000'001, kNoMemory = -2'000'002;
constexpr int64_t kClosed = -2'000'005;  // this rank leaves
constexpr int64_t kFailed = 3'000'001;   // status -(kFailed + rank): a call of that rank failed

// A counter that only grows (modulo 2^32), one writer.
struct Word {
  std::atomic<uint32_t> value, sleepers;
  char pad[56];
};

// Whom a rank waits for, and when it last said so: a process that was stopped says nothing new.
struct Waiting {
  std::atomic<int32_t> awaited;  // 1 + that rank; 0: it does not wait
  std::atomic<int64_t> said_ns;
};

struct Control {                 // one a local rank
  Word pulled;                   // the oldest tick not done
  std::atomic_flag ending;       // a thread of this rank changes the two
  uint64_t ended;                // bit i: tick pulled + i is done, out of order
  std::atomic<int64_t> gave_up;  // the status that ended its collectives, else 0
  Waiting waiting;
};

struct Stream {                  // one a rank of the group, on each host
  Word staged;                   // ticks filled
  Word posted;                   // headers posted
  std::atomic<uint32_t> failed;  // why nothing comes from another host any more: -status, else 0
  std::atomic<uint32_t> left;    // 1: some rank went on without this one, so its step is lost
  Waiting waiting;               // of another host's rank, as it was told
  char pad[40];
};

// The view of one process. Arrays are the caller's.
struct Group {
  int32_t rank, num_ranks, local, num_local, slots, spins, crowded, lock, shrink, slots_only;
  int32_t closing;  // 1, from any thread: waits end, since the memory goes away
  int64_t slot_bytes, timeout_ns, mailbox_bytes, mailboxes;
  const int32_t* rank_of;   // [num_local] its rank in the group
  const int32_t* local_of;  // [num_ranks] its place on this host, or -1
  const int32_t* owner;     // [num_ranks] the local rank that fills the stream
  Control* const* control;  // [num_local]
  Stream* const* stream;    // [num_ranks]
  uint8_t* const* mailbox;  // [num_ranks]
  uint8_t* const* slot;     // [num_ranks] slot 0
  uint8_t* const* shared;   // [num_ranks] memory for results of each local rank, or null
  int32_t* masked;          // [num_ranks] 1: treated as gone
  // Slots are sparse: memory is reserved when a slot first grows so far, so no write can fail.
  int64_t* reserved;  // [slots] bytes reserved of this rank's own slots
  int64_t memory_file, slot_offset;
};

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Each rank holds a write lock on its byte of the host's lock file; the kernel drops it at death.
inline bool is_alive(const Group& g, int local) {
  if (local == g.local) return true;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = local;
  lock.l_len = 1;
  return fcntl(g.lock, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

inline bool reached(const Word& w, uint32_t target) {
  return static_cast<int32_t>(w.value.load(std::memory_order_acquire) - target) >= 0;
}

inline void advance(Word& w, uint32_t value) {
  w.value.store(value);
  if (w.sleepers.load()) syscall(SYS_futex, &w.value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Look again and again for a while. The core is given away between looks, where there are more
// ranks than cores each time, else now and then: the rank that is waited for may have been put on
// this one. If the core stays away for long, something else runs there, and whoever sleeps gets it
// back sooner than whoever gives it away: then not for the next waits.
inline bool spin(const Group& g, const Word& w, uint32_t target) {
  static thread_local int sleeping = 0;
  if (sleeping > 0) return sleeping--, reached(w, target);
  for (int i = 1; i <= g.spins; i++) {
    if (reached(w, target)) return true;
    if (!g.crowded && i % kLooks) {
      pause_cpu();
      continue;
    }
    int64_t before = now_ns();
    sched_yield();
    if (now_ns() - before > kGoneNs) return sleeping = kSleeps, reached(w, target);
  }
  return false;
}

inline void say(Waiting& waiting, int rank) {
  waiting.said_ns.store(now_ns());
  waiting.awaited.store(rank + 1);
}

// Says whom this rank waits for, for as long as this lives. Only the first of its threads to wait
// says it, and one that forwards for another rank never does.
struct Awaiting {
  static bool& is_forwarding() {
    static thread_local bool is = false;
    return is;
  }
  Waiting& waiting;
  bool mine = false;

  Awaiting(const Group& g, int rank) : waiting(g.control[g.local]->waiting) {
    int32_t nobody = 0;
    if (!is_forwarding()) mine = waiting.awaited.compare_exchange_strong(nobody, rank + 1);
    again();
  }
  void again() {
    if (mine) waiting.said_ns.store(now_ns());
  }
  ~Awaiting() {
    if (mine) waiting.awaited.store(0);
  }
};

inline const Waiting& waiting_of(const Group& g, int rank) {
  int l = g.local_of[rank];
  return l >= 0 ? g.control[l]->waiting : g.stream[rank]->waiting;
}

// The rank that `rank` waits for, -1: none. What was said long ago is no longer so.
inline int awaited_by(const Group& g, int rank) {
  const Waiting& its = waiting_of(g, rank);
  int awaited = its.awaited.load() - 1;
  return awaited < 0 || now_ns() - its.said_ns.load() > g.timeout_ns / 2 ? -1 : awaited;
}

// Whom all wait for in the end who wait for `rank`, which may only wait in turn.
inline int culprit(const Group& g, int rank) {
  int last = rank;
  for (int i = 0; i < g.num_ranks; i++) {
    int next = awaited_by(g, last);
    if (next < 0) return last;
    if (next == g.rank) return rank;  // each waits for the other
    last = next;
  }
  return rank;
}

// The rank that a status names.
inline int lost_rank(int64_t status) {
  for (int64_t kind : {kFailed, kSilent, kDead})
    if (-status >= kind) return static_cast<int>(-status - kind);
  return -1;
}

// The status with which some other rank ended its collectives, else 0. With shrink not that of a
// lost rank itself, which is masked once it is waited for.
inline int64_t told(const Group& g) {
  for (int r = 0; r < g.num_ranks; r++) {
    int l = g.local_of[r];
    if (r == g.rank || g.masked[r]) continue;
    int64_t status =
        l >= 0 ? g.control[l]->gave_up.load() : -static_cast<int64_t>(g.stream[r]->failed.load());
    if (status && !(g.shrink && lost_rank(status) == r)) return status;
  }
  return 0;
}

// The status of a wait for `silent` whose time was up `late` ns ago; 0: wait on. What ranks of
// another host wait for is not seen here, so they get more time to find out, and tell; more again
// where a neighbour, who may be the silent one, brings what they send.
inline int64_t silence(const Group& g, int owner, int silent, int64_t late) {
  if (int64_t status = told(g)) return status;
  int who = culprit(g, silent);
  int64_t patience = g.timeout_ns / 4 + 1'000'000'000;  // PATIENCE of links.py
  if (g.local_of[silent] < 0 && owner != g.local) patience *= 2;
  return g.local_of[who] >= 0 || late > patience ? -(kSilent + who) : 0;
}

// Goes on without a rank: said before anything is overwritten that it may still be reading.
inline void leave(const Group& g, int rank) {
  if (rank == g.rank || g.stream[rank]->left.load(std::memory_order_relaxed)) return;
  g.stream[rank]->left.store(1);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

// The status of a rank that was left, else 0. What was read from the others before is theirs if
// this comes after it and is 0; else it may be anything, so no index in it is trusted.
inline int64_t left(const Group& g) {
  std::atomic_thread_fence(std::memory_order_acquire);
  return g.stream[g.rank]->left.load(std::memory_order_relaxed) ? -(kSilent + g.rank) : 0;
}

inline bool is_closing(const Group& g) { return __atomic_load_n(&g.closing, __ATOMIC_ACQUIRE); }

// Wait until w reaches target. `owner`: the local rank that moves it; `stream`: where a proxy notes
// a broken connection, or null; `silent`: whom to name if only time runs out. 0, or a status that
// names the rank which will not come.
inline int64_t await(const Group& g, Word& w, uint32_t target, int owner, Stream* stream,
                     int silent) {
  if (spin(g, w, target)) return 0;
  int64_t end = now_ns() + g.timeout_ns, status = 0;
  Awaiting said(g, silent);
  w.sleepers.fetch_add(1);
  for (;;) {
    uint32_t seen = w.value.load();
    if (static_cast<int32_t>(seen - target) >= 0) break;
    timespec slice = {0, kSliceNs};
    syscall(SYS_futex, &w.value, FUTEX_WAIT, seen, &slice, nullptr, 0);
    if (reached(w, target)) break;
    said.again();
    if (is_closing(g)) {
      status = kClosed;
    } else if (int64_t mine = left(g)) {
      status = mine;
    } else if (stream && stream->failed.load()) {
      status = -static_cast<int64_t>(stream->failed.load());
    } else if (int64_t its = g.control[owner]->gave_up.load()) {
      status = its;  // whom it waited for in vain, not itself
    } else if (!is_alive(g, owner)) {
      status = -(kDead + g.rank_of[owner]);
    } else if (int64_t late = now_ns() - end; late > 0) {
      status = silence(g, owner, silent, late);
    }
    if (status) {
      if (reached(w, target)) status = 0;  // it came at the last moment
      break;
    }
  }
  w.sleepers.fetch_sub(1);
  return status;
}

// As await; with shrink a rank that is lost is masked (returns 1). Only the lost one ever is: if
// `rank` lives but what it sends is lost with its proxy, or it gave up over another, its wait
// fails.
inline int64_t await_unless_masked(const Group& g, int rank, Word& w, uint32_t target,
                                   Stream* stream) {
  while (!g.masked[rank]) {
    int64_t status = await(g, w, target, g.owner[rank], stream, rank);
    if (status >= 0 || !g.shrink || status == kClosed) return status;
    int lost = lost_rank(status);
    bool waits = lost != g.rank_of[g.owner[rank]] && lost != g.rank && !told(g);
    if (lost != rank && (!waits || g.masked[lost])) return status;
    g.masked[lost] = 1;  // if another: `rank` does the same, and goes on
  }
  leave(g, rank);
  return 1;
}

inline int64_t await_rank(const Group& g, int rank, Word& w, uint32_t target) {
  return await_unless_masked(g, rank, w, target, g.stream[rank]);
}

// Wait until slot `tick % slots` is free: every local rank has done tick - slots.
inline int64_t await_slot(const Group& g, uint32_t tick) {
  if (int64_t status = left(g)) return status;
  for (int l = 0; l < g.num_local; l++) {
    Word& pulled = g.control[l]->pulled;
    int64_t status = await_unless_masked(g, g.rank_of[l], pulled, tick + 1 - g.slots, nullptr);
    if (status < 0) return status;
  }
  return 0;
}

// Wait until every local rank has done `tick`: nobody reads this rank's memory any more.
inline int64_t await_readers(const Group& g, uint32_t tick) {
  for (int l = 0; l < g.num_local; l++) {
    int rank = g.rank_of[l];
    int64_t status = await(g, g.control[l]->pulled, tick + 1, l, nullptr, rank);
    if (status < 0) return status;
  }
  return 0;
}

// All ticks before `tick` are done, those too that were taken and then not used (ranks disagreed):
// where ticks end in order.
inline void catch_up(const Group& g, int64_t tick) {
  auto to = static_cast<uint32_t>(tick);
  if (!reached(g.control[g.local]->pulled, to)) advance(g.control[g.local]->pulled, to);
}

// `tick` is done, whether earlier ones are or not: hooks may be called in any order, also while
// the communication thread ends another. No rank is ever as many ticks ahead as there are slots.
inline void end_tick(const Group& g, uint32_t tick) {
  Control& mine = *g.control[g.local];
  while (mine.ending.test_and_set(std::memory_order_acquire)) pause_cpu();
  uint32_t oldest = mine.pulled.value.load();
  mine.ended |= 1ull << (tick - oldest) % 64;
  for (; mine.ended & 1; mine.ended >>= 1) oldest++;
  if (oldest != mine.pulled.value.load()) advance(mine.pulled, oldest);
  mine.ending.clear(std::memory_order_release);
}

inline uint8_t* slot_at(const Group& g, int rank, uint32_t tick) {
  return g.slot[rank] + (tick % g.slots) * g.slot_bytes;
}

// Reserve the first `bytes` of this rank's own slot for `tick`.
inline int64_t reserve(const Group& g, uint32_t tick, int64_t bytes) {
  int64_t i = tick % g.slots;
  if (bytes > g.slot_bytes) return kNoRoom;
  if (bytes <= g.reserved[i]) return 0;
  int64_t wanted = (bytes + 65535) / 65536 * 65536;
  if (wanted > g.slot_bytes) wanted = g.slot_bytes;
  if (posix_fallocate(static_cast<int>(g.memory_file), g.slot_offset + i * g.slot_bytes, wanted))
    return kNoMemory;
  g.reserved[i] = wanted;
  return 0;
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Copy n bytes; `past` writes around the caches, for results larger than they are.
inline void copy_row(void* to, const void* from, int64_t n, bool past) {
#if defined(__AVX512F__)
  if (past && n % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    auto* d = static_cast<__m512i*>(to);
    auto* s = static_cast<const __m512i*>(from);
    for (int64_t i = 0; i < n / 64; i++) _mm512_stream_si512(d + i, _mm512_loadu_si512(s + i));
    return;
  }
#elif defined(__AVX2__)
  if (past && n % 32 == 0 && reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    auto* d = static_cast<__m256i*>(to);
    auto* s = static_cast<const __m256i*>(from);
    for (int64_t i = 0; i < n / 32; i++) _mm256_stream_si256(d + i, _mm256_loadu_si256(s + i));
    return;
  }
#else
  (void)past;
#endif
  memcpy(to, from, n);
}

inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace wf_ep
