// The form for few rows of x with bf16 dots: y as in few.h, x and W both bf16 on the way.
//
// 64 codes become two vectors of bf16 by table (exact), which 2 dots a row of x use up: a row
// or two of W times up to 8 rows of x in registers. x is dealt into the decoder's order once a
// call. At the end of a block of K the vectors of four rows of x are added up into one, a number
// in each 128-bit lane: one multiply-add scales four of them, and the running sums of 8 rows fit
// into registers beside the 16 of the block. Each (m, n) is one chain over k within a block, then
// one over blocks, whatever the tiles are.
//
// Memory: W is read, and prefetched kAhead bytes before, in the order in which it lies there: with
// more than two rows at once, or with prefetches that jump from row to row, a fifth of the
// bandwidth is lost. Where x is too large for L1, a band of 16 rows meets it in slices of K, and
// the band behind is fetched meanwhile, again in the order of memory. At the end of a task's rows,
// what its thread reads next (`Next`) is prefetched: the rows behind are another thread's. Bound:
// memory up to 4 rows of x; with 8 dots, and what else reads registers: decoding and adding up.
#pragma once
#include "few.h"

namespace wf::gemm {
namespace few {
#ifdef WF_DOT
static_assert(kBand == kLanes);  // rows of W whose sums become one vector
// 64 weights at p as two vectors in the order of x.
template <int kKind>
struct HalfDecoder;
template <>
struct HalfDecoder<kFp8> {
  Fp8Decoder decode;
  void operator()(const uint8_t* p, halves& a, halves& b) const {
    halves codes = load_halves(p);
    asm("" : "+v"(codes));  // loaded once: g++ would load them anew for each table
    decode(codes, a, b);
  }
};
template <>
struct HalfDecoder<kBf16> {
  void operator()(const uint8_t* p, halves& a, halves& b) const {
    a = load_halves(p);
    b = load_halves(p + 64);
  }
};

constexpr int64_t kAhead = 8192;  // bytes
constexpr int kTokens = 8;        // rows of x at once

// Of x, in L1: two thirds of it, and one where memory is the bound and more is on its way.
constexpr int64_t slice_bytes(int64_t tokens) { return tokens > 4 ? 32768 : 16384; }

// Rows of W that share vectors of x: two, where the registers hold all sums and x counts.
constexpr int rows_at_once(int tokens) { return tokens >= 2 ? 2 : 1; }
constexpr int kQuad = 4;  // rows of x whose sums share a vector
constexpr int quads(int tokens) { return (tokens + kQuad - 1) / kQuad; }

// The rows of a band over a slice of K. Each of their lines brings one of those that lie, in the
// order of memory, at `ahead`, or, from `turn` bytes on, at `after`; a null pointer: none.
struct Strip {
  const uint8_t* first;
  int64_t pitch, rows, k, blocks;  // columns k to k + blocks * kBlock
  const uint8_t *ahead, *after;
  int64_t turn;
};

// The scales of a band's rows: of one block row of W, or from row `turn` on of the next one.
struct BandScales {
  const float *first, *after;
  int64_t turn;
  BandScales(const Weight& w, int64_t n)
      : first(w.scale ? w.row_scale(n) : nullptr),
        after(w.scale ? first + w.scale_pitch : nullptr),
        turn(kBlock - (w.first_row + n) % kBlock) {}
  const float* row(int64_t r) const { return r < turn ? first : after; }
};

// Sums of up to kQuad vectors within each 128-bit lane, the i-th vector's at place i of the lane,
// and at the places beyond `kCount` others'. The order of additions is the same at every place.
template <int kCount>
inline vf quad_sums(const vf* v) {
  auto pair = [](vf a, vf b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, (__m512)a, (__m512)b),
                         _mm512_shuffle_ps((__m512)a, (__m512)b, 0x4E));
  };
  const __m512 p = pair(v[0], v[kCount > 1 ? 1 : 0]);
  const __m512 q = kCount > 2 ? pair(v[2], v[kCount > 3 ? 3 : 2]) : p;
  return (vf)_mm512_add_ps(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xDD));
}

