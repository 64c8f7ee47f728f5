// A panel of keys for groups of 16 query rows, by AMX's tiles: scores, softmax, weighted values.
//
// As in attend.h, a row's bits depend on its own q, keys and length only: each sum of a tile is one
// chain, and what a row does not see enters it as products with zero.
#pragma once
#include "tile_values.h"

namespace wf::attention {
#ifdef WF_TILE
using TileGroup = Group<TileRow, kTileRows>;

// The scores of all groups, two at a time.
inline void score_panel(const KeyBlocks& keys, int n, const TileGroup* groups, int64_t count,
                        int64_t steps, Fetch fetch) {
  const int blocks = int(ceil_div(n, kBlockKeys));
  const int64_t halves_of_q =
      count > 1 ? ceil_div(blocks, 2) * ceil_div(count, 2) : ceil_div(blocks, 4);
  const int64_t each = fetch.each(halves_of_q * steps);
  for (int64_t g = 0; g < count; g += 2) {
    const bool two = g + 1 < count;
    const float* q[2] = {groups[g].q, two ? groups[g + 1].q : nullptr};
    float* s[2] = {groups[g].s, two ? groups[g + 1].s : nullptr};
    auto* score = two ? panel_scores<2> : panel_scores<1>;
    score(keys, blocks, q, steps, fetch, each, s);
  }
}

// Weights of one group, for keys up to a multiple of 32.
inline void soften_group(TileGroup& group, int n, float scale) {
  const int keys = int(ceil_div(n, kStepKeys) * kStepKeys);
  if (!(scale > 0)) {  // of the maximum of scores comes the maximum of products
    for (int t = 0; t < n; ++t) store(group.s + t * kLanes, load(group.s + t * kLanes) * scale);
    scale = 1.0f;
  }
  hide_keys(group.s, group.least, keys, group.seen);
  group.factor = soften_panel(group.s, keys, scale, group.state);
  group.rescaled = !all_one(group.factor);
}

// A strip of values for a group whose rows see different numbers of keys, some of which hold inf or
// NaN: each row is computed with zeros for what it does not see.
inline void weigh_apart(const Panel& panel, int n, int64_t step, const TileGroup& group, bool fresh,
                        float* o) {
  alignas(64) char strip[kStripBytes];
  alignas(64) float all[2 * kTileSize / 4], one[2 * kTileSize / 4];
  for (int r = 0; r < kTileRows; ++r) {
    std::memcpy(one, o, sizeof one);
    pair_values(panel, group.seen[r], step, strip);
    const float* p[1] = {group.s};
    float* to[1] = {one};
    const int keys = int(ceil_div(group.seen[r], kStepKeys) * kStepKeys);
    weigh_strip<1, 1>(p, strip, keys, fresh, to);
    for (int half = 0; half < 2; ++half)
      std::memcpy(all + (half * kTileRows + r) * kLanes, one + (half * kTileRows + r) * kLanes,
                  kTileBytes);
  }
  std::memcpy(o, all, sizeof all);
}

// Adds a panel to groups, of which each sees a key of it. `fresh`: they hold nothing yet.
inline void attend_panel(Panel& panel, const Fetch& next, TileGroup* groups, int64_t count,
                         int64_t k_steps, int64_t v_steps, float scale_log2, bool fresh) {
  alignas(64) static thread_local char strips[2 * kStripBytes];
  int n = 0;
  for (int64_t g = 0; g < count; ++g) n = std::max(n, groups[g].most);
  panel.n = n;
  const KeyBlocks keys(panel, k_steps * kTileBytes);
  score_panel(keys, n, groups, count, k_steps, next);
  bool apart = false;
  for (int64_t g = 0; g < count; ++g) {
    soften_group(groups[g], n, scale_log2);
    apart = apart || groups[g].least < n;
  }
  if (apart) {
    int least = n;
    for (int64_t g = 0; g < count; ++g) least = std::min(least, groups[g].least);
    apart = !all_finite(panel, least, n, v_steps);
  }
  const int whole = int(ceil_div(n, kStepKeys) * kStepKeys);
  const int64_t wide = count == 1 && !apart ? 2 : 1;
  for (int64_t step = 0; step < v_steps; step += wide) {
    const int64_t width = std::min(wide, v_steps - step);
    if (!apart)
      for (int64_t i = 0; i < width; ++i) pair_values(panel, n, step + i, strips + i * kStripBytes);
    for (int64_t g = 0; g < count; g += 2) {
      const bool two = g + 1 < count;
      const float* p[2] = {groups[g].s, two ? groups[g + 1].s : nullptr};
      float* o[2] = {groups[g].o + step * 2 * kTileSize / 4,
                     two ? groups[g + 1].o + step * 2 * kTileSize / 4 : nullptr};
      for (int i = 0; i < 1 + two && !fresh; ++i)
        if (groups[g + i].rescaled) rescale<kTileRows>(o[i], width, groups[g + i].factor);
      if (apart)
        for (int i = 0; i < 1 + two; ++i) weigh_apart(panel, n, step, groups[g + i], fresh, o[i]);
      else if (two)
        weigh_strip<2, 1>(p, strips, whole, fresh, o);
      else if (width == 2)
        weigh_strip<1, 2>(p, strips, whole, fresh, o);
      else
        weigh_strip<1, 1>(p, strips, whole, fresh, o);
    }
  }
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
