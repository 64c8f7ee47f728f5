// The form for few rows of x with bf16 dots: y as in few.h, x and W both bf16 on the way.
//
// 64 codes become two vectors of bf16 by table (exact), which 2 dots a row of x use up: a row
// or two of W times up to 8 rows of x in registers. x is dealt into the decoder's order once a
// call. Each (m, n) is one chain over k within a block, then one over blocks, whatever the tiles
// are.
//
// Memory: W is read, and prefetched kAhead bytes before, in the order in which it lies there: with
// more than two rows at once, or with prefetches that jump from row to row, a fifth of the
// bandwidth is lost. Where x is too large for L1, a band of 16 rows meets it in slices of K, and
// the band behind is brought into L2 meanwhile, again in the order of memory. At the end of a
// task's rows, what its thread reads next (`Next`) is prefetched: the rows behind are another
// thread's. Bound: memory up to 4 rows of x; with 8 dots, which are a fifth slower on data from
// memory.
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

constexpr int64_t kAhead = 8192;        // bytes
constexpr int64_t kSliceBytes = 24576;  // of x: half of L1
constexpr int kBand = kLanes;           // rows of W whose sums become one vector
constexpr int kTokens = 8;              // rows of x at once

// Rows of W that share vectors of x: two, where the registers hold all sums and x counts.
constexpr int rows_at_once(int tokens) { return tokens >= 2 && tokens <= 4 ? 2 : 1; }

// The rows of a band over a slice of K. Each of their lines brings one of those that lie, in the
// order of memory, at `ahead`, or, from `turn` bytes on, at `after`; a null pointer: none.
struct Strip {
  const uint8_t* first;
  int64_t pitch, rows, blocks;
  const float* scale[kBand];
  bool first_of_k;  // nothing is summed yet
  bool far;         // a band ahead: into L2
  const uint8_t *ahead, *after;
  int64_t turn;
};

// out[m * kBand + r] += lanes of (row r of W . row m of x), scaled block by block.
template <int kKind, int M>
__attribute__((noinline)) void dots(const Strip& strip, const uint16_t* const* x,
                                    const float* const* sx, vf* out) {
  constexpr int R = rows_at_once(M);
  constexpr int64_t kBytes = kind_bytes(kKind);
  const HalfDecoder<kKind> decode;
  const int64_t blocks = strip.blocks, pitch = strip.pitch, bytes = blocks * kBlock * kBytes;
  const uint16_t* row[M];
  for (int m = 0; m < M; ++m) row[m] = x[m];
  for (int64_t n = 0; n < strip.rows; n += R, out += R) {
    const uint8_t* w[R];
    const float* scale[R];
    vf held[R][M];
    for (int r = 0; r < R; ++r) {
      const int64_t real = n + r < strip.rows ? n + r : n;
      w[r] = strip.first + real * pitch;
      scale[r] = strip.scale[real];
      for (int m = 0; m < M; ++m) held[r][m] = strip.first_of_k ? vf{} : out[m * kBand + r];
    }
    const uint8_t* ahead = n * bytes < strip.turn ? strip.ahead : strip.after;
    ahead = ahead ? ahead + n * bytes - (n * bytes < strip.turn ? 0 : strip.turn) : w[0];
    for (int64_t b = 0; b < blocks; ++b) {
      vf acc[R][M] = {};
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < R * kBytes; ++i, ahead += 64)
          strip.far ? prefetch_l2(ahead) : prefetch_l1(ahead);
        halves first[R], second[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r, w[r - 1] += 64 * kBytes) {
          decode(w[r], first[r], second[r]);
          if (strip.far)
            for (int i = 0; i < kBytes; ++i) prefetch_l1(w[r] + R * pitch + i * 64);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const uint16_t* p = row[m] + b * kBlock + half * 64;
          const halves a = load_halves(p), b = load_halves(p + 32);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) acc[r][m] = dot(acc[r][m], first[r], a);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) acc[r][m] = dot(acc[r][m], second[r], b);
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const vf s = kKind == kFp8 ? broadcast(scale[r] + b) : set1(1.0f);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          held[r][m] = fma(acc[r][m], sx ? s * broadcast(sx[m] + b) : s, held[r][m]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) out[m * kBand + r] = held[r][m];
  }
}

