// The form for few rows of x with bf16 dots: y as in few.h, x and W both bf16 on the way.
//
// 64 codes become two vectors of bf16 by table (exact), which 2 dots a row of x use up. x is dealt
// into the decoder's order once a call. Each (m, n) is one chain over k within a block, then one
// over blocks, however rows are grouped.
//   M <= 4: `stream`, W's rows one by one, in the order of memory. Bound: memory.
//   else:   `dots`, R rows of W times M rows of x in registers, R * M sums of a block and as many
//           of all blocks. Bound: dots.
// Each line brings a later one into L1; at the end of a task's rows, what its thread will read next
// (`Next`), since the rows behind are another thread's.
#pragma once
#include "few.h"

namespace wf::gemm {
using Next = const uint8_t*;  // weights that a thread will read soon; may be null, or any address

#ifdef WF_DOT
namespace few {
// 64 weights at p as two vectors in the order of x.
template <int kKind>
struct HalfDecoder;
template <>
struct HalfDecoder<kFp8> {
  Fp8Decoder decode;
  void operator()(const uint8_t* p, halves& a, halves& b) const { decode(load_halves(p), a, b); }
};
template <>
struct HalfDecoder<kBf16> {
  void operator()(const uint8_t* p, halves& a, halves& b) const {
    a = load_halves(p);
    b = load_halves(p + 64);
  }
};

constexpr int64_t kAhead = 16384;  // bytes; with half of it the memory bus idles

constexpr int64_t kStreamAhead = 8192;  // bytes

// What to bring while the rows of a group go by: as many bytes from `lines` on; null: nothing.
template <int kKind, int R>
const uint8_t* lines_ahead(const Group<kKind, R>& group, const Weight& w, int64_t n, int64_t end,
                           Next next) {
  const int64_t later = n + ceil_div(kAhead, R * group.pitch) * R;
  if (later < end) return w.row(later);
  return next ? next + (later - end) * group.pitch : nullptr;
}

// R rows of W times M rows of x: sums[m * R + r].
template <int kKind, int R, int M>
__attribute__((noinline)) void dots(const Group<kKind, R>& group, const uint16_t* const* x,
                                    const float* const* sx, const uint8_t* ahead, float* sums) {
  const HalfDecoder<kKind> decode;
  vf out[R][M] = {};
  const uint16_t* row[M];
  for (int m = 0; m < M; ++m) row[m] = x[m];
  if (!ahead) ahead = group.first;  // already there
  for (int64_t b = 0, at = 0; b < group.blocks(); ++b) {
    int64_t pitch;
    const uint8_t* w = group.block(b, pitch);
    vf acc[R][M] = {};
#pragma GCC unroll 2
    for (int k = 0; k < kBlock; k += 64, at += 64) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w + r * pitch + k * group.kBytes;
        const uint8_t* line = ahead + r * group.pitch + at * group.kBytes;
        for (int i = 0; i < group.kBytes; ++i) prefetch_l1(line + i * 64);
        halves first, second;
        decode(p, first, second);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          acc[r][m] = dot(acc[r][m], first, load_halves(row[m] + at));
          acc[r][m] = dot(acc[r][m], second, load_halves(row[m] + at + 32));
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float factor = group.factor(r, b);
        if (sx) factor *= sx[m][b];
        out[r][m] = fma(acc[r][m], set1(factor), out[r][m]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[m * R + r] = sum(out[r][m]);
}

// Rows [n, end) of W one by one, in the order of memory, times M rows of x: y[m][n' - n]. What lies
// kStreamAhead bytes on is brought into L1: without it hardware brings half of it late, and with
// several rows at once (as `dots` does) a stream of each is begun anew at every group.
template <int kKind, int M, bool kScaled>
__attribute__((noinline)) void stream(const Weight& w, int64_t n, int64_t end,
                                      const uint16_t* const* x, const float* const* sx, Next next,
                                      float* const* y) {
  const HalfDecoder<kKind> decode;
  constexpr int64_t kBytes = kind_bytes(kKind);
  const int64_t pitch = w.cols * kBytes, blocks = w.cols / kBlock;
  const uint8_t* p = w.row(n);
  const uint8_t* const last = w.row(end) - kStreamAhead;
  static const float kOne[1] = {1.0f};
  for (int64_t r = n; r < end; ++r) {
    const uint8_t* ahead = p < last ? p + kStreamAhead : next ? next + (p - last) : p;
    const float* scale = kKind == kFp8 ? w.row_scale(r) : kOne;
    constexpr int64_t kNext = kKind == kFp8;  // bf16 has no scales
    vf out[M] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      vf acc[M] = {};
#pragma GCC unroll 2
      for (int64_t at = b * kBlock; at < (b + 1) * kBlock; at += 64) {
        for (int i = 0; i < kBytes; ++i) prefetch_l1(ahead + at * kBytes + i * 64);
        halves first, second;
        decode(p + at * kBytes, first, second);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          acc[m] = dot(acc[m], first, load_halves(x[m] + at));
          acc[m] = dot(acc[m], second, load_halves(x[m] + at + 32));
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const float* factor = scale + b * kNext;
        out[m] = fma(acc[m], kScaled ? set1(*factor * sx[m][b]) : broadcast(factor), out[m]);
      }
    }
    for (int m = 0; m < M; ++m) y[m][r - n] = sum(out[m]);
    p += pitch;
  }
}

template <int kKind, int M>
void stream_of(const Weight& w, int64_t n, int64_t end, const Tokens& x, int64_t m, Next next,
               const Output& out) {
  constexpr int64_t kRows = 256;
  float sums[M][kRows], *to[M];
  for (int i = 0; i < M; ++i) to[i] = sums[i];
  for (; n < end; n += kRows) {
    const int64_t stop = n + kRows < end ? n + kRows : end;
    const Next then = stop < end ? w.row(stop) : next;
    if (x.scaled())
      stream<kKind, M, true>(w, n, stop, x.half, x.scale, then, to);
    else
      stream<kKind, M, false>(w, n, stop, x.half, nullptr, then, to);
    for (int i = 0; i < M; ++i) out.put(m + i, n, sums[i], stop - n);
  }
}

template <int kKind, int R, int M>
void dots_of(const Group<kKind, R>& group, int64_t n, const Tokens& x, int first, int64_t m,
             const uint8_t* ahead, const Output& out) {
  float sums[M * R];
  dots<kKind, R, M>(group, x.half + first, x.scaled() ? x.scale + first : nullptr,
                    first == 0 ? ahead : nullptr, sums);
  for (int i = 0; i < M; ++i) out.put(m + first + i, n, sums + i * R, R);
}

// Rows [n, n + R) of W for all tokens of a pass, kMost at a time: W's rows stay in L1 meanwhile.
template <int kKind, int R, int kMost, int M = kMost>
void group_dots(const Group<kKind, R>& group, int64_t n, const Tokens& x, int first, int64_t m,
                const uint8_t* ahead, const Output& out) {
  for (; x.count - first >= M; first += M) dots_of<kKind, R, M>(group, n, x, first, m, ahead, out);
  if constexpr (M > 1)
    if (first < x.count) group_dots<kKind, R, kMost, M - 1>(group, n, x, first, m, ahead, out);
}

template <int kKind, int R, int kMost>
int64_t groups_of(const Weight& w, int64_t n, int64_t end, const Tokens& x, int64_t m, Next next,
                  const Output& out) {
  for (; n + R <= end; n += R) {
    const Group<kKind, R> group(w, n);
    const uint8_t* ahead = m == 0 ? lines_ahead(group, w, n, end, next) : nullptr;
    group_dots<kKind, R, kMost>(group, n, x, 0, m, ahead, out);
  }
  return n;
}

template <int kKind>
void dot_rows_of(const Weight& w, int64_t n, int64_t end, const Tokens& x, int64_t m, Next next,
                 const Output& out) {
  if (w.cols % kBlock == 0 && x.count <= 4) {
    if (m > 0) next = nullptr;
    if (x.count == 1) return stream_of<kKind, 1>(w, n, end, x, m, next, out);
    if (x.count == 2) return stream_of<kKind, 2>(w, n, end, x, m, next, out);
    if (x.count == 3) return stream_of<kKind, 3>(w, n, end, x, m, next, out);
    return stream_of<kKind, 4>(w, n, end, x, m, next, out);
  }
  if (x.count == 1) n = groups_of<kKind, 8, 1>(w, n, end, x, m, next, out);
  n = groups_of<kKind, 4, 4>(w, n, end, x, m, next, out);
  groups_of<kKind, 1, 4>(w, n, end, x, m, next, out);
}
}  // namespace few

inline void multiply_few_dot(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t count,
                             const Output& y, Next next) {
  for (int64_t m = 0; m < count; m += few::kRowsOfX) {
    few::Tokens tokens(x, m, count - m < few::kRowsOfX ? count : m + few::kRowsOfX);
    if (w.kind == kFp8)
      few::dot_rows_of<kFp8>(w, n, end, tokens, m, next, y);
    else
      few::dot_rows_of<kBf16>(w, n, end, tokens, m, next, y);
  }
}
#else
inline void multiply_few_dot(const Weight&, int64_t, int64_t, const Rows&, int64_t, const Output&,
                             Next) {
  __builtin_trap();
}
#endif

// y[:, n..end) for the rows [n, end) of W; `next` is what the thread will read after them.
inline void multiply_few(const Weight& w, int64_t n, int64_t end, const Rows& x, int64_t count,
                         const Output& out, Next next = nullptr) {
  if (x.halves)
    multiply_few_dot(w, n, end, x, count, out, next);
  else if (w.kind == kFp8)
    few::rows_of<kFp8>(w, n, end, x, count, out);
  else if (w.kind == kBf16)
    few::rows_of<kBf16>(w, n, end, x, count, out);
  else
    few::rows_of<kF32>(w, n, end, x, count, out);
}
}  // namespace wf::gemm
