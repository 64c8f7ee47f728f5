// MLA over paged latent rows, absorbed form: every query head reads the same rows, K whole, V their
// first `v_width` columns. One entry for generated and for prompt tokens: each token brings its
// block table and the number of keys it sees.
#pragma once
#include "cache.h"
#include "plan.h"

namespace wf::attention {
// Strides of q and out in elements, of lse in floats.
struct PagedArgs {
  const void* q;
  int64_t q_token, q_head;
  void* out;
  int64_t out_token, out_head;
  float* lse;  // may be null
  int64_t lse_token, lse_head;
  const float* sink;             // may be null; [heads]
  const int32_t* const* tables;  // [tokens]: each token's block table
  const int32_t* keys;           // [tokens]: how many keys it sees
  int64_t tokens, heads, kv_heads, width, v_width;
  Cache cache;
  float scale, lonely_lse;
  Type q_type, out_type, cache_type;  // cache_type fp8: rows of 656 bytes
};

// Rows of a group, by query heads of a kv head; the last is repeated to fill one up: 3 compute
// as 4.
constexpr int group_rows(int64_t heads) { return heads == 1 ? 1 : heads == 2 ? 2 : 4; }

template <class RowFormat, int R>
class PagedWork {
 public:
  using Row = RowFormat;
  static constexpr int kRows = R;

  explicit PagedWork(const PagedArgs& args) : args_(args) {}
  int64_t k_width() const { return args_.width; }
  int64_t v_width() const { return args_.v_width; }
  float scale() const { return args_.scale; }
  const void* q() const { return args_.q; }
  Type q_type() const { return args_.q_type; }
  Output output() const {
    return {args_.out, args_.out_type, args_.lse, nullptr, args_.sink, args_.lonely_lse};
  }

  // Tokens that share a table stand together, as many as a block's rows allow.
  std::vector<Block> blocks() const {
    std::vector<Block> found;
    const int64_t of_kv = args_.heads / args_.kv_heads;
    const int64_t heads = std::min(of_kv, most_rows());
    const int64_t tokens = std::max<int64_t>(1, most_rows() / (ceil_div(heads, R) * R));
    for (int64_t t = 0, end; t < args_.tokens; t = end) {
      Block b;
      b.token = t;
      b.run_tiles = run_tiles<Row>(args_.keys[t]);
      for (end = t; end < args_.tokens && end - t < tokens; ++end) {
        if (args_.tables[end] != args_.tables[t]) break;
        if (run_tiles<Row>(args_.keys[end]) != b.run_tiles) break;
        b.keys = std::max<int64_t>(b.keys, args_.keys[end]);
      }
      b.tokens = end - t;
      for (int64_t kv = 0; kv < args_.kv_heads; ++kv)
        for (int64_t h = 0; h < of_kv; h += heads) {
          b.index = kv;
          b.head = int(kv * of_kv + h);
          b.heads = int(std::min(heads, of_kv - h));
          b.rows = b.tokens * ceil_div(b.heads, R) * R;
          found.push_back(b);
        }
    }
    return found;
  }

  void queries(const Block& block, Query* rows) const {
    for (int64_t t = block.token; t < block.token + block.tokens; ++t)
      for (int h = 0; h < ceil_div(block.heads, R) * R; ++h) {
        const int head = block.head + std::min(h, block.heads - 1);
        *rows++ = {t * args_.q_token + head * args_.q_head,
                   t * args_.out_token + head * args_.out_head,
                   t * args_.lse_token + head * args_.lse_head,
                   args_.keys[t],
                   head,
                   h < block.heads};
      }
  }

  class Source {
   public:
    Source(const PagedArgs& args, const Block& block)
        : cache_(args.cache),
          table_(args.tables[block.token]),
          kv_head_(block.index),
          expander_(args.width, args.v_width, args.cache_type == Type::fp8, true) {}
    template <int Keys>
    void fill(int64_t tile, KeyRows<Keys>& to) const {
      for (int t = 0; t < to.n;) {
        const int64_t key = tile * Keys + t, offset = key % cache_.page;
        const char* row = cache_.row(table_[key / cache_.page], offset, kv_head_);
        for (int64_t i = offset; i < cache_.page && t < to.n; ++i, ++t, row += cache_.row_stride)
          to.k[t] = to.v[t] = row;
      }
    }
    bool in_place() const { return !expander_.needed(); }
    template <int Keys>
    void expand(KeyRows<Keys>& tile) const {
      expander_(tile);
    }
    int64_t k_bytes() const { return expander_.k_bytes(); }
    int64_t v_bytes() const { return expander_.v_bytes(); }

   private:
    const Cache& cache_;
    const int32_t* table_;
    const int64_t kv_head_;
    const Expander<Row> expander_;
  };
  Source source(const Block& block) const { return {args_, block}; }

 private:
  // Rows of a block: what keeps q, both results and two tiles in L2; q is half as large for dots.
  // FP8 rows are expanded once a block, which more rows pay for. Few tokens: small blocks, so that
  // all threads have one.
  int64_t most_rows() const {
    int64_t rows = kTiles<Row> ? 128 : kDots<Row> || args_.cache_type == Type::fp8 ? 64 : 32;
    const int64_t all = args_.tokens * args_.heads;
    while (rows > std::max(R, 8) && all < rows * num_threads()) rows /= 2;
    return rows;
  }
  const PagedArgs& args_;
};

template <class Row, int R>
void paged_attention(const PagedArgs& args) {
  Runner(PagedWork<Row, R>(args)).run();
}
}  // namespace wf::attention
