// The many form with AMX: y^T = W . x^T in squares of 2 x 2 tiles, 32 rows of W by 32 of x.
//
// A panel of W, kPanelRows rows by kPanelDepth of K, is decoded into tiles (256 KB: L2). For each
// 128 of K, 64 rows of x (16 KB: L1) meet one pair of W's groups after the other (8 KB, from L2).
// The 16 products of a square are its partial sums; they are stored to L1, and while the next
// square's products run, vectors scale them and add them to the fp32 sums, which lie in L2. The x
// and W of later are prefetched meanwhile, a few lines a square. Each sum is one chain over k
// within a block, then one over blocks, as in the other paths. Bound: what L2 delivers, then
// products.
#pragma once
#include "tile_rows.h"

namespace wf::gemm::many {
#ifdef WF_TILE
constexpr int64_t kPanelRows = 256, kPanelDepth = 512;
constexpr int64_t kSums = kGroup * kGroup;  // floats of a tile of sums: [row of W][row of x]
constexpr int64_t kQuad = 4;                // groups of x that stay in L1
constexpr int64_t kMostLines = 16;          // of x, prefetched in one square

// Lines of rows of W that the thread decodes next: brought into L2, a few at a time.
class Ahead {
 public:
  Ahead(const uint8_t* first, int64_t pitch, int64_t rows, int64_t bytes)
      : at_(first), pitch_(pitch), bytes_(bytes), left_(first ? rows : 0) {}
  int64_t lines() const { return left_ * ceil_div(bytes_, 64); }
  void bring(int64_t lines) {
    for (; lines > 0 && left_ > 0; --lines) {
      prefetch_l2(at_ + done_);
      if ((done_ += 64) >= bytes_) at_ += pitch_, --left_, done_ = 0;
    }
  }

 private:
  const uint8_t* at_;
  int64_t pitch_, bytes_, left_, done_ = 0;
};

// Where a square's partial sums go, and their scales.
struct Square {
  float* sums;                     // of the first group of W and of x
  const float *w_scale, *x_scale;  // of two groups
};

// A thread's memory.
struct TileSpace {
  static constexpr int64_t kScales = kPanelRows * kPanelDepth / 32;
  uint16_t* panel;  // [K / 128][groups][4] tiles
  float* scales;    // [blocks][kPanelRows] of an even panel, then of an odd one
  float* sums;      // [groups of x][groups of W][16][16]
  float* partial;   // of a square
  float* rows;      // of 16 rows of y
  TileSpace() {
    static thread_local Scratch memory;
    constexpr int64_t kPanel = kPanelRows * kPanelDepth / 2;  // floats
    panel = memory.get<uint16_t>(
        2 * (kPanel + 2 * kScales + (kChunkRows + kGroup) * kPanelRows + 4 * kSums));
    scales = reinterpret_cast<float*>(panel) + kPanel;
    sums = scales + 2 * kScales;
    partial = sums + kChunkRows * kPanelRows;
    rows = partial + 4 * kSums;
  }
  // Those of the panel before are still wanted while the next one is decoded.
  float* scales_of(int64_t k) const { return scales + k / kPanelDepth % 2 * kScales; }
};

alignas(64) constexpr float kOnes[2 * kGroup] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(64) constexpr float kNoScales[2 * kGroup] = {};

// The squares of a product, one after the other. An odd group of x is multiplied twice; what the
// second time gives goes where no row is.
template <int kLength>
class Squares {
 public:
  Squares(const TileSpace& space, const TileRows& x, int64_t first_group, int64_t end_group,
          int64_t w_groups)
      : space_(space), x_(x), first_(first_group), end_(end_group), w_groups_(w_groups) {
    waiting_ = {space.sums, kNoScales, kNoScales};
    std::memset(space.sums, 0, round_up(end_ - first_, 2) * w_groups * kSums * sizeof(float));
  }
  int64_t squares_of(int64_t blocks) const {
    return blocks * (w_groups_ / 2) * ceil_div(end_ - first_, 2);
  }
  // The panel, whose columns of K are `blocks` blocks from `block` on.
  void multiply(int64_t block, int64_t blocks, Ahead ahead);
  void finish();

 private:
  static constexpr int kParts = kBlock / kLength, kSteps = kLength / kTileHalves;
  // One tile of a square's partial sums, scaled, to its sums; x's second group's are `second` on.
  template <int kWhich>
  static void add(const Square& square, const float* partial, int64_t second);
  static void run(const uint16_t* w, const uint16_t* x, int64_t second_x, float* partial,
                  const Square& before, int64_t second);

