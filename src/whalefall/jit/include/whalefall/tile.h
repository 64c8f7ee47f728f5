// AMX: products of tiles of bf16, where the level is `amx` and the machine's tiles are faster than
// FMA (WF_TILE; jit/machine.py measures it). Units ask `kTile`.
//
//   c[16 rows][16] += a[16 rows][32] . b[16 pairs][16][2]        c fp32; a, b bf16
//
// There are eight tiles of 16 rows of 64 bytes; one is loaded in 8 cycles, stored in 16, and a
// product takes 16, of which 52 pass before its sum can be used: four sums keep the unit busy.
// Products of bf16 are exact in fp32, pairs are added in order of k; subnormals count as zero.
// Written as instructions: g++ 12's intrinsic for the configuration tells the compiler of 8 of the
// 64 bytes it reads.
#pragma once
#include <cstdint>

namespace wf {
#ifdef WF_TILE
constexpr bool kTile = true;
#else
constexpr bool kTile = false;
#endif

#if WF_ISA >= 4
constexpr int kTileRows = 16, kTileBytes = 64, kTileHalves = 32;

// The shapes of the eight tiles, as the CPU reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};

  constexpr TileShapes() {
    for (int i = 0; i < 8; ++i) bytes[i] = kTileBytes, rows[i] = kTileRows;
  }
};

// Tiles are there while this lives, on this thread; then gone, so that the kernel need not save
// their 8 KB. Costs 200 cycles: once a task.
class Tiles {
 public:
  Tiles() {
    static constexpr TileShapes kWhole;
    set(kWhole);
  }
  explicit Tiles(const TileShapes& shapes) { set(shapes); }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  static void set(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  }
};

template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// `pitch`: bytes from row to row.
template <int T>
inline void load_tile(const void* rows, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(pitch), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void* rows, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(pitch), "i"(T) : "memory");
}
// tile C += tile A . tile B
template <int C, int A, int B>
inline void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif
}  // namespace wf
