// A tile for one or two query rows, bound by memory: keys are read one after another, in the order
// in which they lie there.
//
// A strip of 16 keys is scored, softened and weighed before the next, so that its rows come once
// into L1 and are there for both uses. Meanwhile, line by line in the order of memory, the rows
// kLead behind are brought into L1, half during the scores, half during the weights. Reading many
// rows side by side, as `attend` does for arithmetic's sake, reaches half of the bandwidth: it
// defeats the machine's own prefetching, and rows asked for in L2 do not overlap with the loads.
#pragma once
#include "attend.h"

namespace wf::attention {
constexpr int kStrip = 16;
constexpr int kLead = 14;  // rows: 16 KB of a bf16 latent
static_assert(kLead <= kPadding);

template <int R>
constexpr bool kInOrder = R <= 2;

// One step of one key: with dots into the chain `which`, else its two vectors into both.
template <class Row, int R>
inline void score_in_order(const typename Row::Element* k, const float* q,
                           [[maybe_unused]] int which, vf (*part)[2]) {
#ifdef WF_DOT
  if constexpr (kDots<Row>) {
    const halves key = load_halves(k);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      part[r][which] = dot(part[r][which], key, load_halves(q + r * kLanes));
    return;
  } else {
#endif
    vf a, b;
    Row::load2(k, a, b);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      part[r][0] = fma(a, load(q + r * kLanes), part[r][0]);
      part[r][1] = fma(b, load(q + (R + r) * kLanes), part[r][1]);
    }
#ifdef WF_DOT
  }
#endif
}

// Scores of kLanes / R keys, in two chains each: s[t * R + r]. Half a row of `ahead` is brought
// with each key: a line where two are used up.
template <class Row, int R>
__attribute__((noinline)) void scores_in_order(Rows key, Rows ahead, const float* q, int64_t steps,
                                               float scale, float* s) {
  using Element = typename Row::Element;
  constexpr int T = kLanes / R, kFloats = R * kQueryFloats<Row>;
  constexpr int kBytes = kStep * sizeof(Element), kBeat = kBytes < 128 ? 128 / kBytes : 1;
  const char* line = nullptr;
  vf sum[kLanes];
  for (int t = 0; t < T; ++t) {
    const Element* k = row_at<Row>(key, t);
    const float* row = q;
    if (t % 2 == 0) line = static_cast<const char*>(ahead[t / 2]);
    vf part[R][2] = {};
    int64_t step = 0;
    for (; step + kBeat <= steps; step += kBeat, line += 64) {
      prefetch_l1(line);
#pragma GCC unroll 4
      for (int i = 0; i < kBeat; ++i, k += kStep, row += kFloats)
        score_in_order<Row, R>(k, row, i % 2, part);
    }
    for (; step < steps; ++step, k += kStep, row += kFloats)
      score_in_order<Row, R>(k, row, 0, part);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) sum[t * R + r] = part[r][0] + part[r][1];
  }
  store(s, sums(sum) * scale);
}

// Adds a tile, in place, to rows that all see its first `seen` keys. Its pointers behind the last
// name the rows that are read next.
template <class Row, int R>
inline void attend_in_order(const Tile& tile, int seen, int64_t bytes, const float* q,
                            int64_t k_steps, int64_t v_steps, float scale_log2, float* o,
                            Softmax& state) {
  constexpr int T = kLanes / R;
  alignas(64) float s[2 * kLanes * R];
  for (int begin = 0; begin < seen; begin += kStrip) {
    const int tokens = std::min(kStrip, seen - begin), whole = ceil_div(tokens, T) * T;
    const Rows ahead = tile.k + begin + kLead;
    Share second(ahead + kStrip / 2, kStrip / 2, bytes, v_steps / kWide<Row, R>);
    second.near = true;
    for (int t = 0; t < tokens; t += T)
      scores_in_order<Row, R>(tile.k + begin + t, ahead + t / 2, q, k_steps, scale_log2, s + t * R);
    for (int i = tokens * R; i < whole * R; ++i) s[i] = -kInf;
    vf factor = soften<R>(s, whole, state);
    if (!all_one(factor)) rescale<R>(o, v_steps, factor);
    const Weights<Row>* p = reinterpret_cast<const Weights<Row>*>(s);
#ifdef WF_DOT
    alignas(64) int32_t pairs[kLanes * R];
    if constexpr (kDots<Row>) {
      pair_weights<R>(s, whole, pairs);
      p = pairs;
    }
#endif
    weigh<Row, R, R>(tile.v + begin, v_steps, p, 0, tokens, second, o);
  }
}
}  // namespace wf::attention
