// Combine: each rank's rows go back to the tokens' sources, which add them up.
//
// Each tick covers a block of tokens of *every* source. A rank stages, for each source, its rows
// for tokens of the block; then each source reads all ranks' slots and adds, in fp32 and in a fixed
// order, so the same bits come out on every run. Two forms:
//   per rank       out[t] = bias0 + bias1 + rank 0's row + rank 1's row + ...   (rank order)
//   per selection  out[t] = w[t,0] row(t,0) + w[t,1] row(t,1) + ...             (top-k order)
// Between hosts, a proxy adds its host's rows first (per rank: rounded once to bf16) or gathers
// them (per selection), and one message a block crosses.
#pragma once
#include "sums.h"
#include "wire.h"

namespace wf_ep {

// A slot: where the rows are, if not here; start[R + 1] entries of each source, place[entries]
// (row index); then the rows.
struct Elsewhere {
  int64_t at, stride;  // in the rank's shared memory; -1: here
};

struct Slot {
  Elsewhere* elsewhere;
  uint32_t* start;
  uint32_t* place;
  uint8_t* rows;
};

inline Slot slot_of(uint8_t* memory, int num_ranks, int64_t max_entries) {
  auto* elsewhere = reinterpret_cast<Elsewhere*>(memory);
  auto* start = reinterpret_cast<uint32_t*>(elsewhere + 1);
  int64_t head = sizeof(Elsewhere) + 4 * (num_ranks + 1 + max_entries);
  return {elsewhere, start, start + num_ranks + 1, memory + up(head, 64)};
}

// Where the weights of a row begin.
inline int64_t weights_at(const Combine& c) { return up(c.hidden * elem(c), 4); }
inline int64_t tail(const Combine& c) { return c.row_weights ? 4 * c.top_k : 0; }
inline int64_t staged_bytes(const Combine& c, int64_t stride) {
  return stride ? stride : up(weights_at(c) + tail(c), 64);
}

// Stage this rank's rows for tokens below `end` of all other sources; entries come in
// the order of tokens, so the cursor stands at the first that was not staged yet.
inline int64_t stage_rows(const Group& g, const Combine& c, int64_t end, int64_t max_entries,
                          int64_t stride, uint32_t tick) {
  uint8_t* memory = slot_at(g, g.rank, tick);
  Slot slot = slot_of(memory, g.num_ranks, max_entries);
  int64_t bytes = staged_bytes(c, stride), head = slot.rows - memory, entries = 0, used = 0;
  for (int s = 0; s < g.num_ranks; s++)
    for (int64_t j = c.cursor[s]; j < c.order_start[s + 1] && c.order_token[j] < end; j++)
      entries += s != g.rank;
  if (entries > max_entries) return kNoRoom;
  bool stays = c.zero_copy || c.shared_at >= 0;
  if (int64_t status = reserve(g, tick, head + (stays ? 0 : entries * bytes))) return status;
  *slot.elsewhere = {c.shared_at, c.x_stride};
  for (int s = 0; s < g.num_ranks; s++) {
    slot.start[s] = static_cast<uint32_t>(used);
    int64_t& j = c.cursor[s];
    for (; j < c.order_start[s + 1] && c.order_token[j] < end; j++) {
      if (s == g.rank) continue;
      int64_t from = c.order ? c.order[j] : j;
      slot.place[used] = static_cast<uint32_t>(stays ? from : used);
      uint8_t* to = slot.rows + used++ * bytes;
      if (stays) continue;
      memcpy(to, c.x + from * c.x_stride, c.hidden * elem(c));
      if (c.row_weights) memcpy(to + weights_at(c), c.row_weights + from * c.top_k, 4 * c.top_k);
    }
  }
  slot.start[g.num_ranks] = static_cast<uint32_t>(used);
  return 0;
}

// Walks the entries that the local ranks staged for one source, token by token.
struct Reader {
  const Group& g;
  const Combine& c;
  const uint32_t* place[kMaxRanks];
  const uint8_t* rows[kMaxRanks];
  int64_t bytes[kMaxRanks];

  Reader(const Group& g, const Combine& c, int source, uint32_t tick, int64_t max_entries,
         int64_t stride)
      : g(g), c(c) {
    for (int l = 0; l < g.num_local; l++) {
      Slot slot = slot_of(slot_at(g, g.rank_of[l], tick), g.num_ranks, max_entries);
      place[l] = slot.place + slot.start[source];
      bool here = slot.elsewhere->at < 0;
      rows[l] = here ? slot.rows : g.shared[g.rank_of[l]] + slot.elsewhere->at;
      bytes[l] = here ? staged_bytes(c, stride) : slot.elsewhere->stride;
    }
  }

