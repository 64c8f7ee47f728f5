// y[M, N] = x[M, K] . W[N, K]^T on all threads, in either form; what a layer of a model calls.
#pragma once
#include "few.h"
#include "few_form.h"
#include "many.h"

namespace wf::gemm {
// Whether x is multiplied with a weight of `kind` as bf16, by dots or tiles: both are, or may be.
inline bool uses_halves(int weight_kind, int x_kind, int activations) {
  return kHalves && weight_kind != kF32 && (x_kind == kBf16 || activations != kKeep);
}
// The order in which a weight of `kind` wants x in a form.
inline Order order_for(int kind, int form, bool half) {
  if (kind != kFp8 || form != kFew || (half && kTile)) return Order::kPlain;
  return half ? Order::kDealt : Order::kWords;
}

// Rows of x as the kernels want them; in place where x is plain, of the kernels' type, and K a
// multiple of 128. kFp8 is rows that `pack_row` made, for kE4m3 only.
class Prepared {
 public:
  // With tiles of all rows, where tiles are used.
  Rows rows(const Input& x, int64_t count, const Weight& w, int form, int activations) {
    Rows rows = untiled(x, count, w, form, activations);
    RowSet all{0, count, {}};
    tile(rows, w, form, &all, 1);
    rows.tiles = all.tiles;
    return rows;
  }
  Rows untiled(const Input& x, int64_t count, const Weight& w, int form, int activations);
  // Sets of rows as tiles, until the next call; nothing where tiles are not used.
  void tile(const Rows& rows, const Weight& w, int form, RowSet* sets, int64_t count) {
    if (kTile && rows.halves) tiles_.make(rows, w.cols, w.kind == kFp8, form == kFew, sets, count);
  }

