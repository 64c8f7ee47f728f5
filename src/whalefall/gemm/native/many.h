// y[m,n] = sum_b (x[m,b] . W[n,b]) * s[n/128,b] * sx[m,b]       b: 128 columns of K
// The form for many rows of x (prompts, GEMM): W is decoded once for hundreds of rows.
//
// A panel of kColumns rows of W x kDepth of K is decoded, transposed to [k][n] and lies in L2; x
// passes by in tiles of kTileRows rows, kDepth of K in L1; a kTileRows x 2-vector tile of partial
// sums stays in registers over 128 of K, is scaled and added to y's fp32 sums. Each y[m,n] is one
// chain over k within a block, then one chain over blocks: its bits do not depend on M, on tiles
// or on threads. Bound: FMA ports.
#pragma once
#include "operands.h"

namespace wf::gemm {
namespace many {
constexpr int kTileRows = WF_ISA >= 2 ? 12 : 6;  // 12 or 24 sums + 2 of W + 1 of x
constexpr int kTileColumns = 2 * kLanes;
constexpr int kColumns = WF_ISA >= 2 ? 128 : 64;  // W rows of a panel set
constexpr int kDepth = 1024;                      // K of a panel set: 64 x 1024 floats = 256 KiB
constexpr int kChunkRows = 512;                   // rows of x that share a decoded panel

// Rows of kLanes vectors become columns.
inline void transpose(vf* v) {
#if WF_ISA == 1
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#elif WF_ISA >= 2
  // log2(16) rounds of zipping row i with row i + 8
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int round = 0; round < 4; ++round) {
    __m512 t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_permutex2var_ps((__m512)v[i], low, (__m512)v[i + 8]);
      t[2 * i + 1] = _mm512_permutex2var_ps((__m512)v[i], high, (__m512)v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = (vf)t[i];
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      float a = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = a;
    }
#endif
}

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

// What can be packed: rows of codes somewhere, with scales. `Weight` through this; gemm.h has more.
struct WeightSource {
  const Weight& w;
  int64_t rows() const { return w.rows; }
  int64_t cols() const { return w.cols; }
  bool in_place() const { return true; }  // codes of a row lie side by side, as `decode` reads them
  const uint8_t* at(int64_t n, int64_t k) const { return w.row(n) + k * kind_bytes(w.kind); }
  void copy(int64_t n, int64_t k, int64_t width, uint8_t* to) const {
    std::memcpy(to, at(n, k), width * kind_bytes(w.kind));
  }
  float scale(int64_t n, int64_t block) const {
    return w.kind == kFp8 ? w.row_scale(n)[block] : 1.0f;
  }
};

// kLanes rows of W x [k, k + depth) -> out[depth rounded up to a block][kTileColumns].
template <int kKind, bool kExact, class Source>
__attribute__((noinline)) bool pack_rows(const Source& w, int64_t n, int64_t k, int64_t depth,
                                         float* out) {
  constexpr int64_t kBytes = kind_bytes(kKind);
  const uint8_t* row[kLanes];
  alignas(64) uint8_t edge[kLanes][kBlock * kBytes];
  Fp8NanFlag nan;
  int64_t rows = w.rows() - n < kLanes ? w.rows() - n : kLanes;
  for (int64_t b = 0; b < depth; b += kBlock) {
    int64_t width = w.cols() - k - b < kBlock ? w.cols() - k - b : kBlock;
    bool inside = w.in_place() && rows == kLanes && width == kBlock;
    for (int r = 0; r < kLanes; ++r) {
      if (inside) {  // and the rows of the next panel: 16 streams are too many for the hardware
        row[r] = w.at(n + r, k + b);
        const uint8_t* next = w.at(n + r + kTileColumns, k + b);
        for (int64_t line = 0; line < kBytes * kBlock; line += 64) prefetch_l2(next + line);
        continue;
      }
      row[r] = edge[r];
      std::memset(edge[r], 0, sizeof edge[r]);
      if (r < rows) w.copy(n + r, k + b, width, edge[r]);
    }
    if (kKind == kFp8 && !kExact)
      for (int r = 0; r < kLanes; ++r)
        for (int i = 0; i < kBlock; i += 32) nan.see32(row[r] + i);
    for (int i = 0; i < kBlock; i += 2 * kLanes)
      pack_square<kKind, kExact>(row, i * kBytes, out + (b + i) * kTileColumns);
  }
  return !nan.seen();
}

// Panels of kTileColumns rows of W, one after another, and their scales [blocks][kTileColumns],
// a block being kLength of K.
template <int kKind, int kLength, class Source>
void pack(const Source& w, int64_t n, int64_t end, int64_t k, int64_t depth, float* panels,
          float* scales) {
  int64_t padded = round_up(depth, kBlock), blocks = padded / kLength;
  int64_t real_blocks = ceil_div(depth, kLength);
  for (int64_t c = n; c < end; c += kTileColumns) {
    for (int half = 0; half < 2; ++half) {
      int64_t at = c + half * kLanes;
      float* out = panels + half * kLanes;
      if (at >= w.rows()) {
        for (int64_t i = 0; i < padded; ++i) store(out + i * kTileColumns, vf{});
      } else if (!pack_rows<kKind, false>(w, at, k, depth, out) && kKind == kFp8) {
        pack_rows<kKind, kKind == kFp8>(w, at, k, depth, out);
      }
    }
    for (int64_t b = 0; b < blocks; ++b)
      for (int i = 0; i < kTileColumns; ++i) {
        float s = c + i < w.rows() && b < real_blocks ? w.scale(c + i, k / kLength + b) : 0.0f;
        scales[b * kTileColumns + i] = kKind == kFp8 ? s * kFp8Scale : s;
      }
    panels += padded * kTileColumns;
    scales += blocks * kTileColumns;
  }
}

// sums[m][.] += one tile of products over `blocks` blocks of kLength of K.
template <int M, int kLength>
__attribute__((noinline)) void tile(const float* const* x, const float* const* sx, int64_t blocks,
                                    const float* panel, const float* scale, float* sums,
                                    int64_t pitch) {
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
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        vf s = load(scale + j * kLanes);
        if (sx[m]) s = s * set1(sx[m][b]);
        float* out = sums + m * pitch + j * kLanes;
        store(out, fma(acc[m][j], s, load(out)));
      }
    scale += kTileColumns;
  }
}