  const TileSpace& space_;
  const TileRows& x_;
  const int64_t first_, end_, w_groups_;
  Square waiting_;  // in tiles
};

template <int kLength>
template <int kWhich>
__attribute__((always_inline)) inline void Squares<kLength>::add(const Square& square,
                                                                 const float* partial,
                                                                 int64_t second) {
  const vf x = load(square.x_scale + kWhich % 2 * kGroup);
  const float* w = square.w_scale + kWhich / 2 * kGroup;
  const float* from = partial + kWhich * kSums;
  float* to = square.sums + kWhich % 2 * second + kWhich / 2 * kSums;
#pragma GCC unroll 16
  for (int r = 0; r < kGroup; ++r, from += kLanes, to += kLanes)
    store(to, fma(load(from), broadcast(w + r) * x, load(to)));
}

// The products of a square. What the tiles held before goes to `partial` and then to the sums of
// `before`. Vectors follow the products that they run beside.
template <int kLength>
__attribute__((always_inline)) inline void Squares<kLength>::run(const uint16_t* w,
                                                                 const uint16_t* x,
                                                                 int64_t second_x, float* partial,
                                                                 const Square& before,
                                                                 int64_t second) {
  const uint16_t *w2 = w + kBlockValues, *x2 = x + second_x;
  load_tile<4>(w, kTileBytes);
  load_tile<6>(x, kTileBytes);
  store_tile<0>(partial, kTileBytes);
  zero_tile<0>();
  multiply_tile<0, 4, 6>();
  load_tile<7>(x2, kTileBytes);
  store_tile<1>(partial + kSums, kTileBytes);
  zero_tile<1>();
  multiply_tile<1, 4, 7>();
  load_tile<5>(w2, kTileBytes);
  store_tile<2>(partial + 2 * kSums, kTileBytes);
  zero_tile<2>();
  multiply_tile<2, 5, 6>();
  store_tile<3>(partial + 3 * kSums, kTileBytes);
  zero_tile<3>();
  multiply_tile<3, 5, 7>();
#pragma GCC unroll 4
  for (int step = 1; step < 4; ++step) {
    if (step < kSteps) {
      load_tile<4>(w + step * kTileValues, kTileBytes);
      load_tile<6>(x + step * kTileValues, kTileBytes);
      multiply_tile<0, 4, 6>();
      load_tile<7>(x2 + step * kTileValues, kTileBytes);
      multiply_tile<1, 4, 7>();
      load_tile<5>(w2 + step * kTileValues, kTileBytes);
      multiply_tile<2, 5, 6>();
      multiply_tile<3, 5, 7>();
    }
    if (step == 1) add<0>(before, partial, second);
    if (step == 2) add<1>(before, partial, second);
  }
  add<2>(before, partial, second);
  add<3>(before, partial, second);
}

template <int kLength>
__attribute__((noinline)) void Squares<kLength>::multiply(int64_t block, int64_t blocks,
                                                          Ahead ahead) {
  const int64_t lines = ceil_div(ahead.lines(), squares_of(blocks));
  const float* scales = space_.scales_of(block * kBlock);
  int64_t x_lines = kQuad * kBlockValues / kTileHalves / w_groups_;
  if (x_lines > kMostLines) x_lines = kMostLines;
  const int64_t second = w_groups_ * kSums;
  float* const partial = space_.partial;
  Square waiting = waiting_;  // in registers: copies in memory wait for stores of tiles
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t quad = first_; quad < end_; quad += kQuad) {
      const bool turn = quad + kQuad >= end_;  // then x goes on with the next block
      const auto* soon = reinterpret_cast<const uint8_t*>(
          x_.block(block + b + turn, turn ? first_ : quad + kQuad));
      for (int64_t n = 0; n < w_groups_; n += 2)
        for (int64_t g = quad; g < quad + kQuad && g < end_; g += 2) {
          for (int64_t line = 0; line < x_lines; ++line, soon += 64) prefetch_l2(soon);
          ahead.bring(lines);
          const uint16_t* w = space_.panel + (b * w_groups_ + n) * kBlockValues;
          const uint16_t* x = x_.block(block + b, g);
          float* sums = space_.sums + ((g - first_) * w_groups_ + n) * kSums;
          for (int part = 0; part < kParts; ++part) {
            run(w + part * kSteps * kTileValues, x + part * kSteps * kTileValues,
                g + 1 < end_ ? kBlockValues : 0, partial, waiting, second);
            const int64_t in_panel = b * kParts + part, in_x = (block + b) * kParts + part;
            waiting = {sums, scales + in_panel * kPanelRows + n * kGroup,
                       x_.scales ? x_.scale(in_x, g) : kOnes};
          }
        }
    }
  waiting_ = waiting;
}

