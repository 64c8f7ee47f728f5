// The many form with fp32 multiply-adds: panels [k][kTileColumns] of decoded W, tiles of kTileRows
// rows of x by 2 vectors in registers. Bound: FMA ports.
#pragma once
#include "panel.h"

namespace wf::gemm::many {
struct FmaPath {
  using Value = float;  // of x and of panels
  static const float* row(const Rows& x, int64_t m) { return x.row(m); }
  static constexpr int64_t panel_values(int64_t depth) { return depth * kTileColumns; }
  // `decode` leaves out a factor of FP8.
  template <int kKind>
  static constexpr float unit() {
    return kKind == kFp8 ? kFp8Scale : 1.0f;
  }

  // kLanes rows of W x [k, k + depth), as half `half` of the panel at `out`.
  template <int kKind, class Source>
  static void pack(const Source& w, int64_t n, int64_t k, int64_t depth, int64_t next, int half,
                   float* out);

  template <int M, int kLength>
  static void tile(const float* const* x, const float* const* sx, int64_t blocks,
                   const float* panel, const float* scale, float* sums, int64_t pitch);
};

// kLanes rows of W x 2 * kLanes of K -> out[k][kTileColumns].
template <int kKind, bool kExact>
inline void pack_square(const uint8_t* const* row, int64_t offset, float* out) {
  vf low[kLanes], high[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) decode<kKind, kExact>(row[r] + offset, low[r], high[r]);
  transpose(low);
  transpose(high);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) {
    store(out + k * kTileColumns, low[k]);
    store(out + (k + kLanes) * kTileColumns, high[k]);
  }
}

template <int kKind, bool kExact, class Source>
__attribute__((noinline)) bool pack_rows(const Source& w, int64_t n, int64_t k, int64_t depth,
                                         int64_t next, float* out) {
  RowBlock<kKind> block;
  Fp8NanFlag nan;
  for (int64_t b = 0; b < depth; b += kBlock) {
    block.find(w, n, k + b, next);
    if (kKind == kFp8 && !kExact)
      for (int r = 0; r < kLanes; ++r)
        for (int i = 0; i < kBlock; i += 32) nan.see32(block.row[r] + i);
    for (int i = 0; i < kBlock; i += 2 * kLanes)
      pack_square<kKind, kExact>(block.row, i * block.kBytes, out + (b + i) * kTileColumns);
  }
  return !nan.seen();
}

template <int kKind, class Source>
void FmaPath::pack(const Source& w, int64_t n, int64_t k, int64_t depth, int64_t next, int half,
                   float* out) {
  out += half * kLanes;
  if (n >= w.rows()) {
    for (int64_t i = 0; i < round_up(depth, kBlock); ++i) store(out + i * kTileColumns, vf{});
  } else if (!pack_rows<kKind, false>(w, n, k, depth, next, out) && kKind == kFp8) {
    pack_rows<kKind, kKind == kFp8>(w, n, k, depth, 0, out);
  }
}

// sums[m][.] += one tile of products over `blocks` blocks of kLength of K.
template <int M, int kLength>
__attribute__((noinline)) void FmaPath::tile(const float* const* x, const float* const* sx,
                                             int64_t blocks, const float* panel, const float* scale,
                                             float* sums, int64_t pitch) {
  for (int64_t b = 0; b < blocks; ++b) {
    vf acc[M][2] = {};
    const float* row[M];
    for (int m = 0; m < M; ++m) row[m] = x[m] + b * kLength;
#pragma GCC unroll 4
    for (int k = 0; k < kLength; ++k) {
      vf low = load(panel), high = load(panel + kLanes);
      panel += kTileColumns;
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        vf v = broadcast(row[m] + k);
        acc[m][0] = fma(v, low, acc[m][0]);
        acc[m][1] = fma(v, high, acc[m][1]);
      }
    }
    add_tile<M>(acc, scale, sx, b, sums, pitch);
    scale += kTileColumns;
  }
}
}  // namespace wf::gemm::many
