// y[m,n] = sum_b (x[m,b] . W[n,b]) * s[n/128,b] * sx[m,b]       b: 128 columns of K
// The form for few rows of x (decoding): W streams from memory once, in the order it lies there.
//
// One vector of partial sums for each (m, n), over lanes of K; after 128 columns it is scaled and
// added to a second one; the lanes are added at the end. Nothing of this depends on how many rows
// there are, so a row's bits do not either.
//   M = 1, 2: `direct`, 8 or 4 rows of W at once, decoded in registers. Bound: memory.
//   M >= 3:   `tiled`, 4 rows of W x 128 columns decoded into L1, then 4 x 3 tiles. Bound: FMA.
// While a group of rows is read, the next one is prefetched into L2 (which the hardware does not
// do well across rows).
#pragma once
#include "operands.h"

namespace wf::gemm {
namespace few {
constexpr int kSteps = kBlock / (2 * kLanes);  // decodes in a block
constexpr int kRowsOfX = 32;                   // rows of x for one pass of `tiled`

// A group of W's rows, one block of K at a time; the last block padded with zeros.
template <int kKind, int R>
struct Group {
  static constexpr int64_t kBytes = kind_bytes(kKind);
  const uint8_t* first;
  int64_t pitch, cols;
  const float* scale[R];
  uint8_t tail[R][kBlock * kBytes];

