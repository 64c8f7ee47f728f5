// Rows of x made tiles (`TileRows`), and rows of W: what AMX multiplies.
//
// W is the product's left tile: 16 rows, 32 of K side by side, as codes are decoded; x is the right
// one, pairs of K by rows of x. So W, which is decoded for each product, needs no transposing, and
// x, which does, is made tiles once for all of W.
#pragma once
#include <vector>
#include "panel.h"
#include "whalefall/tile.h"

namespace wf::gemm {
// Rows [first, last) of an x.
struct RowSet {
  int64_t first, last;
  TileRows tiles;
};

#ifdef WF_TILE
constexpr bool kHalves = true;
constexpr int kGroup = wf::kTileRows;                         // rows of W or x in a tile
constexpr int kTileValues = wf::kTileRows * wf::kTileHalves;  // bf16
constexpr int kBlockTiles = TileRows::kTilesOfBlock;
constexpr int kBlockValues = kBlockTiles * kTileValues;  // of 16 rows over a block of K

// A block of K of 16 rows as `width` rows of four tiles. get(r, k, first, second): 64 values of K
// of row r, as two vectors.
template <class Get>
inline void pack_tiles(Get&& get, int64_t width, uint16_t* out) {
  const __mmask16 used = __mmask16((1u << width) - 1);
  for (int k = 0; k < kBlock; k += 64) {
    vf tiles[2][kLanes];
    for (int r = 0; r < kLanes; ++r) {
      halves first, second;
      get(r, k, first, second);
      tiles[0][r] = (vf)first, tiles[1][r] = (vf)second;
    }
    for (auto& tile : tiles) {
      many::transpose(tile);
      for (int pair = 0; pair < kLanes; ++pair, out += 2 * width)
        _mm512_mask_storeu_ps(out, used, (__m512)tile[pair]);
    }
  }
}
// Of rows of 128 bf16; if `deal`, each 64 in the order of Fp8Decoder.
inline void pack_block(const uint16_t* const* row, bool deal, int64_t width, uint16_t* out) {
  auto get = [&](int r, int k, halves& first, halves& second) {
    first = load_halves(row[r] + k), second = load_halves(row[r] + k + 32);
    if (deal) deal_halves(first, second, first, second);
  };
  pack_tiles(get, width, out);
}
// Of rows of 128 codes of E4M3, in the order of Fp8Decoder.
inline void pack_codes(const uint8_t* const* row, uint16_t* out) {
  const Fp8Decoder decode;
  auto get = [&](int r, int k, halves& first, halves& second) {
    decode(load_halves(row[r] + k), first, second);
  };
  pack_tiles(get, kGroup, out);
}

// `count` rows of `cols` bf16 as one group; the blocks of K are `stride` values apart.
inline void pack_group(const uint16_t* const* row, int64_t count, int64_t cols, bool deal,
                       int64_t width, uint16_t* out, int64_t stride) {
  alignas(64) uint16_t edge[kGroup][kBlock];
  std::memset(edge, 0, sizeof edge);
  for (int64_t k = 0; k < cols; k += kBlock, out += stride) {
    const uint16_t* at[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      at[r] = edge[r];
      if (r >= count) continue;
      if (cols - k >= kBlock) {
        at[r] = row[r] + k;
      } else {
        std::memset(edge[r], 0, sizeof edge[r]);
        std::memcpy(edge[r], row[r] + k, (cols - k) * 2);
      }
    }
    pack_block(at, deal, width, out);
  }
}

// Makes sets of rows tiles; they stay until the next call.
class TileMaker {
 public:
  void make(const Rows& rows, int64_t cols, bool deal, bool few, RowSet* sets, int64_t count) {
    const int64_t blocks = ceil_div(cols, kBlock);
    starts_.clear();
    int64_t groups = 0, width_sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t size = sets[i].last - sets[i].first;
      TileRows& tiles = sets[i].tiles;
      tiles.first = sets[i].first;
      tiles.groups = ceil_div(size, kGroup);
      tiles.width = few && size < kGroup ? size : kGroup;
      starts_.push_back(groups);
      groups += tiles.groups;
      width_sum += tiles.groups * tiles.width;
    }
    uint16_t* values = values_.get<uint16_t>(width_sum * blocks * kBlock + 1);
    float* scales = scales_.get<float>(width_sum * blocks + 1);
    for (int64_t i = 0; i < count; ++i) {
      TileRows& tiles = sets[i].tiles;
      tiles.values = values;
      tiles.scales = rows.scale ? scales : nullptr;
      values += tiles.groups * tiles.width * blocks * kBlock;
      scales += tiles.groups * tiles.width * blocks;
    }
    parallel_for(groups, [&](int64_t task, int) {
      int64_t i = 0;
      while (i + 1 < count && starts_[i + 1] <= task) ++i;
      make_group(rows, cols, deal, sets[i], task - starts_[i]);
    });
  }

 private:
  static void make_group(const Rows& rows, int64_t cols, bool deal, const RowSet& set, int64_t g) {
    const TileRows& tiles = set.tiles;
    const int64_t first = set.first + g * kGroup, left = set.last - first;
    const int64_t count = left < kGroup ? left : kGroup, width = tiles.width;
    const uint16_t* row[kGroup];
    for (int64_t r = 0; r < count; ++r) row[r] = rows.half_row(first + r);
    pack_group(row, count, cols, deal, width, const_cast<uint16_t*>(tiles.block(0, g)),
               tiles.groups * kBlock * width);
    if (!rows.scale) return;
    for (int64_t b = 0; b < ceil_div(cols, kBlock); ++b) {
      float* to = const_cast<float*>(tiles.scale(b, g));
      for (int64_t r = 0; r < width; ++r) to[r] = r < count ? rows.row_scale(first + r)[b] : 0.0f;
    }
  }

  Scratch values_, scales_;
  std::vector<int64_t> starts_;  // the first group of each set
};

// Makes 128 of K of a row of W row r of four tiles; FP8 even and odd apart, or, with kDeal false,
// in order.
template <int kKind, bool kDeal = true>
struct RowDecoder;
template <bool kDeal>
struct RowDecoder<kFp8, kDeal> {
  Fp8Decoder decode;
  void operator()(const uint8_t* codes, int r, uint16_t* tiles) const {
#pragma GCC unroll 2
    for (int i = 0; i < kBlock / 64; ++i) {
      halves a, b;
      decode(load_halves(codes + 64 * i), a, b);
      if (!kDeal) {
        alignas(64) uint16_t in_order[64];
        undeal_halves(a, b, in_order);
        a = load_halves(in_order), b = load_halves(in_order + 32);
      }
      _mm512_store_si512(tiles + 2 * i * kTileValues + r * kTileHalves, a);
      _mm512_store_si512(tiles + (2 * i + 1) * kTileValues + r * kTileHalves, b);
    }
  }
};
template <bool kDeal>
struct RowDecoder<kBf16, kDeal> {
  void operator()(const uint8_t* codes, int r, uint16_t* tiles) const {
#pragma GCC unroll 4
    for (int i = 0; i < kBlockTiles; ++i)
      _mm512_store_si512(tiles + i * kTileValues + r * kTileHalves, load_halves(codes + 64 * i));
  }
};
#else
constexpr bool kHalves = kDot;
struct TileMaker {
  void make(const Rows&, int64_t, bool, bool, RowSet*, int64_t) {}
};
#endif
}  // namespace wf::gemm
