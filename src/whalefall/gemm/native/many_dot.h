// The many form with bf16 dots: panels [k / 2][kTileColumns][2] of W as bf16 (8 KiB for 128 of K),
// tiles of kTileRows rows of x by 2 vectors in registers. Bound: dot ports.
//
// Codes are transposed as they are stored, 4 columns of K a dword, and only then decoded by table;
// a shuffle of the two decoded vectors leaves the pairs of 16 rows side by side, in order.
#pragma once
#include "panel.h"

namespace wf::gemm::many {
#ifdef WF_DOT
struct DotPath {
  using Value = uint16_t;
  static const uint16_t* row(const Rows& x, int64_t m) { return x.half_row(m); }
  static constexpr int64_t panel_values(int64_t depth) { return depth * kTileColumns; }
  static constexpr bool kSpread = false;
  template <int kKind>
  static constexpr float unit() {
    return 1.0f;
  }

  template <int kKind, class Source>
  static void pack(const Source& w, int64_t n, int64_t k, int64_t depth, int64_t next, int half,
                   uint16_t* out);

  template <int M, int kLength>
  static void tile(const uint16_t* const* x, const float* const* sx, int64_t blocks,
                   const uint16_t* panel, const float* scale, float* sums, int64_t pitch);
};

// The 64 bytes at `offset` of 16 rows -> rows of pairs, kTileColumns pairs apart.
template <int kKind>
inline void pack_dwords(const uint8_t* const* row, int64_t offset, uint16_t* out) {
  vf v[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) v[r] = load_bytes(row[r] + offset);
  transpose(v);
  if constexpr (kKind == kFp8) {
    const Fp8Decoder decode;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, out += 4 * kTileColumns) {
      halves a, b;
      decode((__m512i)v[i], a, b);
      _mm512_storeu_ps(out, _mm512_shuffle_ps((__m512)a, (__m512)b, 0x88));
      _mm512_storeu_ps(out + 2 * kTileColumns, _mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD));
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, out += 2 * kTileColumns) _mm512_storeu_ps(out, (__m512)v[i]);
  }
}

template <int kKind, class Source>
__attribute__((noinline)) void DotPath::pack(const Source& w, int64_t n, int64_t k, int64_t depth,
                                             int64_t next, int half, uint16_t* out) {
  out += half * 2 * kLanes;
  if (n >= w.rows()) {
    for (int64_t i = 0; i < round_up(depth, kBlock); i += 2)
      std::memset(out + i * kTileColumns, 0, 64);
    return;
  }
  RowBlock<kKind> block;
  constexpr int64_t kCodes = 64 / kind_bytes(kKind);
  for (int64_t b = 0; b < depth; b += kBlock) {
    block.find(w, n, k + b, next);
    for (int64_t i = 0; i < kBlock; i += kCodes)
      pack_dwords<kKind>(block.row, i * block.kBytes, out + (b + i) * kTileColumns);
  }
}

template <int M, int kLength>
__attribute__((noinline)) void DotPath::tile(const uint16_t* const* x, const float* const* sx,
                                             int64_t blocks, const uint16_t* panel,
                                             const float* scale, float* sums, int64_t pitch) {
  for (int64_t b = 0; b < blocks; ++b) {
    vf acc[M][2] = {};
    const uint16_t* row[M];
    for (int m = 0; m < M; ++m) row[m] = x[m] + b * kLength;
#pragma GCC unroll 4
    for (int k = 0; k < kLength; k += 2) {
      halves low = load_halves(panel), high = load_halves(panel + 2 * kLanes);
      panel += 2 * kTileColumns;
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        halves pair = broadcast_pair(row[m] + k);
        acc[m][0] = dot(acc[m][0], pair, low);
        acc[m][1] = dot(acc[m][1], pair, high);
      }
    }
    add_tile<M>(acc, scale, sx, b, sums, pitch);
    scale += kTileColumns;
  }
}
#endif
}  // namespace wf::gemm::many