// `dots` for all tokens, kTokens at a time: the strip stays in the caches meanwhile.
template <int kKind, int M = kTokens>
void dots_of(const Strip& strip, const uint16_t* const* x, const float* const* sx, int count,
             vf* out) {
  for (; count >= M; count -= M, x += M, sx += sx ? M : 0, out += M * kBand)
    dots<kKind, M>(strip, x, sx, out);
  if constexpr (M > 1)
    if (count > 0) dots_of<kKind, M - 1>(strip, x, sx, count, out);
}

// The rows [n, end) of W, at most kBand, times the tokens: y[m, n..end).
template <int kKind>
class Band {
 public:
  Band(const Weight& w, int64_t n, int64_t end, const Tokens& x) : w_(w), x_(x), n_(n), end_(end) {
    const int64_t tokens = x.count < kTokens ? x.count : kTokens;
    const int64_t slices = ceil_div(tokens * w.cols * 2, kSliceBytes);
    depth_ = ceil_div(ceil_div(w.cols, kBlock), slices) * kBlock;
  }

  // `next`: what is read after this band.
  void run(int64_t m, Next next, const Output& y) {
    if (end_ - n_ < kBand)
      for (int i = 0; i < x_.count * kBand; ++i) sums_[i] = vf{};
    for (int64_t k = 0; k < w_.cols; k += depth_) multiply(k, next);
    for (int i = 0; i < x_.count; ++i) {
      float values[kBand];
      store(values, sums(sums_ + i * kBand));
      y.put(m + i, n_, values, end_ - n_);
    }
  }

 private:
  static constexpr int64_t kBytes = kind_bytes(kKind);

  // The slice that starts at k.
  void multiply(int64_t k, Next next) {
    const int64_t left = w_.cols - k, depth = left < depth_ ? left : depth_;
    const int64_t whole = depth / kBlock * kBlock, rest = depth - whole;
    Strip strip{w_.row(n_) + k * kBytes, w_.cols * kBytes, end_ - n_, whole / kBlock, {}, k == 0};
    if (depth_ < w_.cols) {
      strip.far = true, strip.turn = INT64_MAX;
      strip.ahead = next ? next + k * strip.rows * kBytes : nullptr;
    } else {
      const int64_t group = rows_at_once(x_.count) * strip.pitch;
      const int64_t lead = kAhead < group ? group : kAhead;
      strip.ahead = strip.first + lead, strip.after = next;
      strip.turn = strip.pitch * strip.rows - lead;
    }
    if (kKind == kFp8)
      for (int64_t n = n_; n < end_; ++n) strip.scale[n - n_] = w_.row_scale(n) + k / kBlock;
    if (whole > 0) run_dots(strip, k), strip.first_of_k = false;
    if (rest == 0) return;
    uint8_t tail[kBand * kBlock * kBytes] = {};
    for (int64_t r = 0; r < strip.rows; ++r) {
      const uint8_t* from = strip.first + r * strip.pitch + whole * kBytes;
      std::memcpy(tail + r * kBlock * kBytes, from, rest * kBytes);
      if (kKind == kFp8) strip.scale[r] += whole / kBlock;
    }
    strip.first = tail, strip.pitch = kBlock * kBytes, strip.blocks = 1;
    strip.ahead = nullptr, strip.turn = INT64_MAX;
    run_dots(strip, k + whole);
  }

  void run_dots(const Strip& strip, int64_t k) {
    const uint16_t* x[kRowsOfX];
    const float* sx[kRowsOfX];
    for (int i = 0; i < x_.count; ++i) {
      x[i] = x_.half[i] + k;
      if (x_.scaled()) sx[i] = x_.scale[i] + k / kBlock;
    }
    dots_of<kKind>(strip, x, x_.scaled() ? sx : nullptr, x_.count, sums_);
  }

  const Weight& w_;
  const Tokens& x_;
  const int64_t n_, end_;
  int64_t depth_;  // K of a slice
  vf sums_[kRowsOfX * kBand];
};

template <int kKind>
void dot_rows_of(const Weight& w, int64_t n, int64_t end, const Tokens& x, int64_t m, Next next,
                 const Output& y) {
  for (; n < end; n += kBand) {
    const int64_t stop = n + kBand < end ? n + kBand : end;
    Band<kKind>(w, n, stop, x).run(m, stop < end ? w.row(stop) : next, y);
  }
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
