// Reductions and 2^x on the level's vectors, each with a fixed order of operations: the same
// inputs give the same bits in every kernel of a level.
#pragma once
#include <limits>
#include <utility>
#include "whalefall/simd.h"

namespace wf::attention {
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr auto kEachLane = std::make_integer_sequence<int, kLanes>{};

// The lane that `fold` takes: blocks of B lanes; x's sums go to a block's lower half, y's to the
// upper half; `Upper` picks the second term of a sum.
template <int B, int Upper>
constexpr int fold_lane(int lane) {
  int block = lane / B * B, i = lane % B, from_y = i >= B / 2;
  return from_y * kLanes + block + i % (B / 2) + Upper * (B / 2);
}
template <int B, int... L>
inline vf fold(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, fold_lane<B, 0>(L)...) +
         __builtin_shufflevector(x, y, fold_lane<B, 1>(L)...);
}
// Transposing sum: lane i of the result is the sum of the lanes of v[i].
#if WF_ISA >= 2
// Within 128-bit lanes first, where shuffles are cheapest: 12 of the 15 folds.
inline vf sums(const vf* v) {
  __m512 quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      __m512 x = (__m512)v[4 * i + 2 * j], y = (__m512)v[4 * i + 2 * j + 1];
      pair[j] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    quarter[i] = _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x44),
                               _mm512_shuffle_ps(pair[0], pair[1], 0xEE));
  }
  auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  };
  return (vf)fold(fold(quarter[0], quarter[1]), fold(quarter[2], quarter[3]));
}
#else
template <int B = kLanes>
inline vf sums(const vf* v) {
  if constexpr (B == 1) {
    return v[0];
  } else {
    vf half[B / 2];
#pragma GCC unroll 16
    for (int i = 0; i < B / 2; ++i) half[i] = fold<B>(v[i], v[i + B / 2], kEachLane);
    return sums<B / 2>(half);
  }
}
#endif

template <int S, int... L>
inline vf rotate(vf v, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(v, v, ((L + S) % kLanes)...);
}
// Lane l of the result combines the lanes l, l + R, l + 2R, … of v; R divides kLanes.
template <int R, int S = kLanes / 2, class Combine>
inline vf across(vf v, Combine combine) {
  if constexpr (S >= R) {
    return across<R, S / 2>(combine(v, rotate<S>(v, kEachLane)), combine);
  } else {
    return v;
  }
}

// 2^x for x <= 0: relative error 2e-7; 0 below -126; NaN stays NaN.
inline vf exp2_of_negative(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf y = max(x, set1(-126.0f));
  vf shifted = y + magic;
  vf f = y - (shifted - magic);
  vf p = set1(1.54614478e-4f);  // (2^f - 1) / f on [-1/2, 1/2], at the Chebyshev nodes
  p = fma(p, f, set1(1.33908668e-3f));
  p = fma(p, f, set1(9.61805694e-3f));
  p = fma(p, f, set1(5.55035695e-2f));
  p = fma(p, f, set1(2.40226507e-1f));
  p = fma(p, f, set1(6.93147182e-1f));
  p = fma(p, f, set1(1.0f));
  vf power = (vf)((vi)p + ((vi)shifted << 23));
  power = select(x < -126.0f, vf{}, power);
  return select(x != x, x, power);
}
}  // namespace wf::attention