// part[i][column] = place i of all lanes of four vectors, each lane in the order of the vectors.
inline void transpose_lanes(const vf* v, vf (&part)[kQuad][kQuad], int column) {
  const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]);
  const __m512 b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]);
  const __m512 d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
  part[0][column] = (vf)_mm512_shuffle_ps(a, c, 0x44);
  part[1][column] = (vf)_mm512_shuffle_ps(a, c, 0xEE);
  part[2][column] = (vf)_mm512_shuffle_ps(b, d, 0x44);
  part[3][column] = (vf)_mm512_shuffle_ps(b, d, 0xEE);
}

// The scales at block b of a quad's rows of x, at their places.
template <int kCount>
inline vf quad_scales(const float* const* sx, int64_t b) {
  auto at = [&](int i) { return sx[i < kCount ? i : 0][b]; };
  return (vf)_mm512_broadcast_f32x4(_mm_setr_ps(at(0), at(1), at(2), at(3)));
}

// held[q] += the quads' sums of acc, scaled.
template <int M, int kFirst = 0>
inline void add_block(const vf* acc, vf scale, const float* const* sx, int64_t b, vf* held) {
  constexpr int kCount = M - kFirst < kQuad ? M - kFirst : kQuad;
  const vf factor = sx ? scale * quad_scales<kCount>(sx + kFirst, b) : scale;
  *held = fma(quad_sums<kCount>(acc + kFirst), factor, *held);
  if constexpr (kFirst + kQuad < M) add_block<M, kFirst + kQuad>(acc, scale, sx, b, held + 1);
}

// out[q * kBand + r] += (row r of W) . (rows of x of quad q), scaled block by block.
template <int kKind, int M>
__attribute__((noinline)) void dots(const Strip& strip, const uint16_t* const* x,
                                    const float* const* sx, const BandScales& scales, vf* out) {
  constexpr int R = rows_at_once(M), Q = quads(M);
  constexpr int64_t kBytes = kind_bytes(kKind);
  const HalfDecoder<kKind> decode;
  const int64_t blocks = strip.blocks, bytes = blocks * kBlock * kBytes;
  const int64_t first_block = strip.k / kBlock;
  const uint16_t* row[M];
  for (int m = 0; m < M; ++m) row[m] = x[m] + strip.k;
  for (int64_t n = 0; n < strip.rows; n += R, out += R) {
    const uint8_t* w[R];
    const float* scale[R];
    vf held[R][Q];
    for (int r = 0; r < R; ++r) {
      const int64_t real = n + r < strip.rows ? n + r : n;
      w[r] = strip.first + real * strip.pitch;
      if (kKind == kFp8) scale[r] = scales.row(real) + first_block;
      for (int q = 0; q < Q; ++q) held[r][q] = strip.k ? out[q * kBand + r] : vf{};
    }
    const uint8_t* ahead = n * bytes < strip.turn ? strip.ahead : strip.after;
    ahead = ahead ? ahead + n * bytes - (n * bytes < strip.turn ? 0 : strip.turn) : w[0];
    for (int64_t b = 0; b < blocks; ++b) {
      vf acc[R][M];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[r][m] = fresh_zero();
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < R * kBytes; ++i, ahead += 64) prefetch_l1(ahead);
        halves first[R], second[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) decode(w[r] + half * 64 * kBytes, first[r], second[r]);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const uint16_t* p = row[m] + b * kBlock + half * 64;
          const halves a = load_halves(p), c = load_halves(p + 32);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) acc[r][m] = dot(acc[r][m], first[r], a);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) acc[r][m] = dot(acc[r][m], second[r], c);
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const vf s = kKind == kFp8 ? broadcast(scale[r] + b) : set1(1.0f);
        add_block<M>(acc[r], s, sx, first_block + b, held[r]);
        w[r] += kBlock * kBytes;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < Q; ++q) out[q * kBand + r] = held[r][q];
  }
}

// `dots` for all tokens, kTokens at a time: the strip stays in the caches meanwhile.
template <int kKind, int M = kTokens>
void dots_of(const Strip& strip, const uint16_t* const* x, const float* const* sx, int count,
             const BandScales& scales, vf* out) {
  for (; count >= M; count -= M, x += M, sx += sx ? M : 0, out += quads(M) * kBand)
    dots<kKind, M>(strip, x, sx, scales, out);
  if constexpr (M > 1)
    if (count > 0) dots_of<kKind, M - 1>(strip, x, sx, count, scales, out);
}

