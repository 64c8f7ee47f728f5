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

#if defined(WF_DOT) || defined(WF_TILE)
// A tile whose scale is a power of two, as quantisers make them: its products are bf16 as they
// stand, made by adding exponents, in less than half the time. False: not such a scale.
inline bool expand_by_exponents(const uint8_t* codes, float scale, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  const int exponent = int(bits >> 23) - 127;  // that of a negative scale reads 129 and more
  if ((bits & 0x7fffff) || exponent < -100 || exponent > 100) return false;
  const Fp8Decoder decode;
  const __m512i add = _mm512_set1_epi16(short(exponent * 128));
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
  const __m512i most = _mm512_set1_epi16(0x7f7f);
  for (int i = 0; i < kFp8Tile; i += 64) {
    halves part[2];
    decode(_mm512_loadu_si512(codes + i), part[0], part[1]);
    for (halves& h : part) {  // 0 and NaN stay
      const __m512i below = _mm512_sub_epi16(_mm512_and_si512(h, magnitude), one);
      h = _mm512_mask_add_epi16(h, _mm512_cmplt_epu16_mask(below, most), h, add);
    }
    undeal_halves(part[0], part[1], to + i);
  }
  return true;
}
#endif

inline void expand_fp8_row(const uint8_t* row, uint16_t* to) {
  for (int tile = 0; tile < kFp8Columns / kFp8Tile; ++tile) {
    float scale;
    std::memcpy(&scale, row + kFp8Columns + tile * 4, 4);
#if defined(WF_DOT) || defined(WF_TILE)
    if (expand_by_exponents(row + tile * kFp8Tile, scale, to + tile * kFp8Tile)) continue;
#endif
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
