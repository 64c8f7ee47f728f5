// y[M, N] = x[M, K] . W[N, K]^T on all threads, in either form; what a layer of a model calls.
#pragma once
#include "few.h"
#include "many.h"

namespace wf::gemm {
// Rows of x as the kernels want them; in place where x is fp32 and K a multiple of 128.
// With `quantize`, each 128 of a row becomes e4m3 with its own scale (the published W8A8 numerics).
class Prepared {
 public:
  Rows rows(const Input& x, int64_t count, int64_t cols, bool quantize = false);

 private:
  Scratch values_, scales_;
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
}  // namespace detail

inline Rows Prepared::rows(const Input& x, int64_t count, int64_t cols, bool quantize) {
  if (x.kind == kF32 && cols % kBlock == 0 && !quantize)
    return Rows{static_cast<const float*>(x.data), x.pitch, nullptr, nullptr, 0};
  int64_t padded = round_up(cols, kBlock), blocks = padded / kBlock;
  int64_t pitch = padded + 16;  // not a power of two: rows must not share cache sets
  float* values = values_.get<float>(count * pitch);
  float* scales = quantize ? scales_.get<float>(count * blocks) : nullptr;
  parallel_for(ceil_div(count, 16), [&](int64_t task, int) {
    for (int64_t m = task * 16; m < (task + 1) * 16 && m < count; ++m) {
      detail::row_to_float(x, m, cols, values + m * pitch, padded);
      if (quantize) detail::quantize_row(values + m * pitch, padded, scales + m * blocks);
    }
  });
  return Rows{values, pitch, nullptr, scales, blocks};
}

// Rows of W for one task of the few form: large enough that the prefetch of the next group pays.
inline int64_t few_chunk(int64_t rows) {
  int64_t chunk = round_up(ceil_div(rows, int64_t(num_threads()) * 8), 8);
  return chunk < 16 ? 16 : chunk > 128 ? 128 : chunk;
}

inline void linear(const Weight& w, const Rows& x, int64_t count, const Output& y, int form) {
  if (form == kFew) {
    int64_t chunk = few_chunk(w.rows);
    parallel_for(ceil_div(w.rows, chunk), [&](int64_t task, int) {
      int64_t n = task * chunk, end = n + chunk < w.rows ? n + chunk : w.rows;
      multiply_few(w, n, end, x, count, y);
    });
    return;
  }
  int64_t across = ceil_div(w.rows, many::kColumns), down = ceil_div(count, many::kChunkRows);
  parallel_for(across * down, [&](int64_t task, int) {
    int64_t n = task / down * many::kColumns, m = task % down * many::kChunkRows;
    int64_t end = n + many::kColumns < w.rows ? n + many::kColumns : w.rows;
    int64_t last = m + many::kChunkRows < count ? m + many::kChunkRows : count;
    multiply_many(w, n, end, x, m, last, y);
  });
}
}  // namespace wf::gemm
