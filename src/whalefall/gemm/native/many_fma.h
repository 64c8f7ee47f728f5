// The many form with fp32 multiply-adds: panels [k][kTileColumns] of decoded W, tiles of kTileRows
// rows of x by 2 vectors in registers. Bound: FMA ports.
#pragma once
#include "panel.h"

namespace wf::gemm::many {
struct FmaPath {
  using Value = float;  // of x and of panels
  static const float* row(const Rows& x, int64_t m) { return x.row(m); }
  static constexpr int64_t panel_values(int64_t depth) { return depth * kTileColumns; }
  // Where no instruction loads a number into all lanes, x comes spread: see `spread`.
  static constexpr bool kSpread = WF_ISA == 0;
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

// The same of kLanes rows of FP8 x 4 * kLanes of K: codes are transposed as they are stored, 4
// columns of K a dword, and only then decoded, so that vectors come out as rows of the panel. NaN
// reads 480.
inline void pack_codes(const uint8_t* const* row, int64_t offset, float* out) {
  const vf unit = set1(1.0f / (kFp8Tiny * kFp8Scale));
  vf v[kLanes];
#pragma GCC unroll 8
  for (int r = 0; r < kLanes; ++r) v[r] = load_bytes(row[r] + offset);
  transpose(v);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i, out += 4 * kTileColumns) {
    vf w[4];
    fp8_decode_words((vi)v[i], w);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(out + (3 - j) * kTileColumns, w[j] * unit);
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
    if constexpr (kKind == kFp8 && !kExact && WF_ISA < 2) {
      for (int i = 0; i < kBlock; i += 4 * kLanes)
        pack_codes(block.row, i, out + (b + i) * kTileColumns);
    } else {
      for (int i = 0; i < kBlock; i += 2 * kLanes)
        pack_square<kKind, kExact>(block.row, i * block.kBytes, out + (b + i) * kTileColumns);
    }
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

// to[k][m][0..kLanes) = x[m][k] for `depth` of K and M rows.
inline void spread(const float* const* x, int M, int64_t depth, float* to) {
#if WF_ISA == 0
  for (int64_t k = 0; k < depth; k += kLanes)
    for (int m = 0; m < M; ++m) {
      const vf v = load(x[m] + k);
      float* at = to + (k * M + m) * kLanes;
      store(at, __builtin_shufflevector(v, v, 0, 0, 0, 0));
      store(at + M * kLanes, __builtin_shufflevector(v, v, 1, 1, 1, 1));
      store(at + 2 * M * kLanes, __builtin_shufflevector(v, v, 2, 2, 2, 2));
      store(at + 3 * M * kLanes, __builtin_shufflevector(v, v, 3, 3, 3, 3));
    }
#else
  (void)x, (void)M, (void)depth, (void)to;
#endif
}

// sums[m][.] += one tile of products over `blocks` blocks of kLength of K.
template <int M, int kLength>
__attribute__((noinline)) void FmaPath::tile(const float* const* x, const float* const* sx,
                                             int64_t blocks, const float* panel, const float* scale,
                                             float* sums, int64_t pitch) {
  for (int64_t b = 0; b < blocks; ++b) {
    vf acc[M][2] = {};
    const float* row[M];
    for (int m = 0; m < M; ++m) row[m] = kSpread ? nullptr : x[m] + b * kLength;
#pragma GCC unroll 4
    for (int k = 0; k < kLength; ++k) {
      vf low = load(panel), high = load(panel + kLanes);
      panel += kTileColumns;
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        vf v = kSpread ? load(x[0] + ((b * kLength + k) * M + m) * kLanes) : broadcast(row[m] + k);
        acc[m][0] = fma(v, low, acc[m][0]);
        acc[m][1] = fma(v, high, acc[m][1]);
      }
    }
    add_tile<M>(acc, scale, sx, b, sums, pitch);
    scale += kTileColumns;
  }
}
}  // namespace wf::gemm::many