// The rows [n, end) of W, at most kBand, times the tokens: y[m, n..end).
template <int kKind>
class Band {
 public:
  Band(const Weight& w, int64_t n, int64_t end, const Tokens& x)
      : w_(w), x_(x), n_(n), end_(end), scales_(w, n) {
    const int64_t tokens = x.count < kTokens ? x.count : kTokens;
    const int64_t all = w.cols ? tokens * w.cols * 2 : 1;
    const int64_t slices = ceil_div(all, slice_bytes(tokens));
    depth_ = ceil_div(ceil_div(w.cols, kBlock), slices) * kBlock;
  }

  // `next`: what is read after this band.
  void run(int64_t m, Next next, const Output& y) {
    const int count = quads(x_.count);
    if (end_ - n_ < kBand || w_.cols == 0)  // else the first slice sets all
      for (int i = 0; i < count * kBand; ++i) sums_[i] = vf{};
    for (int64_t k = 0; k < w_.cols; k += depth_) multiply(k, next);
    for (int q = 0; q < count; ++q) {
      vf part[kQuad][kQuad];  // [row of x][four rows of W]
      for (int i = 0; i < kQuad; ++i) transpose_lanes(sums_ + q * kBand + i * kQuad, part, i);
      for (int i = 0; i < kQuad && q * kQuad + i < x_.count; ++i) {
        float values[kBand];
        store(values, sum_lanes(part[i]));
        y.put(m + q * kQuad + i, n_, values, end_ - n_);
      }
    }
  }

 private:
  static constexpr int64_t kBytes = kind_bytes(kKind);

  // The slice that starts at k.
  void multiply(int64_t k, Next next) {
    const int64_t left = w_.cols - k, depth = left < depth_ ? left : depth_;
    const int64_t whole = depth / kBlock * kBlock, rest = depth - whole;
    Strip strip{w_.row(n_) + k * kBytes, w_.cols * kBytes, end_ - n_, k, whole / kBlock};
    if (depth_ < w_.cols) {
      strip.turn = INT64_MAX;
      strip.ahead = next ? next + k * strip.rows * kBytes : nullptr;
    } else {
      const int64_t group = rows_at_once(x_.count) * strip.pitch;
      const int64_t lead = kAhead < group ? group : kAhead;
      strip.ahead = strip.first + lead, strip.after = next;
      strip.turn = strip.pitch * strip.rows - lead;
    }
    const float* const* sx = x_.scaled() ? x_.scale : nullptr;
    if (whole > 0) dots_of<kKind>(strip, x_.half, sx, x_.count, scales_, sums_);
    if (rest == 0) return;
    uint8_t tail[kBand * kBlock * kBytes] = {};
    for (int64_t r = 0; r < strip.rows; ++r)
      std::memcpy(tail + r * kBlock * kBytes, strip.first + r * strip.pitch + whole * kBytes,
                  rest * kBytes);
    strip.first = tail, strip.pitch = kBlock * kBytes, strip.k = k + whole, strip.blocks = 1;
    strip.ahead = nullptr, strip.turn = INT64_MAX;
    dots_of<kKind>(strip, x_.half, sx, x_.count, scales_, sums_);
  }

  const Weight& w_;
  const Tokens& x_;
  const int64_t n_, end_;
  const BandScales scales_;
  int64_t depth_;  // K of a slice
  vf sums_[quads(kRowsOfX) * kBand];
};

template <int kKind>
void dot_rows_of(const Weight& w, int64_t n, int64_t end, const Tokens& x, int64_t m, Next next,
                 const Output& y) {
  for (; n < end; n += kBand) {
    const int64_t stop = n + kBand < end ? n + kBand : end;
    Band<kKind>(w, n, stop, x).run(m, stop < end ? w.row(stop) : next, y);
  }
}
#endif
}  // namespace few

#ifdef WF_DOT
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
}  // namespace wf::gemm
