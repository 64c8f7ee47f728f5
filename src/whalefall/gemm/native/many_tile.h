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
constexpr int64_t kFar = 8;                 // groups of x from which they are prefetched

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

// Four tiles of sums that are made together: 2 groups of W by 2 of x, or, of an odd last group of
// x, 4 by 1. Tile t of them is t % 2 and t / 2 steps from the first.
struct Shape {
  int64_t sums[2], w_scale[2], x_scale[2];
  template <int kWhich>
  static constexpr int64_t at(const int64_t (&step)[2]) {
    return kWhich % 2 * step[0] + kWhich / 2 * step[1];
  }
};

// Where a square's partial sums go, and their scales.
struct Square {
  float* sums;
  const float *w_scale, *x_scale;
  const Shape* shape;
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

// The squares of a product, one after the other. With an odd number of groups of x, W's groups must
// come in fours, else in twos.
template <int kLength>
class Squares {
 public:
  Squares(const TileSpace& space, const TileRows& x, int64_t first_group, int64_t end_group,
          int64_t w_groups)
      : space_(space), x_(x), first_(first_group), end_(end_group), w_groups_(w_groups) {
    waiting_ = {space.sums, kNoScales, kNoScales, &pair_};
    std::memset(space.sums, 0, (end_ - first_) * w_groups * kSums * sizeof(float));
  }
  int64_t squares_of(int64_t blocks) const { return blocks * (w_groups_ * (end_ - first_)) / 4; }
  // The panel, whose columns of K are `blocks` blocks from `block` on.
  void multiply(int64_t block, int64_t blocks, Ahead ahead);
  void finish();

 private:
  static constexpr int kParts = kBlock / kLength, kSteps = kLength / kTileHalves;
  // One tile of a square's partial sums, scaled, to its sums.
  template <int kWhich>
  static void add(const Square& square, const float* partial);
  template <int kWhich>
  static void begin(float* partial);
  template <bool kColumn>
  static void products(const uint16_t* w, const uint16_t* x, float* partial = nullptr);
  template <bool kColumn>
  static void run(const uint16_t* w, const uint16_t* x, float* partial, const Square& before);
  template <bool kColumn>
  Square parts(const uint16_t* w, const uint16_t* x, Square square, Square waiting) const;

