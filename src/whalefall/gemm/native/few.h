// y[m,n] = sum_b (x[m,b] . W[n,b]) * s[n/128,b] * sx[m,b]       b: 128 columns of K
// The form for few rows of x (decoding): W streams from memory once, in the order it lies there.
//
// One vector of partial sums for each (m, n), over lanes of K; after 128 columns it is scaled and
// added to a second one; the lanes are added at the end. Nothing of this depends on how many rows
// there are, so a row's bits do not either.
//   M = 1, 2: `direct`, 8 or 4 rows of W at once, decoded in registers. Bound: memory. With SSE2
//             `paired`: sums of 8 rows leave no registers for the rest.
//   M <= 8:   with AVX2 and SSE2 `paired`, two rows of W for four of x, decoded in registers anew
//             for the next four, while the multiply-adds wait for theirs; with AVX2 and 8 rows of
//             x one row of W for all. Bound: FMA.
//   beyond:   `tiled`, 4 rows of W x 128 columns decoded into L1, then 4 x 3 tiles. Bound: FMA.
// While a group of rows is read, the next one is prefetched into L2 (which the hardware does not
// do well across rows). FP8 wants x in Order::kWords, other kinds in Order::kPlain.
#pragma once
#include "operands.h"
#include "whalefall/tile.h"

namespace wf::gemm {
using Next = const uint8_t*;  // weights that a thread will read soon; may be null, or any address

namespace few {
constexpr int kBand = kTile ? 32 : 16;  // rows of W at once, by tiles or dots
constexpr int kStep = 4 * kLanes;       // weights of one decode
constexpr int kRowsOfX = 32;            // rows of x for one pass of `tiled`
// Rows of x up to which W is decoded in registers: elsewhere `tiled` is as fast or faster.
constexpr int kMostPaired = WF_ISA <= 1 ? 8 : 2;

// kStep weights at p as floats: in kWords order and times kFp8Tiny for FP8, as they are otherwise.
template <int kKind, bool kExact>
inline void decode(const uint8_t* p, vf* out) {
  if constexpr (kKind == kFp8 && kExact) {
    fp8_decode_words_exact(p, out);
  } else if constexpr (kKind == kFp8) {
    fp8_decode_words(p, out);
  } else {
    for (int j = 0; j < 4; ++j)
      out[j] = kKind == kBf16 ? load_bf16(p + j * 2 * kLanes) : load_bytes(p + j * 4 * kLanes);
  }
}

// Looks for NaN in the kLength codes at p.
template <int kLength>
inline void see(Fp8NanFlag& nan, const uint8_t* p) {
#if WF_ISA == 0
  static_assert(kLength == 16);
  nan.see16(p);
#else
  for (int i = 0; i < kLength; i += 32) nan.see32(p + i);
#endif
}

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
  // The next group's bytes in the order of memory, a share of them at each block of this one.
  void prefetch_next(int64_t b) const {
    const uint8_t* next = first + R * pitch + b * R * kBlock * kBytes;
    for (int64_t line = 0; line < R * kBlock * kBytes; line += 64) prefetch_l2(next + line);
  }
  float factor(int r, int64_t b) const { return kKind == kFp8 ? scale[r][b] : 1.0f; }
};

// The rows of x of one pass.
struct Tokens {
  const float* row[kRowsOfX];
  const uint16_t* half[kRowsOfX];
  const float* scale[kRowsOfX];
  float unlift[kRowsOfX];
  int count;

