// Activations to FP8 (E4M3) with one scale per 128 channels, as low-latency dispatch sends them.
// scale = max(|x|, 1e-4) / 448, rounded up to a power of two where asked; values saturate.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace wf_ep {

// Round to nearest even; |x| <= 448 after clamping, NaN stays NaN.
inline uint8_t to_e4m3(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t sign = u >> 24 & 0x80, magnitude = u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint8_t>(sign | 0x7F);
  if (magnitude >= 0x43E00000) return static_cast<uint8_t>(sign | 0x7E);  // 448 and above
  if (magnitude < 0x3C800000) {  // below 2^-6: multiples of 2^-9
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    float shifted = scaled * 512.0f + 8388608.0f;  // adding 2^23 rounds to an integer
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    return static_cast<uint8_t>(sign | (bits & 0xF));
  }
  uint32_t rounded = magnitude + 0x7FFFF + (magnitude >> 20 & 1);
  uint32_t code = (rounded >> 20) - (120 << 3);
  return static_cast<uint8_t>(sign | (code > 0x7E ? 0x7E : code));
}

inline float up_to_power_of_two(float s) {
  uint32_t u;
  memcpy(&u, &s, 4);
  if (u & 0x7FFFFF) u = (u & 0x7F800000) + 0x800000;
  memcpy(&s, &u, 4);
  return s;
}

// One row of bf16 to codes [n] and scales [n / 128].
inline void cast_row(const uint16_t* x, int64_t n, bool round_scale, uint8_t* out, float* scales) {
  for (int64_t b = 0; b < n / 128; b++, x += 128, out += 128) {
    float v[128], top = 0;
    for (int i = 0; i < 128; i++) {
      uint32_t u = static_cast<uint32_t>(x[i]) << 16;
      memcpy(&v[i], &u, 4);
      float a = fabsf(v[i]);
      top = a > top ? a : top;
    }
    float scale = (top > 1e-4f ? top : 1e-4f) / 448.0f;
    if (round_scale) scale = up_to_power_of_two(scale);
    float inverse = 1.0f / scale;
    for (int i = 0; i < 128; i++) out[i] = to_e4m3(v[i] * inverse);
    scales[b] = scale;
  }
}

}  // namespace wf_ep