  const TileSpace& space_;
  const TileRows& x_;
  const int64_t first_, end_, w_groups_;
  const Shape pair_{{w_groups_ * kSums, kSums}, {0, kGroup}, {kGroup, 0}};
  const Shape column_{{kSums, 2 * kSums}, {kGroup, 2 * kGroup}, {0, 0}};
  Square waiting_;  // in tiles
};

template <int kLength>
template <int kWhich>
__attribute__((always_inline)) inline void Squares<kLength>::add(const Square& square,
                                                                 const float* partial) {
  const Shape& shape = *square.shape;
  const vf x = load(square.x_scale + Shape::at<kWhich>(shape.x_scale));
  const float* w = square.w_scale + Shape::at<kWhich>(shape.w_scale);
  const float* from = partial + kWhich * kSums;
  float* to = square.sums + Shape::at<kWhich>(shape.sums);
#pragma GCC unroll 16
  for (int r = 0; r < kGroup; ++r, from += kLanes, to += kLanes)
    store(to, fma(load(from), broadcast(w + r) * x, load(to)));
}

// Tile kWhich of sums goes to `partial`, unless that is null, and starts anew.
template <int kLength>
template <int kWhich>
__attribute__((always_inline)) inline void Squares<kLength>::begin(float* partial) {
  if (!partial) return;
  store_tile<kWhich>(partial + kWhich * kSums, kTileBytes);
  zero_tile<kWhich>();
}

// 32 of K. Tiles 0 to 3 hold sums; what a product needs is loaded as late as may be.
template <int kLength>
template <bool kColumn>
__attribute__((always_inline)) inline void Squares<kLength>::products(const uint16_t* w,
                                                                      const uint16_t* x,
                                                                      float* partial) {
  load_tile<4>(w, kTileBytes);
  load_tile<6>(x, kTileBytes);
  begin<0>(partial);
  multiply_tile<0, 4, 6>();
  if constexpr (kColumn)
    load_tile<5>(w + kBlockValues, kTileBytes);
  else
    load_tile<7>(x + kBlockValues, kTileBytes);
  begin<1>(partial);
  if constexpr (kColumn)
    multiply_tile<1, 5, 6>();
  else
    multiply_tile<1, 4, 7>();
  if constexpr (kColumn)
    load_tile<7>(w + 2 * kBlockValues, kTileBytes);
  else
    load_tile<5>(w + kBlockValues, kTileBytes);
  begin<2>(partial);
  if constexpr (kColumn) {
    multiply_tile<2, 7, 6>();
    load_tile<4>(w + 3 * kBlockValues, kTileBytes);
  } else {
    multiply_tile<2, 5, 6>();
  }
  begin<3>(partial);
  if constexpr (kColumn)
    multiply_tile<3, 4, 6>();
  else
    multiply_tile<3, 5, 7>();
}

// The products of a square. What the tiles held before goes to `partial` and then to the sums of
// `before`. Vectors follow the products that they run beside.
template <int kLength>
template <bool kColumn>
__attribute__((always_inline)) inline void Squares<kLength>::run(const uint16_t* w,
                                                                 const uint16_t* x, float* partial,
                                                                 const Square& before) {
  products<kColumn>(w, x, partial);
#pragma GCC unroll 4
  for (int step = 1; step < 4; ++step) {
    if (step < kSteps) products<kColumn>(w + step * kTileValues, x + step * kTileValues);
    if (step == 1) add<0>(before, partial);
    if (step == 2) add<1>(before, partial);
  }
  add<2>(before, partial);
  add<3>(before, partial);
}

// All parts of a block of K of one square; `square` is that of the first part.
template <int kLength>
template <bool kColumn>
__attribute__((always_inline)) inline Square Squares<kLength>::parts(const uint16_t* w,
                                                                     const uint16_t* x,
                                                                     Square square,
                                                                     Square waiting) const {
  for (int part = 0; part < kParts; ++part) {
    constexpr int kValues = kSteps * kTileValues;
    run<kColumn>(w + part * kValues, x + part * kValues, space_.partial, waiting);
    waiting = square;
    square.w_scale += kPanelRows;
    if (x_.scales) square.x_scale += x_.groups * kGroup;
  }
  return waiting;
}

template <int kLength>
__attribute__((noinline)) void Squares<kLength>::multiply(int64_t block, int64_t blocks,
                                                          Ahead ahead) {
  const int64_t lines = ceil_div(ahead.lines(), squares_of(blocks));
  // a small x stays in L2
  const int64_t x_lines = end_ - first_ < kFar ? 0 : kQuad * kBlockValues / 32 / w_groups_;
  const float* w_scales = space_.scales_of(block * kBlock);
  Square waiting = waiting_;  // in registers: copies in memory wait for stores of tiles
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t quad = first_; quad < end_; quad += kQuad) {
      const bool turn = quad + kQuad >= end_;  // then x goes on with the next block
      const auto* soon = reinterpret_cast<const uint8_t*>(
          x_.block(block + b + turn, turn ? first_ : quad + kQuad));
      const int64_t stop = turn ? end_ : quad + kQuad;
      for (int64_t n = 0; n < w_groups_; n += 2)
        for (int64_t g = quad; g < stop; g += 2) {
          const bool column = g + 1 == end_;
          if (column && n % 4) continue;
          for (int64_t line = 0; line < x_lines; ++line, soon += 64) prefetch_l2(soon);
          ahead.bring(lines);
          const uint16_t* w = space_.panel + (b * w_groups_ + n) * kBlockValues;
          const uint16_t* x = x_.block(block + b, g);
          const Square square{space_.sums + ((g - first_) * w_groups_ + n) * kSums,
                              w_scales + b * kParts * kPanelRows + n * kGroup,
                              x_.scales ? x_.scale((block + b) * kParts, g) : kOnes,
                              column ? &column_ : &pair_};
          waiting =
              column ? parts<true>(w, x, square, waiting) : parts<false>(w, x, square, waiting);
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
  add<0>(waiting_, last), add<1>(waiting_, last);
  add<2>(waiting_, last), add<3>(waiting_, last);
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
  const int64_t first_group = x.group_of(first), end_group = x.group_of(last - 1) + 1;
  const bool odd = (end_group - first_group) % 2 != 0;
  const int64_t groups = round_up(ceil_div(end - n, kGroup), odd ? 4 : 2);
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
constexpr int64_t columns([[maybe_unused]] bool tiles) {
#ifdef WF_TILE
  if (tiles) return kPanelRows;
#endif
  return kColumns;
}
}  // namespace wf::gemm::many