  const uint8_t* take(int local) { return rows[local] + *place[local]++ * bytes[local]; }
};

inline void add_weights(const Combine& c, const Terms& terms, int64_t t) {
  float* out = c.out_weights + t * c.top_k;
  for (int64_t k = 0; k < c.top_k; k++) out[k] = 0;
  for (int j = 0; j < terms.n; j++) {
    auto* from = reinterpret_cast<const float*>(terms.row[j] + weights_at(c));
    for (int64_t k = 0; k < c.top_k; k++) out[k] += from[k];
  }
}

// The local rank and rank of expert selection (t, k), or false for -1.
inline bool rank_of_expert(const Combine& c, int64_t expert, int* rank) {
  if (expert < 0) return false;
  *rank = static_cast<int>(expert / c.experts_per_rank);
  return true;
}

// Add up this rank's tokens [first, end) of a block that begins at `begin`; those before `first`
// only move the readers on. `own`: this rank's next own entry.
inline void sum_block(const Group& g, const Combine& c, int64_t begin, int64_t first, int64_t end,
                      uint32_t tick, int64_t max_entries, int64_t stride, int64_t* own) {
  Reader reader(g, c, g.rank, tick, max_entries, stride);
  int64_t remote_bytes = up(weights_at(c) + tail(c), 64), remote_next[64] = {};
  // Own rows carry their weights elsewhere: copy them beside when weights are added.
  alignas(64) static thread_local uint8_t own_copies[2][1 << 17];
  bool skip = true;
  // A token is added up once the next one's rows are known.
  Terms two[2];
  int64_t waiting = -1;  // the token in two[waiting % 2]
  auto finish = [&](const Terms* next) {
    if (waiting < 0) return;
    add_terms(c, two[waiting % 2], waiting, next);
    if (c.out_weights) add_weights(c, two[waiting % 2], waiting);
  };
  int64_t now = begin;
  auto own_row = [&]() -> const uint8_t* {
    int64_t j = (*own)++, from = c.order ? c.order[j] : j;
    const uint8_t* row = c.x + from * c.x_stride;
    if (!c.row_weights || skip) return row;
    uint8_t* own_copy = own_copies[now % 2];
    memcpy(own_copy, row, c.hidden * elem(c));
    memcpy(own_copy + weights_at(c), c.row_weights + from * c.top_k, 4 * c.top_k);
    return own_copy;
  };
  for (int64_t t = begin; t < end; t++) {
    skip = t < first;
    now = t;
    Terms& terms = two[t % 2];
    terms.n = 0;
    auto push = [&](const uint8_t* row, float weight, int host) {
      terms.row[terms.n] = row;
      terms.weight[terms.n] = weight;
      terms.host[terms.n++] = host;
    };
    auto next_remote = [&](int host) {
      return c.remote[host] + remote_next[host]++ * remote_bytes;
    };
    if (c.per_selection) {
      for (int64_t k = 0; k < c.top_k; k++) {
        int rank;
        if (!rank_of_expert(c, c.topk_idx[t * c.top_k + k], &rank)) {
          if (!c.topk_weights && !skip)
            memset(static_cast<uint8_t*>(c.out) + (t * c.top_k + k) * c.hidden * elem(c), 0,
                   c.hidden * elem(c));
          continue;
        }
        const uint8_t* row = nullptr;
        if (rank == g.rank) {
          row = own_row();
        } else if (g.local_of[rank] >= 0) {
          if (!g.masked[rank]) row = reader.take(g.local_of[rank]);
        } else {
          row = next_remote(c.host_of[rank]);
        }
        if (skip) continue;
        if (!c.topk_weights) {
          uint8_t* to = static_cast<uint8_t*>(c.out) + (t * c.top_k + k) * c.hidden * elem(c);
          if (row)
            memcpy(to, row, c.hidden * elem(c));
          else
            memset(to, 0, c.hidden * elem(c));
        } else if (row) {
          push(row, c.topk_weights[t * c.top_k + k], 0);
        }
      }
      if (!c.topk_weights || skip) continue;
      finish(&terms);
      waiting = t;
      continue;
    }
    const uint8_t* wanted = c.in_rank + t * g.num_ranks;
    int64_t host_done = -1;
    for (int rank = 0; rank < g.num_ranks; rank++) {
      if (!wanted[rank]) continue;
      int host = c.num_hosts > 1 ? c.host_of[rank] : 0;
      if (rank == g.rank) {
        push(own_row(), 1, host);
      } else if (g.local_of[rank] >= 0) {
        push(reader.take(g.local_of[rank]), 1, host);
      } else if (host != host_done) {  // one row a host; its ranks are neighbours
        push(next_remote(host), 1, host);
        host_done = host;
      }
    }
    if (skip) continue;
    finish(&terms);
    waiting = t;
  }
  finish(nullptr);
}

// What a proxy sends for tokens [first, last) of its list: the host's sums, or its rows.
inline int64_t forward_block(const Group& g, const Combine& c, int source, uint32_t tick,
                             int64_t max_entries, int64_t stride, int64_t first, int64_t last,
                             const uint64_t* mask, const int32_t* idx, uint8_t* out) {
  Reader reader(g, c, source, tick, max_entries, stride);
  int64_t bytes = up(weights_at(c) + tail(c), 64);
  uint8_t* to = out;
  for (int64_t j = first; j < last; j++) {
    if (c.per_selection) {
      for (int64_t k = 0; k < c.top_k; k++) {
        int rank;
        if (!rank_of_expert(c, idx[j * c.top_k + k], &rank) || g.local_of[rank] < 0) continue;
        if (g.masked[rank])
          memset(to, 0, c.hidden * elem(c));
        else
          memcpy(to, reader.take(g.local_of[rank]), c.hidden * elem(c));
        to += bytes;
      }
      continue;
    }
    Terms terms;
    for (int l = 0; l < g.num_local; l++)
      if (mask[j] >> l & 1) terms.row[terms.n++] = reader.take(l);
    Combine one = c;  // a plain sum of these rows, in the rows' type
    one.bias[0] = one.bias[1] = nullptr;
    one.num_hosts = 1;
    one.out = to;
    one.out_fp32 = c.fp32;
    one.big = 0;
    add_terms(one, terms, 0);
    if (c.row_weights) {
      one.out_weights = reinterpret_cast<float*>(to + weights_at(c));
      add_weights(one, terms, 0);
    }
    to += bytes;
  }
  return to - out;
}

}  // namespace wf_ep
