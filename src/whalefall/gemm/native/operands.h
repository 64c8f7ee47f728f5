// What the products of this room work on: a weight as it lies in a checkpoint, rows of activations
// made fp32 or bf16, and where results go. Plain structs: Python fills them through ctypes, and
// other rooms' native units include this header.
#pragma once
#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include "whalefall/dot.h"
#include "whalefall/pool.h"

namespace wf::gemm {
constexpr int kBlock = 128;  // K of one partial sum; rows and columns of one scale of a weight

enum Kind : int32_t { kF32 = 0, kBf16 = 1, kFp8 = 2 };
enum Form : int32_t { kFew = 0, kMany = 1 };
// What a product does to fp32 activations first: nothing; make each 128 E4M3 with a scale of its
// own (the published W8A8 numerics); round them to bf16 where that lets it use the bf16 dot
// (W8A16).
enum Activations : int32_t { kKeep = 0, kE4m3 = 1, kHalf = 2 };

constexpr int64_t kind_bytes(int kind) { return kind == kF32 ? 4 : kind == kBf16 ? 2 : 1; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// W[rows, cols], row-major without gaps, at any alignment.
struct Weight {
  const void* data;
  const float* scale;   // kFp8: [ceil(rows / 128), scale_pitch], of the whole matrix; else null
  int64_t rows, cols;   // of this part
  int64_t scale_pitch;  // scales in a row: ceil(cols / 128)
  int64_t first_row;    // where this part starts in the whole matrix: row n has the scales of
                        // block row (first_row + n) / 128
  int32_t kind;
  int32_t unused;

  const uint8_t* row(int64_t n) const {
    return static_cast<const uint8_t*>(data) + n * cols * kind_bytes(kind);
  }
  const float* row_scale(int64_t n) const {
    return scale + ((first_row + n) / kBlock) * scale_pitch;
  }
};

// Activations as the caller has them: kF32 or kBf16 rows, `pitch` elements apart.
struct Input {
  const void* data;
  int64_t pitch;
  int32_t kind;
  int32_t unused;
};

// A set of rows of x as AMX multiplies them: groups of 16 rows, a block of K of a group being four
// tiles, [16 pairs of K][width][2]. Where W is FP8, each 64 of K are in the order of Fp8Decoder.
struct TileRows {
  static constexpr int kTilesOfBlock = kBlock / 32;
  const uint16_t* values = nullptr;  // [K / 128][groups][4] tiles; null: there are none
  const float* scales = nullptr;     // [blocks][groups][width]; null: 1
  int64_t groups = 0, first = 0;     // `first`: the row of x with which they start
  int64_t width = 16;                // rows in a group; fewer if all rows are, in the few form

  int64_t group_of(int64_t row) const { return (row - first) / 16; }
  const uint16_t* block(int64_t b, int64_t group) const {
    return values + (b * groups + group) * kTilesOfBlock * 32 * width;
  }
  const float* scale(int64_t b, int64_t group) const {
    return scales + (b * groups + group) * width;
  }
};

// Activations as the kernels read them: rows of fp32, or of bf16 for the dot kernels, zero from K
// to the next multiple of 128; or bf16 tiles.
struct Rows {
  const float* data;  // null: `halves` has them
  int64_t pitch;
  const int32_t* index;  // row m is data[index[m]]; null: data[m]
  const float* scale;    // [rows, scale_pitch], one for each 128 of K; null: 1
  int64_t scale_pitch;
  const float* unlift;  // [rows], see Order::kWords; null: 1
  const uint16_t* halves = nullptr;
  TileRows tiles = {};

  int64_t place(int64_t m) const { return index ? index[m] : m; }
  const float* row(int64_t m) const { return data + place(m) * pitch; }
  const uint16_t* half_row(int64_t m) const { return halves + place(m) * pitch; }
  const float* row_scale(int64_t m) const {
    return scale ? scale + place(m) * scale_pitch : nullptr;
  }
  float row_unlift(int64_t m) const { return unlift ? unlift[place(m)] : 1.0f; }
};

// The order of K within a row of `Rows`.
enum class Order {
  kPlain,
  // As `fp8_decode_words` delivers weights: in each 4 * kLanes, out[j * kLanes + i] = x[4 * i + 3 -
  // j]; and each row multiplied by a power of two that keeps products with value * kFp8Tiny away
  // from fp32's subnormals. `unlift` takes it, and kFp8Tiny, out again: exact.
  kWords,
  // bf16, each 64 as `Fp8Decoder` delivers weights, for the dot.
  kDealt,
};

// `count` fp32 values to kF32 or kBf16 at `to`: times `factor`, plus what lies at `add` (null:
// nothing), which is of the same kind.
__attribute__((noinline)) inline void write_row(int32_t kind, void* to, const float* values,
                                                int64_t count, const float* factor,
                                                const void* add) {
  auto* wide = static_cast<float*>(to);
  auto* half = static_cast<uint16_t*>(to);
  auto* add_wide = static_cast<const float*>(add);
  auto* add_half = static_cast<const uint16_t*>(add);
  const vf times = set1(factor ? *factor : 1.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    vf v = load(values + i);
    if (factor) v = v * times;
    if (add) v = v + (kind == kBf16 ? load_bf16(add_half + i) : load_bytes(add_wide + i));
    if (kind == kBf16)
      store_bf16(half + i, v);
    else
      store(wide + i, v);
  }
  for (; i < count; ++i) {  // rows may start at any byte
    float v = factor ? values[i] * *factor : values[i], sum = 0;
    uint16_t bits = 0;
    if (add && kind == kBf16) std::memcpy(&bits, add_half + i, 2), sum = bf16_to_float(bits);
    if (add && kind != kBf16) std::memcpy(&sum, add_wide + i, 4);
    if (add) v += sum;
    bits = float_to_bf16(v);
    if (kind == kBf16)
      std::memcpy(half + i, &bits, 2);
    else
      std::memcpy(wide + i, &v, 4);
  }
}

// Where results go: kF32 or kBf16, row m at index[m]. `factor` multiplies row m before rounding.
struct Output {
  void* data;
  int64_t pitch;
  const int32_t* index;
  const float* factor;
  int32_t kind;
  int32_t unused;

  void put(int64_t m, int64_t n, const float* values, int64_t count) const {
    const int64_t row = index ? index[m] : m;
    write_row(kind, static_cast<char*>(data) + (row * pitch + n) * kind_bytes(kind), values, count,
              factor ? factor + row : nullptr, nullptr);
  }
};

// Memory that grows and stays, on huge pages (4 KiB pages cost a quarter of the bandwidth).
class Scratch {
 public:
  ~Scratch() { release(); }
  template <class T>
  T* get(int64_t count) {
    int64_t bytes = round_up(count * int64_t(sizeof(T)) + 256, int64_t(1) << 21);
    if (bytes > bytes_) {
      release();
      void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) __builtin_trap();
      madvise(p, bytes, MADV_HUGEPAGE);
      data_ = p;
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void release() {
    if (data_) munmap(data_, bytes_);
    data_ = nullptr;
    bytes_ = 0;
  }
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// 2 * kLanes weights at p as floats, in order; kFp8 comes divided by kFp8Scale.
template <int kKind, bool kExact = false>
inline void decode(const uint8_t* p, vf& low, vf& high) {
  if constexpr (kKind == kFp8 && kExact) {
    fp8_decode_exact(p, low, high);
  } else if constexpr (kKind == kFp8) {
    fp8_decode(p, low, high);
  } else if constexpr (kKind == kBf16) {
    low = load_bf16(p);
    high = load_bf16(p + 2 * kLanes);
  } else {
    low = load_bytes(p);
    high = load_bytes(p + 4 * kLanes);
  }
}
}  // namespace wf::gemm
