// Dispatch: rows of tokens go to the ranks that hold their experts.
//
// Each tick a rank packs the next `block` of its tokens, once for all readers of the host, and then
// pulls from every stream the rows that are for it. A row is x | scales | K expert ids, int32 | K
// weights, float. A rank's own rows pass through shared memory only between halves (`keep_own`).
// Order of what arrives: source rank, then token (then lane, where it is one row a selection).
#pragma once
#include "wire.h"

namespace wf_ep {

struct Meta {  // one a packed row
  uint32_t token, pad;
  uint64_t mask;  // bit l: for local rank l of the reading host
};

struct Block {  // head of a packed block: then Meta[rows], then the rows from the next 64
  uint32_t rows, pad;
  int64_t row_bytes;
};

struct Dispatch {
  const uint8_t* x;  // [T] rows of x_bytes
  const uint8_t* scale;
  const int64_t* topk_idx;    // [T, K] or null
  const float* topk_weights;  // [T, K] or null
  const uint8_t* in_rank;     // [T, R]
  int64_t x_stride, x_bytes, scale_bytes, top_k, tokens, block, ticks, base, experts_per_rank;
  int64_t per_selection, stage, pull, big, transposed_rows;
  // received
  uint8_t* recv_x;
  uint8_t* recv_scale;  // rows of scale_bytes; transposed_rows > 0: [El, scale_bytes / 4, that]
  int64_t* recv_idx;    // [rows, K] local expert or -1
  float* recv_weights;  // [rows, K], 0 where the expert is elsewhere
  int32_t* recv_token;  // [rows] token of the source
  int64_t* cursor;      // next row of each source [R], or of each (local expert, source) [El, R]
  int64_t* order;       // per selection: row of the j-th in order of arrival
  int32_t* order_token;
  int64_t* order_cursor;  // [R] next j of each source
  int64_t capacity;       // rows that fit recv_x
  int64_t entries;        // of order
  // kept by a proxy for the way back, for each source that it serves, else null
  int32_t* const* forward_token;
  uint64_t* const* forward_mask;
  int32_t* const* forward_idx;
  int64_t* forward_cursor;  // [R]
  int64_t* forward_rows;    // [R] that are kept
  int64_t* waited_ns;       // [R] added to: time spent waiting for each source; or null
  int64_t threads;          // of the kernel pool that may help; the bits do not depend on it
  int64_t keep_own;         // this rank's own rows are packed too: x may change between the halves
};

// Where the ids of a row begin.
inline int64_t ids_at(const Dispatch& d) { return up(d.x_bytes + d.scale_bytes, 4); }

inline int64_t row_bytes(const Dispatch& d) {
  return up(ids_at(d) + (d.topk_idx ? 4 * d.top_k : 0) + (d.topk_weights ? 4 * d.top_k : 0), 64);
}

// Which ranks of a host (given by their ranks in the group) want token t, but for `except`.
inline uint64_t mask_of(const Group& g, const Dispatch& d, int64_t t, const int32_t* ranks, int n,
                        int except) {
  uint64_t mask = 0;
  const uint8_t* wanted = d.in_rank + t * g.num_ranks;
  for (int l = 0; l < n; l++)
    if (wanted[ranks[l]] && ranks[l] != except) mask |= 1ull << l;
  return mask;
}

// Pack tokens [begin, end) for the host with these ranks, but for rank `except`; returns the bytes
// used.
inline int64_t pack(const Group& g, const Dispatch& d, int64_t begin, int64_t end,
                    const int32_t* ranks, int n, int except, uint8_t* out) {
  auto* head = reinterpret_cast<Block*>(out);
  auto* meta = reinterpret_cast<Meta*>(out + sizeof(Block));
  uint32_t rows = 0;
  for (int64_t t = begin; t < end; t++)
    if (uint64_t mask = mask_of(g, d, t, ranks, n, except))
      meta[rows++] = {static_cast<uint32_t>(t), 0, mask};
  int64_t bytes = row_bytes(d);
  *head = {rows, 0, bytes};
  uint8_t* to = out + up(sizeof(Block) + rows * sizeof(Meta), 64);
  for (uint32_t i = 0; i < rows; i++, to += bytes) {
    int64_t t = meta[i].token;
    uint8_t* p = to;
    memcpy(p, d.x + t * d.x_stride, d.x_bytes);
    p += d.x_bytes;
    if (d.scale_bytes) memcpy(p, d.scale + t * d.scale_bytes, d.scale_bytes);
    p = to + ids_at(d);
    if (d.topk_idx) {
      auto* ids = reinterpret_cast<int32_t*>(p);
      for (int64_t k = 0; k < d.top_k; k++)
        ids[k] = static_cast<int32_t>(d.topk_idx[t * d.top_k + k]);
      p += 4 * d.top_k;
    }
    if (d.topk_weights) memcpy(p, d.topk_weights + t * d.top_k, 4 * d.top_k);
  }
  return to - out;
}

// One arriving row, wherever it lies.
struct Row {
  const uint8_t *x, *scale;
  const int32_t* ids;
  const float* weights;
  int32_t token;
};

inline void put(const Dispatch& d, const Row& row, int64_t at) {
  copy_row(d.recv_x + at * d.x_bytes, row.x, d.x_bytes, d.big);
  if (d.scale_bytes && !d.transposed_rows)
    memcpy(d.recv_scale + at * d.scale_bytes, row.scale, d.scale_bytes);
  if (d.scale_bytes && d.transposed_rows) {
    int64_t expert = at / d.transposed_rows, i = at % d.transposed_rows, n = d.scale_bytes / 4;
    auto* to = reinterpret_cast<uint32_t*>(d.recv_scale) + expert * n * d.transposed_rows + i;
    auto* from = reinterpret_cast<const uint32_t*>(row.scale);
    for (int64_t j = 0; j < n; j++) to[j * d.transposed_rows] = from[j];
  }
  d.recv_token[at] = row.token;
}

// Put one row where it belongs; false if there is no room (cannot be, if counts were true).
inline bool place(const Group& g, const Dispatch& d, int source, const Row& row) {
  int64_t first = g.rank * d.experts_per_rank;
  if (d.per_selection) {
    for (int64_t k = 0; k < d.top_k; k++) {
      int64_t e = row.ids[k] - first;
      if (row.ids[k] < 0 || e < 0 || e >= d.experts_per_rank) continue;
      int64_t at = d.cursor[e * g.num_ranks + source]++, j = d.order_cursor[source]++;
      if (at >= d.capacity || j >= d.entries) return false;
      put(d, row, at);
      d.order[j] = at;
      d.order_token[j] = row.token;
      if (d.recv_weights) d.recv_weights[at] = row.weights[k];
    }
    return true;
  }
  int64_t at = d.cursor[source]++;
  if (at >= d.capacity) return false;
  put(d, row, at);
  for (int64_t k = 0; d.recv_idx && k < d.top_k; k++) {
    int64_t e = row.ids[k] - first;
    bool here = row.ids[k] >= 0 && e >= 0 && e < d.experts_per_rank;
    d.recv_idx[at * d.top_k + k] = here ? e : -1;
    if (d.recv_weights) d.recv_weights[at * d.top_k + k] = here ? row.weights[k] : 0.0f;
  }
  return true;
}

inline bool pull_own(const Group& g, const Dispatch& d, int64_t begin, int64_t end, int32_t* ids) {
  for (int64_t t = begin; t < end; t++) {
    if (!d.in_rank[t * g.num_ranks + g.rank]) continue;
    for (int64_t k = 0; d.topk_idx && k < d.top_k; k++)
      ids[k] = static_cast<int32_t>(d.topk_idx[t * d.top_k + k]);
    Row row = {d.x + t * d.x_stride, d.scale + t * d.scale_bytes, ids, d.topk_weights + t * d.top_k,
               static_cast<int32_t>(t)};
    if (!place(g, d, g.rank, row)) return false;
  }
  return true;
}

inline bool pull_block(const Group& g, const Dispatch& d, int source, const uint8_t* block) {
  auto* head = reinterpret_cast<const Block*>(block);
  auto* meta = reinterpret_cast<const Meta*>(block + sizeof(Block));
  int64_t rows = head->rows, first = up(sizeof(Block) + rows * sizeof(Meta), 64);
  int64_t bytes = row_bytes(d);
  if (head->row_bytes != bytes || first + rows * bytes > g.slot_bytes) return false;
  const uint8_t* p = block + first;
  int32_t* forward = d.forward_token ? d.forward_token[source] : nullptr;
  for (int64_t i = 0; i < rows; i++, p += bytes) {
    auto* ids = reinterpret_cast<const int32_t*>(p + ids_at(d));
    auto* weights = reinterpret_cast<const float*>(ids + (d.topk_idx ? d.top_k : 0));
    if (forward) {
      int64_t j = d.forward_cursor[source]++;
      if (j >= d.forward_rows[source]) return false;
      forward[j] = static_cast<int32_t>(meta[i].token);
      d.forward_mask[source][j] = meta[i].mask;
      if (d.topk_idx) memcpy(d.forward_idx[source] + j * d.top_k, ids, 4 * d.top_k);
    }
    if (!(meta[i].mask >> g.local & 1)) continue;
    Row row = {p, p + d.x_bytes, ids, weights, static_cast<int32_t>(meta[i].token)};
    if (!place(g, d, source, row)) return false;
  }
  return true;
}

}  // namespace wf_ep