template <int kLength, int M = kTileRows>
void tile_of(int rows, const float* const* x, const float* const* sx, int64_t blocks,
             const float* panel, const float* scale, float* sums, int64_t pitch) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<kLength, M - 1>(rows, x, sx, blocks, panel, scale, sums, pitch);
  tile<M, kLength>(x, sx, blocks, panel, scale, sums, pitch);
}

// The thread's own panels, scales and sums.
struct Workspace {
  float *panels, *scales, *sums;
  Workspace() {
    static thread_local Scratch memory;
    constexpr int64_t kPanels = kColumns * kDepth, kScales = kColumns * kDepth / 32;
    panels = memory.get<float>(kPanels + kScales + int64_t(kChunkRows) * kColumns);
    scales = panels + kPanels;
    sums = scales + kScales;
  }
};

// sums[m - first][n' - n] of the rows [first, last) of x and [n, end) of W, which are at most
// kChunkRows and kColumns; returns them, kColumns apart, until the thread's next product.
template <int kKind, int kLength, class Source>
const float* multiply(const Source& w, int64_t n, int64_t end, const Rows& x, int64_t first,
                      int64_t last) {
  Workspace space;
  std::memset(space.sums, 0, (last - first) * kColumns * sizeof(float));
  for (int64_t k = 0; k < w.cols(); k += kDepth) {
    int64_t depth = w.cols() - k < kDepth ? w.cols() - k : kDepth;
    int64_t padded = round_up(depth, kBlock), blocks = padded / kLength;
    pack<kKind, kLength>(w, n, end, k, depth, space.panels, space.scales);
    for (int64_t m = first; m < last; m += kTileRows) {
      int rows = last - m < kTileRows ? int(last - m) : kTileRows;
      const float *row[kTileRows], *row_scale[kTileRows];
      for (int i = 0; i < rows; ++i) {
        row[i] = x.row(m + i) + k;
        row_scale[i] = x.row_scale(m + i);
        if (row_scale[i]) row_scale[i] += k / kLength;
      }
      for (int64_t c = 0; c < end - n; c += kTileColumns)
        tile_of<kLength>(rows, row, row_scale, blocks, space.panels + c * padded,
                         space.scales + c * blocks, space.sums + (m - first) * kColumns + c,
                         kColumns);
    }
  }
  return space.sums;
}
}  // namespace many

// y[first..last, n..end): `end - n` at most kColumns, `last - first` at most kChunkRows.
inline void multiply_many(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t first,
                          int64_t last, const Output& out) {
  many::WeightSource source{w};
  const float* sums = w.kind == kFp8 ? many::multiply<kFp8, kBlock>(source, n, end, x, first, last)
                      : w.kind == kBf16
                          ? many::multiply<kBf16, kBlock>(source, n, end, x, first, last)
                          : many::multiply<kF32, kBlock>(source, n, end, x, first, last);
  for (int64_t m = first; m < last; ++m)
    out.put(m, n, sums + (m - first) * many::kColumns, end - n);
}
}  // namespace wf::gemm
