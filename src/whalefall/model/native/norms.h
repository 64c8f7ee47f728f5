// Norm, rotation, and other row-wise pieces of a layer. Each row is computed by one thread, in an
// order that depends on its width alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include "whalefall/simd.h"

namespace wf::model {
// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  vf squares = {};
  float tail = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  for (; i < n; ++i) tail += x[i] * x[i];
  float factor = 1.0f / std::sqrt((sum(squares) + tail) / float(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes)
    store(y + i, load(x + i) * set1(factor) * load(weight + i));
  for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

// Rotates the pairs (2i, 2i + 1) of x by the angles of one position; table: [pairs][cos, sin].
inline void rotate(const float* x, const float* table, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 2) {
    float even = x[i], odd = x[i + 1], cos = table[i], sin = table[i + 1];
    y[i] = even * cos - odd * sin;
    y[i + 1] = odd * cos + even * sin;
  }
}

inline void add(const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i));
  for (; i < n; ++i) y[i] += x[i];
}

// y += factor * x, x in fp32 or bf16: a product and a sum, rounded each.
inline void add_scaled(const void* x, bool bf16, float factor, int64_t n, float* y) {
  const float* wide = static_cast<const float*>(x);
  const uint16_t* narrow = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vf v = bf16 ? load_bf16(narrow + i) : load(wide + i);
    store(y + i, load(y + i) + v * set1(factor));
  }
  for (; i < n; ++i) y[i] += factor * (bf16 ? bf16_to_float(narrow[i]) : wide[i]);
}

// x as the cache keeps it.
inline void to_cache(const float* x, int64_t n, bool bf16, void* to) {
  if (!bf16) {
    std::memcpy(to, x, n * 4);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

inline void from_table(const void* row, bool bf16, int64_t n, float* to) {
  if (!bf16) {
    std::memcpy(to, row, n * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(row);
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
}
}  // namespace wf::model
