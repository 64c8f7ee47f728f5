// A panel of keys for groups of 16 query rows, by AMX's tiles: scores, softmax, weighted values.
//
// As in attend.h, a row's bits depend on its own q, keys and length only: each sum of a tile is one
// chain, and what a row does not see enters it as products with zero.
#pragma once
#include "tile_values.h"

namespace wf::attention {
#ifdef WF_TILE
using TileGroup = Group<TileRow, kTileRows>;

// What vectors do during the products of scores: bring the next panel, and soften what was scored
// before, which is there for up to two groups.
struct DuringScores {
  Softener soft[2];
  int64_t due = 0;  // calls with a step
  Fetch* fetch = nullptr;

  void operator()() {
    (*fetch)();
    for (int64_t i = 0; i < due; ++i) {
      Softener& next = soft[soft[0].more() ? 0 : 1];
      if (!next.more()) return;
      next();
    }
  }
  void finish() { soft[0].finish(), soft[1].finish(); }
};
// Begins to soften a group's scores `s` of the `n` keys from `first` on.
inline Softener soften(TileGroup& group, float* s, int first, int n, float scale) {
  const int keys = int(ceil_div(n, kStepKeys) * kStepKeys);
  if (!(scale > 0)) {  // of the maximum of scores comes the maximum of products
    for (int t = 0; t < n; ++t) store(s + t * kLanes, load(s + t * kLanes) * scale);
    scale = 1.0f;
  }
  if (group.least < first + keys) hide_keys(s, group.least - first, keys, group.seen, first);
  char* p = reinterpret_cast<char*>(group.s);
  return {s, keys, scale, p, p + first * kTileBytes / 2, group.state, group.factor};
}

// Weights of all groups, two at a time, 64 keys at a time.
inline void weigh_keys(const KeyBlocks& keys, int n, TileGroup* groups, int64_t count,
                       int64_t steps, float scale, Fetch& fetch) {
  alignas(64) float scores[2][2][kTile * kLanes];  // what is scored, what is softened
  const int64_t calls = score_steps(count == 1 ? 1 : 2, steps);
  DuringScores during;
  during.fetch = &fetch;
  during.due = ceil_div(2 * kTile / Softener::kAtOnce, calls);
  for (int64_t g = 0; g < count; ++g) groups[g].factor = set1(1.0f);
  int turn = 0;
  for (int64_t g = 0; g < count; g += 2) {
    const int all = g + 1 < count ? 2 : 1;
    const float* q[2] = {groups[g].q, groups[g + all - 1].q};
    auto* score = all == 2 ? score_keys<2, DuringScores> : score_keys<1, DuringScores>;
    for (int t = 0; t < n; t += kTile, turn ^= 1) {
      const int left = std::min(kTile, n - t);
      float* s[2] = {scores[turn][0], scores[turn][1]};
      score(keys + t / kBlockKeys, int(ceil_div(left, kBlockKeys)), q, steps, during, s);
      during.finish();
      for (int i = 0; i < all; ++i) during.soft[i] = soften(groups[g + i], s[i], t, left, scale);
    }
  }
  during.finish();
  for (int64_t g = 0; g < count; ++g) groups[g].rescaled = !all_one(groups[g].factor);
}

// A strip of values for a group whose rows see different numbers of keys, some of which hold inf or
// NaN: each row is computed with zeros for what it does not see.
inline void weigh_apart(const Panel& panel, int64_t step, const TileGroup& group, bool fresh,
                        float* o) {
  alignas(64) char strip[kStripBytes];
  alignas(64) float all[2 * kTileWords], one[2 * kTileWords];
  for (int r = 0; r < kTileRows; ++r) {
    std::memcpy(one, o, sizeof one);
    pair_values(panel, group.seen[r], step, strip);
    const float* p[1] = {group.s};
    float* to[1] = {one};
    Fetch none;
    weigh_strip<1>(p, strip, group.seen[r], fresh, none, to);
    for (int at = r * kLanes; at < 2 * kTileWords; at += kTileWords)
      std::memcpy(all + at, one + at, kTileBytes);
  }
  std::memcpy(o, all, sizeof all);
}

// Adds the values of a panel's first n keys.
inline void add_values(const Panel& panel, int n, TileGroup* groups, int64_t count, int64_t steps,
                       bool fresh, Fetch& fetch) {
  alignas(64) char strip[kStripBytes];
  for (int64_t g = 0; g < count && !fresh; ++g)
    if (groups[g].rescaled) rescale<kTileRows>(groups[g].o, steps, groups[g].factor);
  for (int64_t step = 0; step < steps; ++step) {
    pair_values(panel, n, step, strip);
    for (int64_t g = 0; g < count; g += 2) {
      const int all = g + 1 < count ? 2 : 1;
      const float* p[2] = {groups[g].s, groups[g + all - 1].s};
      float* o[2] = {groups[g].o + step * 2 * kTileWords,
                     groups[g + all - 1].o + step * 2 * kTileWords};
      auto* weigh = all == 2 ? weigh_strip<2> : weigh_strip<1>;
      weigh(p, strip, n, fresh, fetch, o);
    }
  }
}

// The same where groups must be taken row by row.
inline void add_values_apart(const Panel& panel, TileGroup* groups, int64_t count, int64_t steps,
                             bool fresh) {
  for (int64_t g = 0; g < count; ++g)
    for (int64_t step = 0; step < steps; ++step) {
      float* o = groups[g].o + step * 2 * kTileWords;
      if (!fresh && groups[g].rescaled) rescale<kTileRows>(o, 1, groups[g].factor);
      weigh_apart(panel, step, groups[g], fresh, o);
    }
}

// Adds a panel to groups, of which each sees a key of it. `fresh`: they hold nothing yet. `next`:
// the rows of the panel after this one, which come meanwhile.
inline void attend_panel(Panel& panel, Fetch next, TileGroup* groups, int64_t count,
                         int64_t k_steps, int64_t v_steps, float scale_log2, bool fresh) {
  int n = 0, least = kPanel;
  for (int64_t g = 0; g < count; ++g) {
    n = std::max(n, groups[g].most);
    least = std::min(least, groups[g].least);
  }
  panel.n = n;
  const KeyBlocks keys(panel, k_steps * kTileBytes);
  const int64_t pairs = ceil_div(count, 2), weighing = v_steps * ceil_div(n, kStepKeys);
  const int64_t scoring = ceil_div(n, kTile) * score_steps(count == 1 ? 1 : 2, k_steps);
  next.due = next.each(pairs * (scoring + weighing));
  weigh_keys(keys, n, groups, count, k_steps, scale_log2, next);
  if (least == n || all_finite(panel, least, n, v_steps))
    add_values(panel, n, groups, count, v_steps, fresh, next);
  else
    add_values_apart(panel, groups, count, v_steps, fresh);
}
#endif
// What must be there on a thread meanwhile.
struct Nothing {};
#ifdef WF_TILE
template <class Row>
using TilesOf = std::conditional_t<kTiles<Row>, Tiles, Nothing>;
#else
template <class Row>
using TilesOf = Nothing;
#endif
}  // namespace wf::attention