 private:
  Scratch values_, scales_;
  TileMaker tiles_;
};

namespace detail {
inline void row_to_float(const Input& x, int64_t m, int64_t cols, float* to, int64_t padded) {
  if (x.kind == kF32) {
    std::memcpy(to, static_cast<const float*>(x.data) + m * x.pitch, cols * 4);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + m * x.pitch;
    int64_t k = 0;
    for (; k + kLanes <= cols; k += kLanes) store(to + k, load_bf16(from + k));
    for (; k < cols; ++k) to[k] = bf16_to_float(from[k]);
  }
  for (int64_t k = cols; k < padded; ++k) to[k] = 0;
}

// The nearest e4m3 (ties to even) of v, |v| <= 448, as a float.
inline float round_to_e4m3(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  if ((u & 0x7fffffff) >= 0x7f800000) return v != v ? v : __builtin_nanf("");
  if ((u & 0x7fffffff) < 0x3c800000) {  // below 2^-6: multiples of 2^-9
    const float magic = 12582912.0f / 512;
    float r = (v + magic) - magic;
    return __builtin_copysignf(r, v);
  }
  u = (u + 0x7ffff + ((u >> 20) & 1)) & 0xfff00000u;
  std::memcpy(&v, &u, 4);
  return v;
}

inline void quantize_row(float* row, int64_t padded, float* scales) {
  for (int64_t b = 0; b < padded / kBlock; ++b, row += kBlock) {
    float most = 0;
    bool nan = false;
    for (int i = 0; i < kBlock; ++i) {
      float a = __builtin_fabsf(row[i]);
      nan |= a != a;
      most = a > most ? a : most;
    }
    float s = (most > 1e-4f ? most : 1e-4f) / 448.0f;
    if (nan) s = __builtin_nanf("");
    float inverse = 1.0f / s;
    for (int i = 0; i < kBlock; ++i) row[i] = round_to_e4m3(row[i] * inverse);
    scales[b] = s;
  }
}

// A packed row: `padded` e4m3 codes of what `quantize_row` left, then its scales.
constexpr int64_t packed_bytes(int64_t padded) { return padded + padded / kBlock * 4; }

inline void pack_row(const float* row, const float* scales, int64_t padded, uint8_t* to) {
  for (int64_t k = 0; k < padded; ++k) {
    uint32_t u;
    std::memcpy(&u, row + k, 4);
    const uint32_t sign = u >> 24 & 0x80, most = u & 0x7fffffff;
    uint32_t code;
    if (most >= 0x7f800000)
      code = 0x7f;
    else if (most < 0x3c800000)  // below 2^-6: multiples of 2^-9
      code = uint32_t(__builtin_fabsf(row[k]) * 512);
    else
      code = (most >> 20) - (120 << 3);
    to[k] = uint8_t(sign | code);
  }
  std::memcpy(to + padded, scales, padded / kBlock * 4);
}

inline void unpack_row(const uint8_t* from, int64_t padded, float* row, float* scales) {
  const float* table = fp8_table();
  for (int64_t k = 0; k < padded; ++k) row[k] = table[from[k]];
  std::memcpy(scales, from + padded, padded / kBlock * 4);
}
}  // namespace detail

namespace detail {
// The largest finite magnitude of `count` floats. Magnitudes compare as integers.
inline float largest_finite(const float* values, int64_t count) {
  int32_t most = 0;
  for (int64_t k = 0; k < count; ++k) {
    int32_t bits;
    std::memcpy(&bits, values + k, 4);
    bits &= 0x7fffffff;
    bits = bits >= 0x7f800000 ? 0 : bits;
    most = bits > most ? bits : most;
  }
  float result;
  std::memcpy(&result, &most, 4);
  return result;
}

// to[j * kLanes + i] = from[4 * i + 3 - j] * lift, for 4 values of i.
inline void deal(const float* from, float* to, float lift) {
#if defined(__x86_64__)
  __m128 f = _mm_set1_ps(lift);
  __m128 a = _mm_mul_ps(_mm_loadu_ps(from), f), b = _mm_mul_ps(_mm_loadu_ps(from + 4), f);
  __m128 c = _mm_mul_ps(_mm_loadu_ps(from + 8), f), d = _mm_mul_ps(_mm_loadu_ps(from + 12), f);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to + 3 * kLanes, a);
  _mm_storeu_ps(to + 2 * kLanes, b);
  _mm_storeu_ps(to + kLanes, c);
  _mm_storeu_ps(to, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * kLanes + i] = from[4 * i + 3 - j] * lift;
#endif
}

// `padded` floats as bf16, each 64 in the order of Fp8Decoder if `deal`.
inline void to_half_row(const float* from, int64_t padded, bool deal, uint16_t* to) {
#if defined(WF_DOT) || defined(WF_TILE)
  for (int64_t k = 0; k < padded; k += 4 * kLanes, from += 4 * kLanes, to += 4 * kLanes) {
    halves first = to_halves(load(from), load(from + kLanes));
    halves second = to_halves(load(from + 2 * kLanes), load(from + 3 * kLanes));
    if (deal) deal_halves(first, second, first, second);
    _mm512_storeu_si512(to, first);
    _mm512_storeu_si512(to + 2 * kLanes, second);
  }
#else
  (void)from, (void)padded, (void)deal, (void)to;
#endif
}

// `cols` bf16 in the order of Fp8Decoder, zeros up to `padded`.
inline void deal_row(const uint16_t* from, int64_t cols, int64_t padded, uint16_t* to) {
#ifdef WF_DOT
  constexpr int64_t kStep = 4 * kLanes;
  auto deal_step = [](const uint16_t* p, uint16_t* dealt) {
    halves first, second;
    deal_halves(load_halves(p), load_halves(p + kStep / 2), first, second);
    _mm512_storeu_si512(dealt, first);
    _mm512_storeu_si512(dealt + kStep / 2, second);
  };
  int64_t k = 0;
  for (; k + kStep <= cols; k += kStep) deal_step(from + k, to + k);
  for (; k < padded; k += kStep) {
    uint16_t end[kStep] = {};
    if (k < cols) std::memcpy(end, from + k, (cols - k) * 2);
    deal_step(end, to + k);
  }
#else
  (void)from, (void)cols, (void)padded, (void)to;
#endif
}

// Order::kWords of `padded` floats, and the factor that undoes its lift.
inline float order_words(float* row, int64_t padded) {
  float most = largest_finite(row, padded);
  // 2^96 leaves room for |x| < 2^31; rows beyond that lose only what is 2^-60 of their largest
  float lift = kFp8Tiny == 1.0f ? 1.0f : most < 0x1p31f ? 0x1p96f : most < 0x1p95f ? 0x1p32f : 1.0f;
  constexpr int kGroup = 4 * kLanes;
  float group[kGroup];
  for (int64_t k = 0; k < padded; k += kGroup) {
    for (int i = 0; i < kLanes; i += 4) deal(row + k + 4 * i, group + i, lift);
    std::memcpy(row + k, group, sizeof group);
  }
  return 1.0f / lift / kFp8Tiny;
}
}  // namespace detail

