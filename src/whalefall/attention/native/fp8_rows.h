// The 656-byte row of an FP8 latent cache, little endian:
//   bytes 0-511    e4m3 codes of columns 0-511
//   bytes 512-527  four fp32 scales, one for each 128 columns; value = code * scale
//   bytes 528-655  64 bf16 columns 512-575 (the rope part)
// A row expands to bf16, the product rounded once from fp32.
// Source: FlashMLA, the FP8 KV cache of DeepSeek-V3.2.
#pragma once
#include <cmath>
#include "rows.h"

namespace wf::attention {
constexpr int kFp8RowBytes = 656, kFp8Columns = 512, kFp8Tile = 128, kFp8Rope = 64;

inline void expand_fp8_row(const uint8_t* row, uint16_t* to) {
  for (int tile = 0; tile < kFp8Columns / kFp8Tile; ++tile) {
    float scale;
    std::memcpy(&scale, row + kFp8Columns + tile * 4, 4);
    // value / kFp8Scale comes out of the decoder; scaling in two steps keeps huge scales finite.
    const vf factor = set1(scale), unit = set1(kFp8Scale);
    Fp8NanFlag nan;
    for (int i = tile * kFp8Tile; i < (tile + 1) * kFp8Tile; i += 32) nan.see32(row + i);
    for (int i = tile * kFp8Tile; i < (tile + 1) * kFp8Tile; i += kStep) {
      vf a, b;
      if (nan.seen())
        fp8_decode_exact(row + i, a, b);
      else
        fp8_decode(row + i, a, b);
      a = a * unit * factor, b = b * unit * factor;
#if defined(WF_DOT) || defined(WF_TILE)
      _mm512_storeu_si512(to + i, to_halves(a, b));
#else
      store_bf16(to + i, a);
      store_bf16(to + i + kLanes, b);
#endif
    }
  }
  std::memcpy(to + kFp8Columns, row + kFp8Columns + 16, kFp8Rope * 2);
}

// The scale of the published layout: amax / 448 up to the next power of two, at least 2^-13.
inline float fp8_tile_scale(float amax) {
  if (!(amax >= 448.0f * 1e-4f)) return 0x1p-13f;
  int exponent;
  float mantissa = std::frexp(amax / 448.0f, &exponent);  // in [1/2, 1)
  return std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
}
}  // namespace wf::attention
