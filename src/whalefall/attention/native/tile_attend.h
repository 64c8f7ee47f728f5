// A panel of keys for groups of 16 query rows, by AMX's tiles: scores, softmax, weighted values.
//
// As in attend.h, a row's bits depend on its own q, keys and length only: each sum of a tile is one
// chain, and what a row does not see enters it as products with zero.
#pragma once
#include "tile_values.h"

namespace wf::attention {
#ifdef WF_TILE
using TileGroup = Group<TileRow, kTileRows>;

// What vectors do during the products of scores: bring the next panel, and soften the groups that
// were scored before.
struct DuringScores {
  Softener* soft = nullptr;  // two
  int64_t due = 0;           // calls of each of them with a step
  Fetch fetch;
  int64_t lines = 0;  // with a step

  void operator()() {
    fetch.lines(lines);
    for (int64_t i = 0; i < due; ++i) {
      Softener& next = soft[soft[0].more() ? 0 : 1];
      if (!next.more()) return;
      next();
    }
  }
};
// During those of values: bring, and pair the next strip.
struct DuringValues {
  Pairer pairer;
  int64_t due = 0;
  Fetch fetch;
  int64_t lines = 0;

  void operator()() {
    fetch.lines(lines);
    for (int64_t i = 0; i < due && pairer.more(); ++i) pairer();
  }
};
struct NothingElse {
  void operator()() const {}
};

// Begins to soften a group that was scored with `n` keys.
inline Softener soften(TileGroup& group, int n, float scale) {
  const int keys = int(ceil_div(n, kStepKeys) * kStepKeys);
  if (!(scale > 0)) {  // of the maximum of scores comes the maximum of products
    for (int t = 0; t < n; ++t) store(group.s + t * kLanes, load(group.s + t * kLanes) * scale);
    scale = 1.0f;
  }
  hide_keys(group.s, group.least, keys, group.seen);
  const Softener found(group.s, keys, scale, group.state, group.factor);
  group.rescaled = !all_one(group.factor);
  return found;
}

// Weights of all groups, two at a time.
inline void weigh_keys(const KeyBlocks& keys, int n, TileGroup* groups, int64_t count,
                       int64_t steps, float scale, const Fetch& next) {
  const int blocks = int(ceil_div(n, kBlockKeys));
  const int64_t calls = score_steps(blocks, count, steps), pairs = ceil_div(count, 2);
  Softener soft[2];
  DuringScores during;
  during.fetch = next, during.lines = next.each(calls * pairs);
  for (int64_t g = 0; g < count; g += 2) {
    const bool two = g + 1 < count;
    const float* q[2] = {groups[g].q, two ? groups[g + 1].q : nullptr};
    float* s[2] = {groups[g].s, two ? groups[g + 1].s : nullptr};
    auto* score = two ? panel_scores<2, DuringScores> : panel_scores<1, DuringScores>;
    score(keys, blocks, q, steps, during, s);
    if (g > 0) soft[0].finish(), soft[1].finish();
    for (int i = 0; i < 1 + two; ++i) soft[i] = soften(groups[g + i], n, scale);
    during.soft = soft;
    during.due = ceil_div(2 * ceil_div(n, kStepKeys) * kStepKeys / Softener::kAtOnce, calls);
    if (!two)
      soft[0].finish();
    else if (g + 2 >= count)
      soft[0].finish(), soft[1].finish();
  }
}

// A strip of values for a group whose rows see different numbers of keys, some of which hold inf or
// NaN: each row is computed with zeros for what it does not see.
inline void weigh_apart(const Panel& panel, int64_t step, const TileGroup& group, bool fresh,
                        float* o) {
  alignas(64) char strip[kStripBytes];
  alignas(64) float all[2 * kTileWords], one[2 * kTileWords];
  for (int r = 0; r < kTileRows; ++r) {
    std::memcpy(one, o, sizeof one);
    Pairer(panel, group.seen[r], step, strip).finish();
    const float* p[1] = {group.s};
    float* to[1] = {one};
    NothingElse nothing;
    weigh_strip<1, 1>(p, strip, group.seen[r], fresh, nothing, to);
    for (int at = r * kLanes; at < 2 * kTileWords; at += kTileWords)
      std::memcpy(all + at, one + at, kTileBytes);
  }
  std::memcpy(o, all, sizeof all);
}

// Adds the values of a panel's first n keys.
inline void add_values(const Panel& panel, int n, TileGroup* groups, int64_t count, int64_t steps,
                       bool fresh) {
  alignas(64) static thread_local char strips[2 * kStripBytes];
  auto strip = [](int64_t step) { return strips + step % 2 * kStripBytes; };
  // One group alone takes two strips at once; with more, the next strip is paired meanwhile.
  const int64_t wide = count == 1 ? 2 : 1, pairs = ceil_div(count, 2);
  DuringValues during;
  during.due = ceil_div(ceil_div(n, 8), pairs * ceil_div(n, kStepKeys));
  for (int64_t step = 0; step < steps; step += wide) {
    const int64_t width = std::min(wide, steps - step);
    if (wide == 2 || step == 0)
      for (int64_t i = step; i < step + width; ++i) Pairer(panel, n, i, strip(i)).finish();
    const bool more = wide == 1 && step + 1 < steps;
    during.pairer = more ? Pairer(panel, n, step + 1, strip(step + 1)) : Pairer();
    for (int64_t g = 0; g < count; g += 2) {
      const bool two = g + 1 < count;
      const float* p[2] = {groups[g].s, two ? groups[g + 1].s : nullptr};
      float* o[2] = {groups[g].o + step * 2 * kTileWords,
                     two ? groups[g + 1].o + step * 2 * kTileWords : nullptr};
      if (!fresh)
        for (int i = 0; i < 1 + two; ++i)
          if (groups[g + i].rescaled) rescale<kTileRows>(o[i], width, groups[g + i].factor);
      if (two)
        weigh_strip<2, 1>(p, strip(step), n, fresh, during, o);
      else if (width == 2)
        weigh_strip<1, 2>(p, strip(step), n, fresh, during, o);
      else
        weigh_strip<1, 1>(p, strip(step), n, fresh, during, o);
    }
    during.pairer.finish();
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
// the rows of the panel after this one.
inline void attend_panel(Panel& panel, const Fetch& next, TileGroup* groups, int64_t count,
                         int64_t k_steps, int64_t v_steps, float scale_log2, bool fresh) {
  int n = 0, least = kPanel;
  for (int64_t g = 0; g < count; ++g) {
    n = std::max(n, groups[g].most);
    least = std::min(least, groups[g].least);
  }
  panel.n = n;
  const KeyBlocks keys(panel, k_steps * kTileBytes);
  weigh_keys(keys, n, groups, count, k_steps, scale_log2, next);
  if (least == n || all_finite(panel, least, n, v_steps))
    add_values(panel, n, groups, count, v_steps, fresh);
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
