// What the machine can do: read bandwidth of a large buffer, the peaks of fp32 FMA, of bf16 dots
// and of AMX's tiles, and how far two cores are from each other.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "whalefall/pool.h"
#if WF_ISA >= 4
#include "whalefall/tile.h"
#endif

namespace {
typedef float vec __attribute__((vector_size(WF_ISA >= 2 ? 64 : (WF_ISA == 1 ? 32 : 16))));
typedef long long words __attribute__((vector_size(WF_ISA >= 2 ? 64 : (WF_ISA == 1 ? 32 : 16))));
// Latency 4 times 2 ports needs 8, and 12 where bf16 dots take 6; 14 are what an asm block and the
// 16 registers of AVX2 can hold.
constexpr int kChains = 14;
// Rounds between two visits to memory: g++ stores the accumulators after each asm block, and a
// block of 16 rounds lost a tenth by it.
constexpr int kUnroll = 128;

__attribute__((noinline)) words read_all(const char* data, int64_t bytes) {
  words sum[4] = {};
  for (int64_t i = 0; i + int64_t(4 * sizeof(words)) <= bytes; i += 4 * sizeof(words)) {
    __builtin_prefetch(data + i + 1024);
    for (int j = 0; j < 4; ++j)
      sum[j] ^= *reinterpret_cast<const words*>(data + i + j * sizeof(words));
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

inline void step(vec* acc, vec a, vec b) {
#if WF_ISA >= 1
  asm volatile(
      ".rept 128\n\t"
      "vfmadd213ps %[b], %[a], %[c0]\n\t"
      "vfmadd213ps %[b], %[a], %[c1]\n\t"
      "vfmadd213ps %[b], %[a], %[c2]\n\t"
      "vfmadd213ps %[b], %[a], %[c3]\n\t"
      "vfmadd213ps %[b], %[a], %[c4]\n\t"
      "vfmadd213ps %[b], %[a], %[c5]\n\t"
      "vfmadd213ps %[b], %[a], %[c6]\n\t"
      "vfmadd213ps %[b], %[a], %[c7]\n\t"
      "vfmadd213ps %[b], %[a], %[c8]\n\t"
      "vfmadd213ps %[b], %[a], %[c9]\n\t"
      "vfmadd213ps %[b], %[a], %[c10]\n\t"
      "vfmadd213ps %[b], %[a], %[c11]\n\t"
      "vfmadd213ps %[b], %[a], %[c12]\n\t"
      "vfmadd213ps %[b], %[a], %[c13]\n\t"
      ".endr\n\t"
      : [c0] "+x"(acc[0]), [c1] "+x"(acc[1]), [c2] "+x"(acc[2]), [c3] "+x"(acc[3]),
        [c4] "+x"(acc[4]), [c5] "+x"(acc[5]), [c6] "+x"(acc[6]), [c7] "+x"(acc[7]),
        [c8] "+x"(acc[8]), [c9] "+x"(acc[9]), [c10] "+x"(acc[10]), [c11] "+x"(acc[11]),
        [c12] "+x"(acc[12]), [c13] "+x"(acc[13])
      : [a] "x"(a), [b] "x"(b));
#else
  for (int i = 0; i < kUnroll; ++i)
    for (int j = 0; j < kChains; ++j) acc[j] = acc[j] * a + b;
#endif
}

__attribute__((noinline)) vec multiply_add(int64_t rounds) {
  vec a = vec{} + 0.999f, b = vec{} + 1e-3f, acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = vec{} + float(j);
  for (int64_t i = 0; i < rounds; ++i) step(acc, a, b);
  vec sum{};
  for (int j = 0; j < kChains; ++j) sum += acc[j];
  return sum;
}

#if WF_ISA >= 3
__attribute__((noinline)) void multiply_pairs(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i)
    asm volatile(
        ".rept 128\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm0\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm1\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm2\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm3\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm4\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm5\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm6\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm7\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm8\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm9\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm10\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm11\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm12\n\t"
        "vdpbf16ps %%zmm30, %%zmm31, %%zmm13\n\t"
        ".endr\n\t" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11", "xmm12", "xmm13");
}
#else
void multiply_pairs(int64_t) {}  // the level has no such instruction
#endif

#if WF_ISA >= 4
// Products of tiles, on four sums in turn: each waits 52 cycles for its last and takes 16.
__attribute__((noinline)) void multiply_tiles(int64_t rounds) {
  const wf::Tiles tiles;
  for (int64_t i = 0; i < rounds; ++i) {
    wf::multiply_tile<0, 4, 6>();
    wf::multiply_tile<1, 4, 7>();
    wf::multiply_tile<2, 5, 6>();
    wf::multiply_tile<3, 5, 7>();
  }
}
#else
void multiply_tiles(int64_t) {}  // the level has none
#endif

struct alignas(64) Turn {
  std::atomic<int64_t> value{0};
};

// Each side waits for its numbers, every second one, and says the next.
void play(Turn& turn, int64_t mine, int64_t rounds, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  for (int64_t i = mine; i < 2 * rounds; i += 2) {
    while (turn.value.load(std::memory_order_acquire) != i) {
    }
    turn.value.store(i + 1, std::memory_order_release);
  }
}
}  // namespace

// Reads `bytes` at `data` (64-byte aligned) once, on all threads; returns something that depends on
// it.
WF_EXPORT int64_t wf_read(const char* data, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  int64_t total[64] = {};
  wf::parallel_for(bytes / kPiece, [&](int64_t i, int thread) {
    words part = read_all(data + i * kPiece, kPiece);
    total[thread & 63] ^= part[0];
  });
  int64_t sum = 0;
  for (int64_t t : total) sum ^= t;
  return sum;
}

// Runs `rounds` rounds of independent multiply-adds on each thread; returns the FLOPs done.
WF_EXPORT double wf_fma(int64_t rounds, float* sink) {
  int threads = wf::num_threads();
  wf::parallel_for(threads, [&](int64_t i, int) { sink[i & 63] = multiply_add(rounds)[0]; });
  return 2.0 * rounds * kUnroll * kChains * (sizeof(vec) / 4) * threads;
}

// Seconds that `rounds` rounds of multiply-adds take when one factor is `factor`, on this thread.
WF_EXPORT double wf_seconds_with_factor(int64_t rounds, float factor, float* sink) {
  auto start = std::chrono::steady_clock::now();
  vec a = vec{} + factor, b = vec{} + 1.0f, acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = vec{} + 1.0f;
  for (int64_t i = 0; i < rounds; ++i) step(acc, a, b);
  for (int j = 0; j < kChains; ++j) sink[j] = acc[j][0];
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds that `rounds` rounds of bf16 dots take on this thread: as many instructions as those of
// multiply-adds above, twice the products. 0 where the level has none.
WF_EXPORT double wf_seconds_of_dots(int64_t rounds) {
  if (WF_ISA < 3) return 0;
  auto start = std::chrono::steady_clock::now();
  multiply_pairs(rounds);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds that `rounds` rounds of four products of tiles take on this thread; 0 without tiles.
WF_EXPORT double wf_seconds_of_tiles(int64_t rounds) {
  if (WF_ISA < 4) return 0;
  auto start = std::chrono::steady_clock::now();
  multiply_tiles(rounds);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Runs `rounds` rounds of them on each thread; returns the FLOPs done.
WF_EXPORT double wf_tiles(int64_t rounds) {
  if (WF_ISA < 4) return 0;
  int threads = wf::num_threads();
  wf::parallel_for(threads, [&](int64_t, int) { multiply_tiles(rounds); });
  return 2.0 * rounds * 4 * 16 * 16 * 32 * threads;
}

// Seconds that a cache line takes from one core to another and back, `rounds` times.
WF_EXPORT double wf_seconds_of_turns(int64_t rounds, int32_t one, int32_t other) {
  Turn turn;
  auto start = std::chrono::steady_clock::now();
  std::thread first(play, std::ref(turn), 0, rounds, one);
  std::thread second(play, std::ref(turn), 1, rounds, other);
  first.join();
  second.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
