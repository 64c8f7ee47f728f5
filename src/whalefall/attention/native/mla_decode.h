// The public call's dense form: a batch with one block table and one length each, s_q tokens a
// request. Checks what the arrays hold, then hands each token its table and its keys.
#pragma once
#include "mla.h"

namespace wf::attention {
struct DecodeArgs {
  PagedArgs paged;             // tables and keys are filled in here
  const int32_t* block_table;  // [batch][table_width]
  int64_t table_stride, table_width;
  const int32_t* lengths;  // [batch]
  int64_t batch, per_request;
  int64_t wrong_request, wrong_entry, wrong_value;  // what was refused
  int32_t causal;
};
enum Refusal : int32_t { kNone = 0, kLength = 1, kTable = 2 };

inline Refusal check(DecodeArgs& args) {
  const Cache& cache = args.paged.cache;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t length = args.lengths[b];
    args.wrong_request = b;
    args.wrong_value = length;
    if (length < 0 || length > args.table_width * cache.page) return kLength;
    for (int64_t i = 0; i < ceil_div(length, cache.page); ++i) {
      const int64_t block = args.block_table[b * args.table_stride + i];
      args.wrong_entry = i;
      args.wrong_value = block;
      if (block < 0 || block >= cache.blocks) return kTable;
    }
  }
  return kNone;
}

template <class Row, int R>
Refusal decode(DecodeArgs& args) {
  if (Refusal refusal = check(args)) return refusal;
  static thread_local std::vector<const int32_t*> tables;
  static thread_local std::vector<int32_t> keys;
  tables.clear();
  keys.clear();
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t t = 0; t < args.per_request; ++t) {
      const int64_t hidden = args.causal ? args.per_request - 1 - t : 0;
      tables.push_back(args.block_table + b * args.table_stride);
      keys.push_back(int32_t(std::max<int64_t>(0, args.lengths[b] - hidden)));
    }
  args.paged.tables = tables.data();
  args.paged.keys = keys.data();
  paged_attention<Row, R>(args.paged);
  return kNone;
}
}  // namespace wf::attention
