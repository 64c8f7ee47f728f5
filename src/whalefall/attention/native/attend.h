// One tile of up to 64 keys for groups of R query rows: scores, online softmax, weighted values.
//
//   s[t,r] = q_r . k_t * scale * log2(e)     p = 2^(s - m)     O_r = O_r * 2^(m_old - m) + p V
//
// Rows of K and V are reached by pointer, so that pages, gathered indices and plain arrays are one
// kernel. Registers: R * T accumulators of scores (avx2: 4 rows x 3 keys), then R * 2 of O (3). All
// groups are scored, then all softened, which hides one's chain of maximum, exponentials and sum
// behind the next; then values go by strips of 128 columns. L1 holds a group's q during scores
// (18 KiB; 9 in bf16), a strip of V over all groups during values (16 KiB), with a group's part of
// O (4 KiB); L2 the tile's stored rows (72 KiB for 64 x 576 bf16), all q and O. Bound: FMA or dot
// ports from 4 rows on, memory below.
//
// A row's bits depend on its own q, keys and length only, never on the rows beside it: each score
// is one chain of multiply-adds and one fixed sum, each output one chain over the keys in order.
#pragma once
#include "scores.h"
#include "weigh.h"

namespace wf::attention {
// Steps of V that stay in L1 over all groups: 128 columns, or 96, which are whole calls by threes.
template <class Row, int R, bool Threes>
constexpr int64_t kStripSteps = Threes ? 6 : std::max(kWide<Row, R>, 128 / kStep);

// Of the scores so far (in units of log2): the maximum, the point against which exponentials are
// taken, and their sum. Lane l belongs to row l % R. The point follows the maximum only when it
// is left behind by more than kSlack, so that what was summed is rarely rescaled: weights up to
// 2^kSlack are as exact as those up to 1.
struct Softmax {
  vf max = set1(-kInf), point = set1(-kInf), sum = vf{};
};
constexpr float kSlack = 8.0f;

// What is subtracted for a point: itself, but 0 while no key was seen.
inline vf origin_of(vf point) { return select(point == -kInf, vf{}, point); }

// The scores s[t * R + r], t < tokens, become weights, as `weigh` wants them; returns the factor
// for what was summed before. `best`: see `highest`.
template <class Row, int R>
inline vf soften(float* s, int tokens, vf best, Softmax& state) {
  const int end = tokens * R;
  state.max = across<R>(max(best, state.max), [](vf a, vf b) { return max(a, b); });
  const vf before = state.point;
  state.point = select(state.max > before + kSlack, state.max, before);
  const vf origin = origin_of(state.point);
  const KeepWeights<Row, R> keep;
  vf total{};
#pragma GCC unroll 2
  for (int i = 0; i < end; i += 2 * kLanes) {
    vf a = power_of_two(load(s + i) - origin), b{};
    total += a;
    if (i + kLanes < end) {
      b = power_of_two(load(s + i + kLanes) - origin);
      total += b;
    }
    keep(s, i, a, b);
  }
  total = across<R>(total, [](vf a, vf b) { return a + b; });
  const vf factor = power_of_two(before - origin);
  state.sum = state.sum * factor + total;
  return factor;
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

// The tile after the one at hand, and how many groups work on it: each of the first two brings its
// share of the next tile's rows into L2 during its scores; one that is alone, half of them during
// its weights. At avx2 all groups bring some, and of two, too, half during the weights: Zen 3 has
// fewer places for lines on their way, and its loads wait for one.
struct Ahead {
  const Tile* next = nullptr;  // null: nothing to bring
  int64_t k_bytes = 0, v_bytes = 0, groups = 1;

  Share during_scores(int64_t group, int64_t calls) const {
    if (!next || group >= bringing()) return {};
    return {next->k + first(group), same() ? half(group) - first(group) : end(group) - first(group),
            k_bytes, calls};
  }
  Share during_weights(int64_t group, int64_t calls) const {
    if (!next || group >= bringing()) return {};
    if (same()) return {next->k + half(group), end(group) - half(group), k_bytes, calls};
    return {next->v + first(group), end(group) - first(group), v_bytes, calls};
  }

 private:
  static constexpr bool kAll = kLanes == 8;
  int64_t bringing() const { return kAll ? groups : std::min<int64_t>(groups, 2); }
  bool same() const { return next->k[0] == next->v[0]; }
  int64_t first(int64_t group) const { return next->n * group / bringing(); }
  int64_t end(int64_t group) const { return next->n * (group + 1) / bringing(); }
  int64_t half(int64_t group) const {
    return groups > (kAll ? 2 : 1) ? end(group) : (first(group) + end(group)) / 2;
  }
};

// A group of R rows at a tile: row r sees its first seen[r] keys.
template <class Row, int R>
struct Group {
  const float* q;
  float* s;  // [kTile + kPadding][R]: the tile's scores, then its weights
  float* o;
  Softmax state;
  int seen[R];
  int most, least;  // of seen
  vf best;          // the maximum of the scores, as `soften` wants it
  vf factor;        // of what `o` holds
  bool rescaled;    // whether that is not 1 for all rows
  Share share;      // of the next tile's rows, during the weights

  // Keys that all rows see. A row's pairs for dots are the same whatever others see.
  int common() const { return kDots<Row> && most > least ? least / 2 * 2 : least; }
};

// Scores of a group with the keys that some row sees, -inf where a row does not; returns their
// maximum as `soften` wants it.
template <class Row, int R, bool Threes>
inline vf score(const Tile& tile, Share share, int64_t k_steps, float scale,
                const Group<Row, R>& group) {
  constexpr int T = kScores / R;
  const int tokens = int(ceil_div(group.most, T) * T);
  float* s = group.s;
  vf best;
  if constexpr (Threes)
    best = scores_by_threes<Row, R>(tile.k, tokens, group.q, k_steps, scale, share, s);
  else
    best = scores<Row, R>(tile.k, tokens, group.q, k_steps, scale, share, s);
  if (group.least == tokens) return best;
  for (int t = group.least; t < tokens; ++t)
    for (int r = 0; r < R; ++r)
      if (t >= group.seen[r]) s[t * R + r] = -kInf;
  return highest(s, tokens * R, set1(-kInf));
}

// The columns of steps `step` … `end` - 1 of a group's values.
template <class Row, int R, bool Threes>
inline void add_values(const Tile& tile, int64_t step, int64_t end, Group<Row, R>& group) {
  float* o = group.o + step * 2 * R * kLanes;
  const auto* p = reinterpret_cast<const Weights<Row>*>(group.s);
  const int common = group.common();
  if (group.rescaled) rescale<R>(o, end - step, group.factor);
  if constexpr (Threes)
    weigh_by_threes<Row, R>(tile.v, step, end, p, 0, common, group.share, o);
  else
    weigh<Row, R, R>(tile.v, step, end, p, 0, common, group.share, o);
  Share none;
  for (int r = 0; r < R; ++r)
    if (group.seen[r] > common)
      weigh<Row, 1, R>(tile.v, step, end, p + r, common, group.seen[r], none, o + r * kLanes);
}

// Adds a tile to groups. `k_steps`, `v_steps`: row widths.
template <class Row, int R, bool Threes>
inline void attend_by(const Tile& tile, const Ahead& ahead, Group<Row, R>* groups, int64_t k_steps,
                      int64_t v_steps, float scale_log2) {
  constexpr int T = kScores / R;
  constexpr int64_t kStrip = kStripSteps<Row, R, Threes>;
  for (int64_t g = 0; g < ahead.groups; ++g) {
    const Share share = ahead.during_scores(g, ceil_div(groups[g].most, Threes ? 3 : T));
    groups[g].best = score<Row, R, Threes>(tile, share, k_steps, scale_log2, groups[g]);
    const int64_t calls = Threes ? v_steps * 2 / 3 : v_steps / kWide<Row, R>;
    groups[g].share = ahead.during_weights(g, calls);
  }
  for (int64_t g = 0; g < ahead.groups; ++g) {
    Group<Row, R>& group = groups[g];
    const int tokens = int(ceil_div(group.most, T) * T);
    group.factor = soften<Row, R>(group.s, tokens, group.best, group.state);
    group.rescaled = !all_one(group.factor);
  }
  for (int64_t step = 0; step < v_steps; step += kStrip)
    for (int64_t g = 0; g < ahead.groups; ++g)
      add_values<Row, R, Threes>(tile, step, std::min(step + kStrip, v_steps), groups[g]);
}

// By threes where registers allow and groups share what is read; a single group waits for memory,
// which likes it better by halves of lines. Each chain is the same, and so are the bits.
template <class Row, int R>
inline void attend(const Tile& tile, const Ahead& ahead, Group<Row, R>* groups, int64_t k_steps,
                   int64_t v_steps, float scale_log2) {
  if (kThrees<R> && ahead.groups > 1)
    attend_by<Row, R, kThrees<R>>(tile, ahead, groups, k_steps, v_steps, scale_log2);
  else
    attend_by<Row, R, false>(tile, ahead, groups, k_steps, v_steps, scale_log2);
}
}  // namespace wf::attention