  Group(const Weight& w, int64_t n) : first(w.row(n)), pitch(w.cols * kBytes), cols(w.cols) {
    for (int r = 0; r < R; ++r) scale[r] = kKind == kFp8 ? w.row_scale(n + r) : nullptr;
    int64_t whole = cols / kBlock * kBlock, rest = cols - whole;
    if (rest == 0) return;
    std::memset(tail, 0, sizeof tail);
    for (int r = 0; r < R; ++r)
      std::memcpy(tail[r], first + r * pitch + whole * kBytes, rest * kBytes);
  }
  int64_t blocks() const { return ceil_div(cols, kBlock); }
  const uint8_t* block(int64_t b, int64_t& step) const {
    bool whole = (b + 1) * kBlock <= cols;
    step = whole ? pitch : kBlock * kBytes;
    return whole ? first + b * kBlock * kBytes : tail[0];
  }
  void prefetch_next(int64_t b) const {
    for (int r = 0; r < R; ++r)
      for (int64_t line = 0; line < kBlock * kBytes; line += 64)
        prefetch_l2(first + (R + r) * pitch + b * kBlock * kBytes + line);
  }
  float factor(int r, int64_t b) const { return kKind == kFp8 ? scale[r][b] * kFp8Scale : 1.0f; }
};

// R rows of W times M rows of x; false: a NaN code went by unseen by the decoder, do it exactly.
template <int kKind, int R, int M, bool kExact>
__attribute__((noinline)) bool direct(const Group<kKind, R>& group, const float* const* x,
                                      const float* const* sx, float* sums) {
  vf out[R][M] = {};
  Fp8NanFlag nan;
  for (int64_t b = 0; b < group.blocks(); ++b) {
    int64_t pitch;
    const uint8_t* w = group.block(b, pitch);
    group.prefetch_next(b);
    vf acc[R][M] = {};
#pragma GCC unroll 2
    for (int step = 0; step < kSteps; ++step) {
      int64_t k = b * kBlock + step * 2 * kLanes;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w + r * pitch + step * 2 * kLanes * group.kBytes;
        vf low, high;
        decode<kKind, kExact>(p, low, high);
        if (kKind == kFp8 && !kExact && (step * 2 * kLanes) % 32 == 0) nan.see32(p);
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
          acc[r][m] = fma(low, load(x[m] + k), acc[r][m]);
          acc[r][m] = fma(high, load(x[m] + k + kLanes), acc[r][m]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) {
        float s = group.factor(r, b) * (sx[m] ? sx[m][b] : 1.0f);
        out[r][m] = fma(acc[r][m], set1(s), out[r][m]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[m * R + r] = sum(out[r][m]);
  return !nan.seen();
}

// One block of R rows of W into floats in L1.
template <int kKind, int R, bool kExact>
__attribute__((noinline)) bool decode_block(const uint8_t* w, int64_t pitch, float* panel) {
  Fp8NanFlag nan;
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      const uint8_t* p = w + r * pitch + step * 2 * kLanes * kind_bytes(kKind);
      vf low, high;
      decode<kKind, kExact>(p, low, high);
      if (kKind == kFp8 && !kExact && (step * 2 * kLanes) % 32 == 0) nan.see32(p);
      store(panel + r * kBlock + step * 2 * kLanes, low);
      store(panel + r * kBlock + step * 2 * kLanes + kLanes, high);
    }
  }
  return !nan.seen();
}

// out[m][r] += (panel[r] . x[m]) * scale: an R x M tile over one block.
template <int R, int M>
__attribute__((noinline)) void tile(const float* panel, const float* const* x, const float* scale,
                                    vf* out) {
  vf acc[M][R] = {};
  const float* row[M];
  for (int m = 0; m < M; ++m) row[m] = x[m];
#pragma GCC unroll 4
  for (int k = 0; k < kBlock; k += kLanes) {
    vf w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = load(panel + r * kBlock + k);
#pragma GCC unroll 3
    for (int m = 0; m < M; ++m) {
      vf v = load(row[m] + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[m][r] = fma(w[r], v, acc[m][r]);
    }
  }
#pragma GCC unroll 3
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      out[m * R + r] = fma(acc[m][r], set1(scale[m * R + r]), out[m * R + r]);
}

template <int kKind, int R>
void tiled(const Group<kKind, R>& group, const float* const* x, const float* const* sx, int count,
           float* sums) {
  alignas(64) float panel[R * kBlock];
  vf out[kRowsOfX * R];
  for (int i = 0; i < count * R; ++i) out[i] = vf{};
  for (int64_t b = 0; b < group.blocks(); ++b) {
    int64_t pitch;
    const uint8_t* w = group.block(b, pitch);
    group.prefetch_next(b);
    if (!decode_block<kKind, R, false>(w, pitch, panel))
      decode_block<kKind, R, true>(w, pitch, panel);
    for (int m = 0; m < count;) {
      int left = count - m, take = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
      const float* rows[3];
      float scale[3 * R];
      for (int i = 0; i < take; ++i) {
        rows[i] = x[m + i] + b * kBlock;
        for (int r = 0; r < R; ++r)
          scale[i * R + r] = group.factor(r, b) * (sx[m + i] ? sx[m + i][b] : 1.0f);
      }
      if (take == 3)
        tile<R, 3>(panel, rows, scale, out + m * R);
      else if (take == 2)
        tile<R, 2>(panel, rows, scale, out + m * R);
      else
        tile<R, 1>(panel, rows, scale, out + m * R);
      m += take;
    }
  }
  for (int i = 0; i < count * R; ++i) sums[i] = sum(out[i]);
}

template <int kKind, int R, int M>
void direct_or_exact(const Group<kKind, R>& group, const float* const* x, const float* const* sx,
                     float* sums) {
  if (!direct<kKind, R, M, false>(group, x, sx, sums) && kKind == kFp8)
    direct<kKind, R, M, kKind == kFp8>(group, x, sx, sums);
}

// Rows [n, n + R) of W.
template <int kKind, int R>
void group_of_rows(const Weight& w, int64_t n, const Rows& x, int64_t count, const Output& out) {
  Group<kKind, R> group(w, n);
  const float *rows[kRowsOfX], *scales[kRowsOfX];
  float sums[kRowsOfX * R];
  for (int64_t m = 0; m < count; m += kRowsOfX) {
    int part = count - m < kRowsOfX ? int(count - m) : kRowsOfX;
    for (int i = 0; i < part; ++i) {
      rows[i] = x.row(m + i);
      scales[i] = x.row_scale(m + i);
    }
    if (part == 1)
      direct_or_exact<kKind, R, 1>(group, rows, scales, sums);
    else if (part == 2 && R <= 4)
      direct_or_exact<kKind, R, 2>(group, rows, scales, sums);
    else
      tiled<kKind, R>(group, rows, scales, part, sums);
    for (int i = 0; i < part; ++i) out.put(m + i, n, sums + i * R, R);
  }
}

template <int kKind>
void rows_of(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t count,
             const Output& out) {
  if (count == 1)
    for (; n + 8 <= end; n += 8) group_of_rows<kKind, 8>(w, n, x, count, out);
  for (; n + 4 <= end; n += 4) group_of_rows<kKind, 4>(w, n, x, count, out);
  for (; n < end; ++n) group_of_rows<kKind, 1>(w, n, x, count, out);
}
}  // namespace few

// y[:, n..end) for the rows [n, end) of W.
inline void multiply_few(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t count,
                         const Output& out) {
  if (w.kind == kFp8)
    few::rows_of<kFp8>(w, n, end, x, count, out);
  else if (w.kind == kBf16)
    few::rows_of<kBf16>(w, n, end, x, count, out);
  else
    few::rows_of<kF32>(w, n, end, x, count, out);
}
}  // namespace wf::gemm
