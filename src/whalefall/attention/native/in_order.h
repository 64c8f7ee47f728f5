// A tile for one or two query rows, bound by memory: keys are read one after another, in the order
// in which they lie there.
//
// A strip of 16 keys is scored (in pairs), softened and weighed before the next, so that its rows
// come once into L1 and are there for both uses. Meanwhile the rows that come are brought into L1
// (`Nearing`), half during the scores, half during the weights.
// Reading many rows side by side, as `attend` does for arithmetic's sake, reaches half of the
// bandwidth: it defeats the machine's own prefetching, and rows asked for in L2 do not overlap with
// the loads.
#pragma once
#include "attend.h"

namespace wf::attention {
constexpr int kStrip = 16;

template <int R>
constexpr bool kInOrder = R <= 2;

// One step of a pair of keys: with dots into the chain `which`, else its two vectors into both.
template <class Row, int R>
inline void score_pair(const typename Row::Element* const* k, int64_t at, const float* q,
                       [[maybe_unused]] int which, vf (*part)[R][2]) {
#ifdef WF_DOT
  if constexpr (kDots<Row>) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const halves row = load_halves(q + r * kLanes);
      part[0][r][which] = dot(part[0][r][which], row, load_halves(k[0] + at));
      part[1][r][which] = dot(part[1][r][which], row, load_halves(k[1] + at));
    }
    return;
  } else {
#endif
    vf key[2][2];
    Row::load2(k[0] + at, key[0][0], key[0][1]);
    Row::load2(k[1] + at, key[1][0], key[1][1]);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const vf row = load(q + (i * R + r) * kLanes);
        part[0][r][i] = fma(key[0][i], row, part[0][r][i]);
        part[1][r][i] = fma(key[1][i], row, part[1][r][i]);
      }
#ifdef WF_DOT
  }
#endif
}

// Scores of kLanes / R keys, in two chains each: s[t * R + r]. With each pair of keys a row is
// brought as `ahead` says: a line where two are used up.
template <class Row, int R, int Chances>
__attribute__((noinline)) void scores_in_order(Rows key, Rows ahead, const float* q, int64_t steps,
                                               float scale, float* s) {
  using Element = typename Row::Element;
  constexpr int T = kLanes / R, kFloats = R * kQueryFloats<Row>;
  constexpr int kBytes = kStep * sizeof(Element), kBeat = kBytes < 64 ? 64 / kBytes : 1;
  const int64_t end = steps * kStep;
  vf sum[kLanes];
  for (int t = 0; t < T; t += 2) {
    const Element* k[2] = {row_at<Row>(key, t), row_at<Row>(key, t + 1)};
    const Nearing<Chances> nearing(ahead + t / 2);
    const float* row = q;
    vf part[2][R][2] = {};
    int64_t at = 0;
#pragma GCC unroll 2
    for (; at + 2 * kBeat * kStep <= end; at += 2 * kBeat * kStep) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        for (int i = 0; i < kBytes * kBeat; i += 64)
          nearing.line((at + b * kBeat * kStep) * int64_t(sizeof(Element)) + i);
#pragma GCC unroll 2
        for (int i = 0; i < kBeat; ++i, row += kFloats)
          score_pair<Row, R>(k, at + (b * kBeat + i) * kStep, row, b, part);
      }
    }
    for (; at < end; at += kStep, row += kFloats) score_pair<Row, R>(k, at, row, 0, part);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sum[(t + i) * R + r] = part[i][r][0] + part[i][r][1];
  }
  store(s, sums(sum) * scale);
}

// Adds a tile, in place, to rows that all see its first `seen` keys. Its pointers behind the last
// name the rows that are read next. `Chances`: see `Nearing`.
template <class Row, int R, int Chances>
inline void attend_in_order(const Tile& tile, int seen, int64_t bytes, const float* q,
                            int64_t k_steps, int64_t v_steps, float scale_log2, float* o,
                            Softmax& state) {
  constexpr int T = kLanes / R;
  alignas(64) float s[kStrip * R + kLanes];
  for (int begin = 0; begin < seen; begin += kStrip) {
    const int tokens = std::min(kStrip, seen - begin), whole = ceil_div(tokens, T) * T;
    const Rows ahead = tile.k + begin;
    Share second(ahead + kStrip / 2, kStrip / 2, bytes, v_steps / kWide<Row, R>);
    second.chances = Chances;
    for (int t = 0; t < tokens; t += T)
      scores_in_order<Row, R, Chances>(tile.k + begin + t, ahead + t / 2, q, k_steps, scale_log2,
                                       s + t * R);
    for (int i = tokens * R; i < whole * R; ++i) s[i] = -kInf;
    vf factor = soften<Row, R>(s, whole, highest(s, whole * R, set1(-kInf)), state);
    if (!all_one(factor)) rescale<R>(o, v_steps, factor);
    const auto* p = reinterpret_cast<const Weights<Row>*>(s);
    weigh<Row, R, R>(tile.v + begin, 0, v_steps, p, 0, tokens, second, o);
  }
}
}  // namespace wf::attention