template <int kLength>
void Squares<kLength>::finish() {
  float* last = space_.partial;
  store_tile<0>(last, kTileBytes);
  store_tile<1>(last + kSums, kTileBytes);
  store_tile<2>(last + 2 * kSums, kTileBytes);
  store_tile<3>(last + 3 * kSums, kTileBytes);
  const int64_t second = w_groups_ * kSums;
  add<0>(waiting_, last, second), add<1>(waiting_, last, second);
  add<2>(waiting_, last, second), add<3>(waiting_, last, second);
}

// `groups` groups of rows of W from n on, K in [k, k + depth), as a panel.
template <int kKind, int kLength, class Source>
__attribute__((noinline)) void decode_panel(const Source& w, int64_t n, int64_t groups, int64_t k,
                                            int64_t depth, const TileSpace& space) {
  const RowDecoder<kKind, kLength == kBlock> decode;
  const int64_t real_blocks = ceil_div(depth, kLength), blocks = round_up(depth, kBlock) / kLength;
  float* const scales = space.scales_of(k);
  RowBlock<kKind> block;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = n + g * kGroup, next = first + kGroup;
    const int64_t ahead = next < w.rows() ? w.at(next, k) - w.at(first, k) : 0;
    uint16_t* tiles = space.panel + g * kBlockValues;
    for (int64_t b = 0; b < depth; b += kBlock, tiles += groups * kBlockValues) {
      block.find(w, first, k + b, ahead);
      for (int r = 0; r < kGroup; ++r) decode(block.row[r], r, tiles);
    }
    for (int64_t r = 0; r < kGroup; ++r) {
      const bool real = first + r < w.rows();
      const ScaleRow row = w.scales(real ? first + r : n);
      for (int64_t b = 0; b < blocks; ++b)
        scales[b * kPanelRows + g * kGroup + r] =
            real && b < real_blocks ? row[k / kLength + b] : 0.0f;
    }
  }
}

// emit(m, y[m, n..end)) for the rows [first, last) of x; at most kChunkRows by kPanelRows, and
// `first` starts a group. `next`: what the thread decodes after this, or null.
template <int kKind, int kLength, class Source, class Emit>
void multiply_tiles(const Source& w, int64_t n, int64_t end, const TileRows& x, int64_t first,
                    int64_t last, const uint8_t* next, Emit&& emit) {
  const TileSpace space;
  const Tiles tiles;
  const int64_t groups = round_up(ceil_div(end - n, kGroup), 2);
  const int64_t first_group = x.group_of(first), end_group = x.group_of(last - 1) + 1;
  Squares<kLength> squares(space, x, first_group, end_group, groups);
  for (int64_t k = 0; k < w.cols(); k += kPanelDepth) {
    const int64_t left = w.cols() - k, depth = left < kPanelDepth ? left : kPanelDepth;
    decode_panel<kKind, kLength>(w, n, groups, k, depth, space);
    const uint8_t* then = depth < left ? w.at(n, k + depth) : next;
    const int64_t pitch = w.in_place() ? w.at(n + 1, k) - w.at(n, k) : 0;
    const Ahead ahead(pitch ? then : nullptr, pitch, end - n, depth * kind_bytes(kKind));
    squares.multiply(k / kBlock, ceil_div(depth, kBlock), ahead);
  }
  squares.finish();
  for (int64_t m = first; m < last; ++m) {
    const int64_t r = (m - first) % kGroup;
    const float* sums = space.sums + (m - first) / kGroup * groups * kSums;
    for (int64_t g = 0; r == 0 && g < groups; ++g, sums += kSums) {
      vf square[kGroup];
      for (int i = 0; i < kGroup; ++i) square[i] = load(sums + i * kLanes);
      transpose(square);
      for (int i = 0; i < kGroup; ++i) store(space.rows + i * kPanelRows + g * kGroup, square[i]);
    }
    emit(m, space.rows + r * kPanelRows);
  }
}
#endif

// Rows of W of one task: a panel's.
constexpr int64_t columns(bool tiles) {
#ifdef WF_TILE
  if (tiles) return kPanelRows;
#endif
  return tiles ? 0 : kColumns;
}
}  // namespace wf::gemm::many