  __attribute__((noinline)) Tokens(const Rows& x, int64_t first, int64_t last)
      : count(int(last - first)) {
    for (int i = 0; i < count; ++i) {
      row[i] = x.halves ? nullptr : x.row(first + i);
      half[i] = x.halves ? x.half_row(first + i) : nullptr;
      scale[i] = x.row_scale(first + i);
      unlift[i] = x.row_unlift(first + i);
    }
  }
  bool scaled() const { return scale[0] != nullptr; }
};

// R rows of W times M rows of x; false: a NaN code went by that the decoder does not know.
template <int kKind, int R, int M>
__attribute__((noinline)) bool direct(const Group<kKind, R>& group, const Tokens& x, float* sums) {
  vf out[R][M] = {};
  Fp8NanFlag nan;
  for (int64_t b = 0; b < group.blocks(); ++b) {
    int64_t pitch;
    const uint8_t* w = group.block(b, pitch);
    group.prefetch_next(b);
    const float* row[M];
    for (int m = 0; m < M; ++m) row[m] = x.row[m] + b * kBlock;
    vf acc[R][M] = {};
    for (int k = 0; k < kBlock; k += kStep) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w + r * pitch + k * group.kBytes;
        vf v[4];
        decode<kKind, false>(p, v);
        if (kKind == kFp8) see<kStep>(nan, p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
          for (int m = 0; m < M; ++m)
            acc[r][m] = fma(v[j], load(row[m] + k + j * kLanes), acc[r][m]);
      }
    }
    for (int m = 0; m < M; ++m) {
      float factor = x.scaled() ? x.scale[m][b] : 1.0f;
      for (int r = 0; r < R; ++r)
        out[r][m] = fma(acc[r][m], set1(group.factor(r, b) * factor), out[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[m * R + r] = sum(out[r][m]) * x.unlift[m];
  return !nan.seen();
}

// Vector j of the 4 that `decode` makes of the codes at p.
template <int kKind, int kWhich>
inline vf decode_one(const uint8_t* p) {
  if constexpr (kKind == kBf16) return load_bf16(p + kWhich * 2 * kLanes);
  if constexpr (kKind == kF32) return load_bytes(p + kWhich * 4 * kLanes);
  vi v;
  std::memcpy(&v, p, sizeof v);
  return fp8_bits_to_float(kWhich == 0 ? v >> 4 : (v << (8 * kWhich)) >> 4);
}

// acc[r][m] += vector kWhich of 4 of two rows of W . x[m]; x is loaded once for both.
template <int kKind, int M, int kWhich>
inline void pair_step(const uint8_t* p, int64_t pitch, const float* const* x, int64_t k,
                      vf (&acc)[2][M]) {
  const vf first = decode_one<kKind, kWhich>(p), second = decode_one<kKind, kWhich>(p + pitch);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const vf v = load(x[m] + k + kWhich * kLanes);
    acc[0][m] = fma(first, v, acc[0][m]);
    acc[1][m] = fma(second, v, acc[1][m]);
  }
}

// acc += x[0..kLanes) * w. As one statement: g++ would load x's vectors long before, for more than
// one row of W, and keep sums in memory instead.
inline void add_product(const float* x, vf w, vf& acc) {
#if defined(__x86_64__) && WF_ISA == 0
  vf product;
  asm volatile("movups %2, %1\n\tmulps %3, %1\n\taddps %1, %0"
               : "+x"(acc), "=&x"(product)
               : "m"(*reinterpret_cast<const vf_any_alignment*>(x)), "x"(w));
#else
  acc = fma(load(x), w, acc);
#endif
}

// acc[m] += kStep of a row of W at p . x[m] + k, for multiplications that overwrite an operand: 4
// vectors of W stay, those of x are loaded anew for each row and overwritten.
template <int kKind, int M>
inline void row_step(const uint8_t* p, const float* const* x, int64_t k, Fp8NanFlag& nan,
                     vf (&acc)[M]) {
  vf v[4];
  decode<kKind, false>(p, v);
  if (kKind == kFp8) see<kStep>(nan, p);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      if constexpr (M > 2)
        add_product(x[m] + k + j * kLanes, v[j], acc[m]);
      else
        acc[m] = fma(load(x[m] + k + j * kLanes), v[j], acc[m]);
}

// out[r * kRowsOfX + m] += (R rows of W) . (the M rows of x from `first`), W decoded in registers,
// two rows at a time: 8 sums, 2 of W and 1 of x; one for 8 rows of x, loaded as they are multiplied
// (3 instructions for 2 products, not 5). With SSE2, and one row of x, four: an addition waits 3
// cycles for the one before.
template <int kKind, int R, int M>
__attribute__((noinline)) bool paired(const Group<kKind, R>& group, const Tokens& x, int first,
                                      vf* out) {
  Fp8NanFlag nan;
  for (int64_t b = 0; b < group.blocks(); ++b) {
    int64_t pitch;
    const uint8_t* w = group.block(b, pitch);
    if (first == 0) group.prefetch_next(b);
    const float* row[M];
    for (int m = 0; m < M; ++m) row[m] = x.row[first + m] + b * kBlock;
    constexpr int P = M == 8 ? 1 : WF_ISA == 0 && M == 1 ? 4 : 2;
    for (int r = 0; r < R; r += P, w += P * pitch) {
      vf acc[P][M] = {};
      for (int k = 0; k < kBlock; k += kStep) {
        const uint8_t* p = w + k * group.kBytes;
        if constexpr (WF_ISA == 0 || P == 1) {
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) row_step<kKind, M>(p + i * pitch, row, k, nan, acc[i]);
        } else {
          if (kKind == kFp8) see<kStep>(nan, p), see<kStep>(nan, p + pitch);
          pair_step<kKind, M, 0>(p, pitch, row, k, acc);
          pair_step<kKind, M, 1>(p, pitch, row, k, acc);
          pair_step<kKind, M, 2>(p, pitch, row, k, acc);
          pair_step<kKind, M, 3>(p, pitch, row, k, acc);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float factor = x.scaled() ? x.scale[first + m][b] : 1.0f;
          vf& sum = out[(r + i) * kRowsOfX + first + m];
          sum = fma(acc[i][m], set1(group.factor(r + i, b) * factor), sum);
        }
    }
  }
  return !nan.seen();
}

// One block of R rows of W into floats in L1.
template <int kKind, int R, bool kExact>
__attribute__((noinline)) bool decode_block(const uint8_t* w, int64_t pitch, float* panel) {
  Fp8NanFlag nan;
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < kBlock; k += kStep) {
      const uint8_t* p = w + r * pitch + k * kind_bytes(kKind);
      vf v[4];
      decode<kKind, kExact>(p, v);
      if (kKind == kFp8 && !kExact) see<kStep>(nan, p);
      for (int j = 0; j < 4; ++j) store(panel + r * kBlock + k + j * kLanes, v[j]);
    }
  return !nan.seen();
}

// out[m][r] += (panel[r] . x[m]) * scale[r] * sx[m]: an M x R tile over one block; sx may be null.
template <int R, int M>
__attribute__((noinline)) void tile(const float* panel, const float* const* x, const float* scale,
                                    const float* sx, vf* out) {
  vf acc[M][R] = {};
  const float* row[M];
  for (int m = 0; m < M; ++m) row[m] = x[m];
#pragma GCC unroll 4
  for (int k = 0; k < kBlock; k += kLanes) {
    vf v[M];
#pragma GCC unroll 3
    for (int m = 0; m < M; ++m) v[m] = load(row[m] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {  // 12 sums, 3 of x and 1 of W: the 16 registers of AVX2
      vf w = load(panel + r * kBlock + k);
#pragma GCC unroll 3
      for (int m = 0; m < M; ++m) acc[m][r] = fma(w, v[m], acc[m][r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int m = 0; m < M; ++m) {
      vf s = sx ? set1(scale[r] * sx[m]) : broadcast(scale + r);
      out[m * R + r] = fma(acc[m][r], s, out[m * R + r]);
    }
}

template <int kKind, int R>
void tiled(const Group<kKind, R>& group, const Tokens& x, float* sums) {
  alignas(64) float panel[R * kBlock];
  vf out[kRowsOfX * R];
  for (int i = 0; i < x.count * R; ++i) out[i] = vf{};
  for (int64_t b = 0; b < group.blocks(); ++b) {
    int64_t pitch;
    const uint8_t* w = group.block(b, pitch);
    group.prefetch_next(b);
    if (!decode_block<kKind, R, false>(w, pitch, panel) && kKind == kFp8)
      decode_block<kKind, R, kKind == kFp8>(w, pitch, panel);
    float scale[R], sx[3];
    for (int r = 0; r < R; ++r) scale[r] = group.factor(r, b);
    for (int m = 0; m < x.count;) {
      int left = x.count - m, take = WF_ISA && left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
      const float* rows[3];
      for (int i = 0; i < take; ++i) rows[i] = x.row[m + i] + b * kBlock;
      if (x.scaled())
        for (int i = 0; i < take; ++i) sx[i] = x.scale[m + i][b];
      const float* factor = x.scaled() ? sx : nullptr;
      if (take == 3)
        tile<R, 3>(panel, rows, scale, factor, out + m * R);
      else if (take == 2)
        tile<R, 2>(panel, rows, scale, factor, out + m * R);
      else
        tile<R, 1>(panel, rows, scale, factor, out + m * R);
      m += take;
    }
  }
  for (int m = 0; m < x.count; ++m)
    for (int r = 0; r < R; ++r) sums[m * R + r] = sum(out[m * R + r]) * x.unlift[m];
}

// Rows [n, n + R) of W, decoded into L1 first: any number of rows of x, and NaN exactly.
template <int kKind, int R>
__attribute__((noinline)) void group_tiled(const Weight& w, int64_t n, const Tokens& x, int64_t m,
                                           const Output& out) {
  Group<kKind, R> group(w, n);
  float sums[kRowsOfX * R];
  tiled<kKind, R>(group, x, sums);
  for (int i = 0; i < x.count; ++i) out.put(m + i, n, sums + i * R, R);
}

// Rows [n, n + R) of W, R a multiple of 4, decoded in registers; M = x.count.
template <int kKind, int R, int M>
void group_direct(const Weight& w, int64_t n, const Tokens& x, int64_t m, const Output& out) {
  Group<kKind, R> group(w, n);
  float sums[M * R];
  if (!direct<kKind, R, M>(group, x, sums)) {
    for (int r = 0; r < R; r += 4) group_tiled<kKind, 4>(w, n + r, x, m, out);
    return;
  }
  for (int i = 0; i < M; ++i) out.put(m + i, n, sums + i * R, R);
}

// Rows [n, n + R) of W for 3 to kRowsOfX rows of x, four at a time, decoded in registers anew.
template <int kKind, int R>
__attribute__((noinline)) void group_paired(const Weight& w, int64_t n, const Tokens& x, int64_t m,
                                            const Output& out) {
  Group<kKind, R> group(w, n);
  vf sums[R * kRowsOfX];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < x.count; ++i) sums[r * kRowsOfX + i] = vf{};
  bool known = true;
  int i = 0;
  if constexpr (WF_ISA == 1)
    if (x.count == 8) known = paired<kKind, R, 8>(group, x, 0, sums), i = 8;
  for (; i < x.count; i += 4) {
    const int left = x.count - i;
    known &= left >= 4   ? paired<kKind, R, 4>(group, x, i, sums)
             : left == 3 ? paired<kKind, R, 3>(group, x, i, sums)
             : left == 2 ? paired<kKind, R, 2>(group, x, i, sums)
                         : paired<kKind, R, 1>(group, x, i, sums);
  }
  if (!known) {
    for (int r = 0; r < R; r += 4) group_tiled<kKind, 4>(w, n + r, x, m, out);
    return;
  }
  for (int i = 0; i < x.count; ++i) {
    float values[R];
    for (int r = 0; r < R; ++r) values[r] = sum(sums[r * kRowsOfX + i]) * x.unlift[i];
    out.put(m + i, n, values, R);
  }
}

template <int kKind>
void rows_of(const Weight& w, int64_t first, int64_t end, const Rows& x, int64_t count,
             const Output& out) {
  for (int64_t m = 0; m < count; m += kRowsOfX) {
    Tokens tokens(x, m, count - m < kRowsOfX ? count : m + kRowsOfX);
    int64_t n = first;
    if constexpr (WF_ISA > 0) {
      if (tokens.count == 1)
        for (; n + 8 <= end; n += 8) group_direct<kKind, 8, 1>(w, n, tokens, m, out);
      if (tokens.count == 2)
        for (; n + 4 <= end; n += 4) group_direct<kKind, 4, 2>(w, n, tokens, m, out);
    }
    if constexpr (kMostPaired > 2)
      if (tokens.count <= kMostPaired)
        for (; n + 8 <= end; n += 8) group_paired<kKind, 8>(w, n, tokens, m, out);
    for (; n + 4 <= end; n += 4) group_tiled<kKind, 4>(w, n, tokens, m, out);
    for (; n < end; ++n) group_tiled<kKind, 1>(w, n, tokens, m, out);
  }
}
}  // namespace few
}  // namespace wf::gemm
