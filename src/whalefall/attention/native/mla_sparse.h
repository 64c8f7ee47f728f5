// MLA over chosen rows: each query token lists the rows it sees, in one cache or in two.
//
// An index names row `index % page` of page `index / page`. Whatever is out of range, and whatever
// stands behind a token's length, is no key; a row named twice counts twice.
#pragma once
#include "mla.h"

namespace wf::attention {
struct Chosen {
  Cache cache;
  const int32_t* indices;  // [tokens][topk]; null: there is no second cache
  int64_t index_token, topk;
  const int32_t* lengths;  // may be null; one for each `tokens_per_length` tokens
  int64_t tokens_per_length;

  int64_t listed(int64_t token) const {
    if (!indices) return 0;
    if (!lengths) return topk;
    return std::clamp<int64_t>(lengths[token / tokens_per_length], 0, topk);
  }
  // Calls use(row) for each key of a token.
  template <class Use>
  void each(int64_t token, Use use) const {
    const int32_t* index = indices + token * index_token;
    const int64_t rows = cache.blocks * cache.page;
    for (int64_t i = 0, n = listed(token); i < n; ++i)
      if (index[i] >= 0 && index[i] < rows)
        use(cache.row(index[i] / cache.page, index[i] % cache.page, 0));
  }
};

struct SparseArgs {
  const void* q;
  int64_t q_token, q_head;
  void* out;
  int64_t out_token, out_head;
  float *lse, *max_logits;  // may be null
  int64_t lse_token, lse_head;
  const float* sink;  // may be null; [heads]
  int64_t tokens, heads, width, v_width;
  Chosen main, extra;
  float scale, lonely_lse;
  Type q_type, out_type, cache_type;  // cache_type fp8: rows of 656 bytes, in both caches
};

template <class RowFormat, int R>
class SparseWork {
 public:
  using Row = RowFormat;
  static constexpr int kRows = R;

  explicit SparseWork(const SparseArgs& args) : args_(args), keys_(size_t(args.tokens)) {
    parallel_for(args.tokens, [&](int64_t t, int) {
      int64_t n = 0;
      for (const Chosen* chosen : {&args_.main, &args_.extra})
        if (chosen->indices) chosen->each(t, [&](const char*) { ++n; });
      keys_[size_t(t)] = n;
    });
  }
  int64_t k_width() const { return args_.width; }
  int64_t v_width() const { return args_.v_width; }
  float scale() const { return args_.scale; }
  const void* q() const { return args_.q; }
  Type q_type() const { return args_.q_type; }
  Output output() const {
    return {args_.out, args_.out_type, args_.lse, args_.max_logits, args_.sink, args_.lonely_lse};
  }

  std::vector<Block> blocks() const {
    std::vector<Block> found;
    int64_t rows = kTiles<Row> ? 128 : kDots<Row> || args_.cache_type == Type::fp8 ? 64 : 32;
    while (rows > std::max(R, 8) && args_.tokens * args_.heads < rows * num_threads()) rows /= 2;
    for (int64_t t = 0; t < args_.tokens; ++t)
      for (int64_t h = 0; h < args_.heads; h += rows) {
        Block b;
        b.token = t;
        b.tokens = 1;
        b.head = int(h);
        b.heads = int(std::min(rows, args_.heads - h));
        b.keys = keys_[size_t(t)];
        b.run_tiles = run_tiles<Row>(b.keys);
        b.rows = ceil_div(b.heads, R) * R;
        found.push_back(b);
      }
    return found;
  }

  void queries(const Block& block, Query* rows) const {
    for (int h = 0; h < block.rows; ++h) {
      const int head = block.head + std::min(h, block.heads - 1);
      *rows++ = {block.token * args_.q_token + head * args_.q_head,
                 block.token * args_.out_token + head * args_.out_head,
                 block.token * args_.lse_token + head * args_.lse_head,
                 block.keys,
                 head,
                 h < block.heads};
    }
  }

  class Source {
   public:
    Source(const SparseArgs& args, const Block& block)
        : expander_(args.width, args.v_width, args.cache_type == Type::fp8, true) {
      rows_.reserve(size_t(block.keys));
      for (const Chosen* chosen : {&args.main, &args.extra})
        if (chosen->indices)
          chosen->each(block.token, [&](const char* row) { rows_.push_back(row); });
    }
    template <int Keys>
    void fill(int64_t tile, KeyRows<Keys>& to) const {
      for (int t = 0; t < to.n; ++t) to.k[t] = to.v[t] = rows_[size_t(tile * Keys + t)];
    }
    bool in_place() const { return !expander_.needed(); }
    template <int Keys>
    void expand(KeyRows<Keys>& tile) const {
      expander_(tile);
    }
    int64_t k_bytes() const { return expander_.k_bytes(); }
    int64_t v_bytes() const { return expander_.v_bytes(); }

   private:
    std::vector<const char*> rows_;
    const Expander<Row> expander_;
  };
  Source source(const Block& block) const { return {args_, block}; }

 private:
  const SparseArgs& args_;
  std::vector<int64_t> keys_;
};

template <class Row, int R>
void sparse_attention(const SparseArgs& args) {
  Runner(SparseWork<Row, R>(args)).run();
}
}  // namespace wf::attention
