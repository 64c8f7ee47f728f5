// Scores of a panel of keys by AMX's tiles, transposed: s[key][row] = k_key . q_row.
//
// A stored row of K is a row of a tile as it stands, so K is neither copied nor transposed; q is
// packed once a task, [step][pair of columns][row][2], as the second operand wants it. Two blocks
// of 16 keys and two groups of 16 rows at a time keep four sums in tiles, which hides a product's
// latency and loads one tile a product.
#pragma once
#include "arena.h"
#include "attend.h"
#include "whalefall/tile.h"

namespace wf::attention {
#ifdef WF_TILE
using Panel = KeyRows<kPanel>;
constexpr int kBlockKeys = kTileRows, kTileSize = kTileRows * kTileBytes;
constexpr int kTileWords = kTileSize / 4;

// 16 keys whose rows stand at equal distances.
struct KeyBlock {
  const char* rows;
  int64_t pitch;
};

// The blocks of a panel. Rows that do not stand at equal distances, and the last ones where they
// are fewer than 16, are copied; the rows of a copy that are no keys hold what was there before.
class KeyBlocks {
 public:
  KeyBlocks(Panel& panel, int64_t row_bytes) {
    for (int t = 0; t < panel.n; t += kBlockKeys) {
      const char* first = static_cast<const char*>(panel.k[t]);
      const int count = std::min(kBlockKeys, panel.n - t);
      const int64_t pitch = count > 1 ? static_cast<const char*>(panel.k[t + 1]) - first : 0;
      bool even = count == kBlockKeys;
      for (int i = 2; even && i < count; ++i) even = panel.k[t + i] == first + i * pitch;
      blocks_[t / kBlockKeys] = even ? KeyBlock{first, pitch} : copy(panel, t, count, row_bytes);
    }
  }
  const KeyBlock* operator+(int64_t block) const { return blocks_ + block; }

 private:
  static KeyBlock copy(Panel& panel, int first, int count, int64_t row_bytes) {
    static thread_local Arena arena;
    const int64_t pitch = ceil_div(row_bytes, kTileBytes) * kTileBytes;
    char* to = reinterpret_cast<char*>(arena.floats(kPanel * pitch / 4)) + first * pitch;
    for (int i = 0; i < count; ++i) {
      char* row = to + i * pitch;
      std::memcpy(row, panel.k[first + i], size_t(row_bytes));
      panel.k[first + i] = panel.v[first + i] = row;
    }
    return {to, pitch};
  }
  KeyBlock blocks_[kPanel / kBlockKeys];
};

// q of 16 rows as the second operand: for each step of 32 columns a tile [pair][row][2].
inline void transpose_tile(__m512i* rows) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // lane l of t[4 i + c]: column 4 l + c of rows 4 i … 4 i + 3
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xDD);
    const __m512i d = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xDD);
    rows[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(a, d, 0xDD);
    rows[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(b, e, 0xDD);
  }
}
inline void pack_tiles(const void* q, Type type, const int64_t* rows, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += kStep, to += kTileWords) {
    __m512i row[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      vf x, y;
      read_plain(q, type, rows[r] + i, std::min<int64_t>(kStep, width - i), x, y);
      row[r] = to_halves(x, y);
    }
    transpose_tile(row);
    for (int r = 0; r < kTileRows; ++r) _mm512_store_si512(to + r * kLanes, row[r]);
  }
}

// `Blocks` x `Groups` tiles of sums, at most four. `meanwhile` is called with every step.
template <int Blocks, int Groups, class Meanwhile>
inline void score_blocks(const KeyBlock* k, const float* const* q, int64_t steps,
                         Meanwhile& meanwhile, float* const* s) {
  constexpr bool kTwo = Groups == 2, kFour = Blocks == 4;
  static_assert(!kTwo || !kFour);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step * kTileBytes;
    load_tile<4>(k[0].rows + at, k[0].pitch);
    if constexpr (Blocks > 1) load_tile<5>(k[1].rows + at, k[1].pitch);
    load_tile<6>(q[0] + step * kTileWords, kTileBytes);
    if constexpr (kTwo) load_tile<7>(q[1] + step * kTileWords, kTileBytes);
    multiply_tile<0, 4, 6>();
    if constexpr (kTwo) multiply_tile<1, 4, 7>();
    if constexpr (Blocks > 1) multiply_tile<Groups, 5, 6>();
    if constexpr (Blocks > 1 && kTwo) multiply_tile<3, 5, 7>();
    if constexpr (kFour) {
      load_tile<4>(k[2].rows + at, k[2].pitch);
      load_tile<5>(k[3].rows + at, k[3].pitch);
      multiply_tile<2, 4, 6>();
      multiply_tile<3, 5, 6>();
    }
    meanwhile();
  }
  store_tile<0>(s[0], kTileBytes);
  if constexpr (kTwo) store_tile<1>(s[1], kTileBytes);
  if constexpr (Blocks > 1) store_tile<Groups>(s[0] + kTileWords, kTileBytes);
  if constexpr (Blocks > 1 && kTwo) store_tile<3>(s[1] + kTileWords, kTileBytes);
  if constexpr (kFour) store_tile<2>(s[0] + 2 * kTileWords, kTileBytes);
  if constexpr (kFour) store_tile<3>(s[0] + 3 * kTileWords, kTileBytes);
}

// Scores of one or two groups with up to 64 keys, `blocks` blocks of them, [key][row] each.
// score_steps(…) steps.
template <int Groups, class Meanwhile>
__attribute__((noinline)) void score_keys(const KeyBlock* k, int blocks, const float* const* q,
                                          int64_t steps, Meanwhile& meanwhile,
                                          float* const* scores) {
  constexpr int kAtOnce = 4 / Groups;
  float* s[2] = {scores[0], scores[Groups - 1]};
  int block = 0;
  for (; block + kAtOnce <= blocks; block += kAtOnce) {
    score_blocks<kAtOnce, Groups>(k + block, q, steps, meanwhile, s);
    s[0] += kAtOnce * kTileWords, s[1] += kAtOnce * kTileWords;
  }
  for (; block < blocks; ++block) {
    score_blocks<1, Groups>(k + block, q, steps, meanwhile, s);
    s[0] += kTileWords, s[1] += kTileWords;
  }
}
// Steps of `score_keys` with 64 keys.
inline int64_t score_steps(int groups, int64_t steps) {
  return kTile / kBlockKeys * groups / 4 * steps;
}
#endif
}  // namespace wf::attention
