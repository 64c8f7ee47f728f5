// Reductions and 2^x on the level's vectors, each with a fixed order of operations: the same
// inputs give the same bits in every kernel of a level.
#pragma once
#include <limits>
#include <utility>
#include "whalefall/simd.h"

namespace wf::attention {
constexpr float kInf = std::numeric_limits<float>::infinity();

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

// 2^x for x < 127: relative error 2e-7; 0 below -150 (-126 without AVX-512); NaN stays NaN.
inline vf power_of_two(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
#if WF_ISA >= 2
  const vf kept = (vf)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // the second, if a NaN
  const vf n = (kept + magic) - magic, rest = kept - n;
  vf q = set1(1.33813126e-3f);  // (2^rest - 1) / rest on [-1/2, 1/2], at the Chebyshev nodes
  q = fma(q, rest, set1(9.66636852e-3f));
  q = fma(q, rest, set1(5.55038098e-2f));
  q = fma(q, rest, set1(2.4022349e-1f));
  q = fma(q, rest, set1(6.93147181e-1f));
  q = fma(q, rest, set1(1.0f));
  return (vf)_mm512_scalef_ps((__m512)q, (__m512)n);
#else
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
#endif
}
}  // namespace wf::attention
