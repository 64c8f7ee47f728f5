// One tile of up to 64 keys for a group of R query rows: scores, online softmax, weighted values.
//
//   s[t,r] = q_r . k_t * scale * log2(e)     p = 2^(s - m)     O_r = O_r * 2^(m_old - m) + p V
//
// Rows of K and V are reached by pointer, so that pages, gathered indices and plain arrays are one
// kernel. Registers: R * T accumulators of scores (avx2: 4 rows x 2 keys), then R * 2 of O. The
// tile's stored rows (72 KiB for 64 x 576 bf16) stay in L2 over all groups of a block, a group's q
// and O (18 KiB) in L1. Bound: FMA ports from 4 rows on, memory below.
//
// A row's bits depend on its own q, keys and length only, never on the rows beside it: each score
// is one chain of multiply-adds and one fixed sum, each output one chain over the keys in order.
#pragma once
#include "weigh.h"

namespace wf::attention {
template <class Row, int R>
inline void score_step(const typename Row::Element* const* k, int64_t step, const float* q,
                       vf* sum) {
  constexpr int T = kScores / R;
#ifdef WF_DOT
  if constexpr (kDots<Row>) {
    halves key[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) key[t] = load_halves(k[t] + step * kStep);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const halves row = load_halves(q + r * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[t * R + r] = dot(sum[t * R + r], key[t], row);
    }
    return;
  } else {
#endif
    vf a[T], b[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) Row::load2(k[t] + step * kStep, a[t], b[t]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[t * R + r] = fma(a[t], load(q + r * kLanes), sum[t * R + r]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        sum[t * R + r] = fma(b[t], load(q + (R + r) * kLanes), sum[t * R + r]);
#ifdef WF_DOT
  }
#endif
}

// Scores of kScores / R keys with R rows: s[t * R + r]. q: see `pack_queries`.
template <class Row, int R>
__attribute__((noinline)) void scores(Rows key, const float* q, int64_t steps, float scale,
                                      const Fetch& fetch, float* s) {
  constexpr int T = kScores / R, kFloats = R * kQueryFloats<Row>;
  constexpr int64_t kBytes = kStep * sizeof(typename Row::Element);
  constexpr int64_t kBeat = kBytes < 64 ? 64 / kBytes : 1;  // steps that use up a line
  const typename Row::Element* k[T];
  vf sum[T * R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) k[t] = row_at<Row>(key, t);
#pragma GCC unroll 16
  for (int i = 0; i < T * R; ++i) sum[i] = vf{};
  int64_t step = 0;
  [[maybe_unused]] Fetch cursor = R < 4 ? fetch : Fetch{};
  [[maybe_unused]] const int64_t each = R < 4 ? fetch.each(steps / kBeat) : 0;
  if (fetch.count)
    for (; step + kBeat <= steps; step += kBeat, q += kBeat * kFloats) {
      if constexpr (R < 4)
        cursor.lines(each);
      else
        fetch.line_of_each(step * kBytes);
#pragma GCC unroll 4
      for (int i = 0; i < kBeat; ++i) score_step<Row, R>(k, step + i, q + i * kFloats, sum);
    }
  for (; step < steps; ++step, q += kFloats) score_step<Row, R>(k, step, q, sum);
#pragma GCC unroll 16
  for (int i = 0; i < T * R; i += kLanes) store(s + i, sums(sum + i) * scale);
}

// Maximum (in units of log2) and sum of exponentials; lane l belongs to row l % R.
struct Softmax {
  vf max = set1(-kInf), sum = vf{};
};

// The reference point of the exponentials: the maximum, but 0 while no key was seen.
inline vf reference_point(vf m) { return select(m == -kInf, vf{}, m); }

// s[t * R + r], t < tokens, becomes the weights; returns the factor for what was summed before.
template <int R>
inline vf soften(float* s, int tokens, Softmax& state) {
  vf best = state.max;
  const int end = tokens * R;
  for (int i = 0; i < end; i += kLanes) best = max(best, load(s + i));
  best = across<R>(best, [](vf a, vf b) { return max(a, b); });
  vf point = reference_point(best);
  vf total{};
  for (int i = 0; i < end; i += kLanes) {
    vf p = exp2_of_negative(load(s + i) - point);
    store(s + i, p);
    total += p;
  }
  total = across<R>(total, [](vf a, vf b) { return a + b; });
  vf before = exp2_of_negative(state.max - point);
  state.sum = state.sum * before + total;
  state.max = best;
  return before;
}

// o = o * factor[r] for each row r of R.
template <int R>
inline void rescale(float* o, int64_t steps, vf factor) {
  vf row[R];
  for (int r = 0; r < R; ++r) row[r] = set1(factor[r]);
  for (int64_t i = 0; i < steps * 2; ++i)
    for (int r = 0; r < R; ++r, o += kLanes) store(o, load(o) * row[r]);
}
inline bool all_one(vf factor) {
  vi equal = factor == 1.0f;
  int32_t lanes[kLanes];
  std::memcpy(lanes, &equal, sizeof lanes);
  int32_t all = -1;
  for (int32_t lane : lanes) all &= lane;
  return all != 0;
}

// Where a tile's rows are. Behind the last of n, the last is repeated.
struct Tile {
  const void* k[kTile + kPadding];
  const void* v[kTile + kPadding];
  int n = 0;
};

// The tile after the one at hand, and which group of how many is at work: each of the first few
// brings its share of the next tile's rows into L2 during its scores; one that is alone, half of
// them during its weights.
struct Ahead {
  const Tile* next = nullptr;  // null: nothing to bring
  int64_t k_bytes = 0, v_bytes = 0, group = 0, groups = 1;

  Share during_scores(int64_t calls) const {
    if (!next || group >= groups) return {};
    return {next->k + first(), same() ? half() - first() : end() - first(), k_bytes, calls};
  }
  Share during_weights(int64_t calls) const {
    if (!next || group >= groups) return {};
    if (same()) return {next->k + half(), end() - half(), k_bytes, calls};
    return {next->v + first(), end() - first(), v_bytes, calls};
  }

 private:
  bool same() const { return next->k[0] == next->v[0]; }
  int64_t first() const { return next->n * group / groups; }
  int64_t end() const { return next->n * (group + 1) / groups; }
  int64_t half() const { return groups > 1 ? end() : end() / 2; }
};

// Adds a tile to a group: row r sees its first seen[r] keys. `k_steps`, `v_steps`: row widths.
template <class Row, int R>
inline void attend(const Tile& tile, const Ahead& ahead, const int* seen, const float* q,
                   int64_t k_steps, int64_t v_steps, float scale_log2, float* o, Softmax& state) {
  constexpr int T = kScores / R;
  alignas(64) float s[(kTile + kPadding) * R];
  int most = seen[0], least = seen[0];
  for (int r = 1; r < R; ++r) {
    most = seen[r] > most ? seen[r] : most;
    least = seen[r] < least ? seen[r] : least;
  }
  Share share = ahead.during_scores(ceil_div(most, T));
  for (int t = 0; t < most; t += T)
    scores<Row, R>(tile.k + t, q, k_steps, scale_log2, share.next(), s + t * R);
  int tokens = (most + T - 1) / T * T;
  for (int t = least; t < tokens; ++t)
    for (int r = 0; r < R; ++r)
      if (t >= seen[r]) s[t * R + r] = -kInf;
  vf factor = soften<R>(s, tokens, state);
  if (!all_one(factor)) rescale<R>(o, v_steps, factor);
  const Weights<Row>* p = reinterpret_cast<const Weights<Row>*>(s);
  int common = least;
#ifdef WF_DOT
  alignas(64) int32_t pairs[(kTile + kPadding) * R / 2];
  if constexpr (kDots<Row>) {
    pair_weights<R>(s, tokens, pairs);
    p = pairs;
    if (most > least) common = least / 2 * 2;  // a row's pairs are the same whatever others see
  }
#endif
  weigh<Row, R, R>(tile.v, v_steps, p, 0, common, ahead.during_weights(v_steps / kWide<Row, R>), o);
  if (most > least)
    for (int r = 0; r < R; ++r)
      if (seen[r] > common)
        weigh<Row, 1, R>(tile.v, v_steps, p + r, common, seen[r], {}, o + r * kLanes);
}
}  // namespace wf::attention
