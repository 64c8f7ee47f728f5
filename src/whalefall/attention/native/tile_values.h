// O += P V over a panel of keys by AMX's tiles, a strip of 32 columns at a time.
//
// The second operand wants pairs of keys side by side: a strip's rows are unpacked into a copy
// (16 KiB) that stays in L1 while all groups use it. Sums stay in tiles over the whole panel.
#pragma once
#include "tile_soften.h"

namespace wf::attention {
#ifdef WF_TILE
constexpr int kStripBytes = kPanel * kTileBytes;

// Pairs the columns of a step of a panel's first `keys` keys: [32 keys][half][pair][16 columns][2],
// with zeros behind the keys, up to a multiple of 32.
inline void pair_values(const Panel& panel, int keys, int64_t step, char* strip) {
  auto row = [&](int key) {
    return load_halves(static_cast<const char*>(panel.v[key]) + step * kTileBytes);
  };
  auto put = [](halves a, halves b, char* to) {
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + kTileSize, _mm512_unpackhi_epi16(a, b));
  };
  int t = 0;
  for (; t + kStepKeys <= keys; t += kStepKeys, strip += 2 * kTileSize)
#pragma GCC unroll 16
    for (int p = 0; p < kStepKeys / 2; ++p)
      put(row(t + 2 * p), row(t + 2 * p + 1), strip + pair_place(p) * kTileBytes);
  if (t < keys)
    for (int p = 0; p < kStepKeys / 2; ++p, t += 2)
      put(t < keys ? row(t) : halves{}, t + 1 < keys ? row(t + 1) : halves{},
          strip + pair_place(p) * kTileBytes);
}

// Two tiles of O for each of one or two groups. With each product of 32 keys `fetch` brings lines.
template <int Groups>
__attribute__((noinline)) void weigh_strip(const float* const* p, const char* strip, int keys,
                                           bool fresh, Fetch& fetch, float* const* o) {
  constexpr bool kTwo = Groups == 2;
  if (fresh) {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  } else {
    load_tile<0>(o[0], kTileBytes);
    load_tile<1>(o[0] + kTileWords, kTileBytes);
    if constexpr (kTwo) load_tile<2>(o[1], kTileBytes);
    if constexpr (kTwo) load_tile<3>(o[1] + kTileWords, kTileBytes);
  }
  for (int t = 0; t < keys; t += kStepKeys, strip += 2 * kTileSize) {
    const int64_t at = t / kStepKeys * kTileWords;
    load_tile<6>(strip, kTileBytes);
    load_tile<7>(strip + kTileSize, kTileBytes);
    load_tile<4>(p[0] + at, kTileBytes);
    if constexpr (kTwo) load_tile<5>(p[1] + at, kTileBytes);
    multiply_tile<0, 4, 6>();
    multiply_tile<1, 4, 7>();
    if constexpr (kTwo) multiply_tile<2, 5, 6>();
    if constexpr (kTwo) multiply_tile<3, 5, 7>();
    fetch();
  }
  store_tile<0>(o[0], kTileBytes);
  store_tile<1>(o[0] + kTileWords, kTileBytes);
  if constexpr (kTwo) store_tile<2>(o[1], kTileBytes);
  if constexpr (kTwo) store_tile<3>(o[1] + kTileWords, kTileBytes);
}

// Whether all values of keys first … end - 1 are finite.
inline bool all_finite(const Panel& panel, int first, int end, int64_t steps) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 found = 0;
  for (int t = first; t < end; ++t)
    for (int64_t i = 0; i < steps; ++i) {
      const halves row = load_halves(static_cast<const char*>(panel.v[t]) + i * kTileBytes);
      found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row, exponent), exponent);
    }
  return found == 0;
}
#endif
}  // namespace wf::attention