inline Rows Prepared::untiled(const Input& x, int64_t count, const Weight& w, int form,
                              int activations) {
  const int64_t cols = w.cols;
  const bool half = uses_halves(w.kind, x.kind, activations), quantize = activations == kE4m3;
  const Order order = order_for(w.kind, form, half);
  const bool whole = cols % kBlock == 0 || (half && kTile);  // tiles are padded when they are made
  if (whole && !quantize && order == Order::kPlain && x.kind == (half ? kBf16 : kF32)) {
    Rows in_place{nullptr, x.pitch, nullptr, nullptr, 0, nullptr};
    if (half)
      in_place.halves = static_cast<const uint16_t*>(x.data);
    else
      in_place.data = static_cast<const float*>(x.data);
    return in_place;
  }
  int64_t padded = round_up(cols, kBlock), blocks = padded / kBlock;
  int64_t pitch = padded + (half ? 32 : 16);  // not a power of two: rows must not share cache sets
  float* values = values_.get<float>(count * (pitch + 1) + num_threads() * padded);
  uint16_t* halves = reinterpret_cast<uint16_t*>(values);
  float* unlift = values + count * pitch;
  float* own = unlift + count;
  float* scales = quantize ? scales_.get<float>(count * blocks) : nullptr;
  constexpr int64_t kRowsOfTask = 4;
  parallel_for(ceil_div(count, kRowsOfTask), [&](int64_t task, int thread) {
    for (int64_t m = task * kRowsOfTask; m < (task + 1) * kRowsOfTask && m < count; ++m) {
      if (order == Order::kDealt && x.kind == kBf16 && !quantize) {
        const uint16_t* from = static_cast<const uint16_t*>(x.data) + m * x.pitch;
        detail::deal_row(from, cols, padded, halves + m * pitch);
        continue;
      }
      float* row = half ? own + thread * padded : values + m * pitch;
      if (x.kind == kFp8) {
        const uint8_t* from = static_cast<const uint8_t*>(x.data) + m * x.pitch;
        detail::unpack_row(from, padded, row, scales + m * blocks);
      } else {
        detail::row_to_float(x, m, cols, row, padded);
        if (quantize) detail::quantize_row(row, padded, scales + m * blocks);
      }
      unlift[m] = order == Order::kWords ? detail::order_words(row, padded) : 1.0f;
      if (half) detail::to_half_row(row, padded, order == Order::kDealt, halves + m * pitch);
    }
  });
  Rows rows{values, pitch, nullptr, scales, blocks, order == Order::kWords ? unlift : nullptr};
  if (half) rows.data = nullptr, rows.halves = halves;
  return rows;
}

// A row's bytes, at least 1: work is divided by them, and a K of 0 is a product of zeros.
inline int64_t row_bytes(const Weight& w) { return w.cols ? w.cols * kind_bytes(w.kind) : 1; }

// Rows of W for one task of the few form: several tasks a thread, each long enough that its first
// rows, which may come late, do not count.
inline int64_t few_chunk(const Weight& w, bool half) {
  if (half) {
    const int64_t row = row_bytes(w);
    int64_t bytes = w.rows * row / (num_threads() * 3);
    bytes = bytes < 65536 ? 65536 : bytes > 524288 ? 524288 : bytes;
    const int64_t bands = ceil_div(w.rows, few::kBand);
    // of the sizes from there down to half of it the one that leaves threads the least idle
    int64_t best = ceil_div(ceil_div(bytes, row), few::kBand);
    auto rounds = [&](int64_t chunk) { return ceil_div(ceil_div(bands, chunk), num_threads()); };
    for (int64_t chunk = best, least = best / 2; chunk > 0 && chunk >= least; --chunk)
      if (rounds(chunk) * chunk < rounds(best) * best) best = chunk;
    return best * few::kBand;
  }
  int64_t chunk = round_up(ceil_div(w.rows, int64_t(num_threads()) * 8), 8);
  return chunk < 16 ? 16 : chunk > 256 ? 256 : chunk;
}

inline void linear(const Weight& w, const Rows& x, int64_t count, const Output& y, int form) {
  if (form == kFew) {
    int64_t chunk = few_chunk(w, x.halves || x.tiles.values);
    parallel_runs(ceil_div(w.rows, chunk), [&](int64_t task, int64_t next, const Run&) {
      int64_t n = task * chunk, end = n + chunk < w.rows ? n + chunk : w.rows;
      multiply_few(w, n, end, x, count, y, next < 0 ? nullptr : w.row(next * chunk));
    });
    return;
  }
  const int64_t columns = many::columns(x.tiles.values != nullptr);
  int64_t across = ceil_div(w.rows, columns), down = ceil_div(count, many::kChunkRows);
  parallel_for(across * down, [&](int64_t task, int) {
    int64_t n = task / down * columns, m = task % down * many::kChunkRows;
    int64_t end = n + columns < w.rows ? n + columns : w.rows;
    int64_t last = m + many::kChunkRows < count ? m + many::kChunkRows : count;
    multiply_many(w, n, end, x, m, last, y);
  });
}
}  // namespace wf::gemm
