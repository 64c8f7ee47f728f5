// Dense attention over expanded heads, sequences end to end ("varlen"): prompt tokens in the form
// that is not absorbed. Keys and values are arrays of their own; query head h reads kv head
// h / (heads / kv_heads). Causal masks are aligned to the end of a sequence's keys.
//
// Four query tokens of one head form a group; a sequence's keys are one run, so a token's bits do
// not depend on how the prompt was cut.
#pragma once
#include <cstring>
#include "cache.h"
#include "plan.h"

namespace wf::attention {
// Strides in elements; of lse in floats.
struct VarlenArgs {
  const void *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  void* out;
  int64_t out_token, out_head;
  float* lse;  // may be null
  int64_t lse_token, lse_head;
  const int32_t *q_starts, *k_starts;  // [sequences + 1]
  int64_t sequences, heads, kv_heads, width, v_width;
  float scale, lonely_lse;
  int32_t causal;
  Type q_type, out_type;
};

template <class RowFormat>
class VarlenWork {
 public:
  using Row = RowFormat;
  static constexpr int kRows = 4;
  static constexpr int64_t kBlockTokens = 64;

  explicit VarlenWork(const VarlenArgs& args) : args_(args) {}
  int64_t k_width() const { return args_.width; }
  int64_t v_width() const { return args_.v_width; }
  float scale() const { return args_.scale; }
  const void* q() const { return args_.q; }
  Type q_type() const { return args_.q_type; }
  Output output() const {
    return {args_.out, args_.out_type, args_.lse, nullptr, nullptr, args_.lonely_lse};
  }

  std::vector<Block> blocks() const {
    std::vector<Block> found;
    for (int64_t s = 0; s < args_.sequences; ++s)
      for (int64_t t = args_.q_starts[s]; t < args_.q_starts[s + 1]; t += kBlockTokens)
        for (int64_t h = 0; h < args_.heads; ++h) {
          Block b;
          b.index = s;
          b.token = t;
          b.tokens = std::min<int64_t>(kBlockTokens, args_.q_starts[s + 1] - t);
          b.head = int(h);
          b.heads = 1;
          b.rows = ceil_div(b.tokens, kRows) * kRows;
          b.keys = keys(s, t + b.tokens - 1);
          b.run_tiles = int64_t(1) << 40;
          found.push_back(b);
        }
    return found;
  }

  void queries(const Block& block, Query* rows) const {
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t t = block.token + std::min(i, block.tokens - 1);
      *rows++ = {t * args_.q_token + block.head * args_.q_head,
                 t * args_.out_token + block.head * args_.out_head,
                 t * args_.lse_token + block.head * args_.lse_head,
                 keys(block.index, t),
                 block.head,
                 i < block.tokens};
    }
  }

  class Source {
   public:
    Source(const VarlenArgs& args, const Block& block)
        : args_(args), expander_(args.width, args.v_width, false, false) {
      const int64_t kv_head = block.head / (args.heads / args.kv_heads);
      const int64_t first = args.k_starts[block.index];
      k_ = static_cast<const Element*>(args.k) + first * args.k_token + kv_head * args.k_head;
      v_ = static_cast<const Element*>(args.v) + first * args.v_token + kv_head * args.v_head;
    }
    void fill(int64_t tile, Tile& to) const {
      for (int t = 0; t < to.n; ++t) {
        to.k[t] = k_ + (tile * kTile + t) * args_.k_token;
        to.v[t] = v_ + (tile * kTile + t) * args_.v_token;
      }
    }
    void expand(Tile& tile) const { expander_(tile); }
    int64_t k_bytes() const { return expander_.k_bytes(); }
    int64_t v_bytes() const { return expander_.v_bytes(); }

   private:
    using Element = typename Row::Element;
    const VarlenArgs& args_;
    const Expander<Row> expander_;
    const Element *k_, *v_;
  };
  Source source(const Block& block) const { return {args_, block}; }

 private:
  int64_t keys(int64_t sequence, int64_t token) const {
    const int64_t all = args_.k_starts[sequence + 1] - args_.k_starts[sequence];
    if (!args_.causal) return all;
    return std::max<int64_t>(0, token + 1 - args_.q_starts[sequence + 1] + all);
  }
  const VarlenArgs& args_;
};

// Tokens from `first` on belong to no sequence: they see no key.
inline void see_nothing(const VarlenArgs& args, int64_t first, int64_t tokens) {
  const int64_t size = bytes_of(args.out_type);
  parallel_for(tokens - first, [&](int64_t i, int) {
    for (int64_t t = first + i, h = 0; h < args.heads; ++h) {
      char* out = static_cast<char*>(args.out) + (t * args.out_token + h * args.out_head) * size;
      std::memset(out, 0, size_t(args.v_width * size));
      if (args.lse) args.lse[t * args.lse_token + h * args.lse_head] = args.lonely_lse;
    }
  });
}

template <class Row>
void varlen_attention(const VarlenArgs& args, int64_t tokens) {
  Runner(VarlenWork<Row>(args)).run();
  see_nothing(args, args.q_starts[args.sequences], tokens);
}
}  // namespace wf::attention
