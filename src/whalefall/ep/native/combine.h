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
#include <vector>

#include "counts.h"
#include "logfmt.h"
#include "sums.h"
#include "wire.h"

namespace wf_ep {

// A slot: where the rows are, if not here; start[R + 1] entries of each source, place[entries]
// (row index); then the rows.
struct Elsewhere {
  int64_t at, stride;                        // in the rank's shared memory; -1: here
  int32_t kind, hidden, form, serial, call;  // what all ranks must agree on
  int32_t next;                              // tick after the combine
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
  if (c.log_format) return up(log_most_bytes(c.hidden), 64);
  return stride ? stride : up(weights_at(c) + tail(c), 64);
}

inline int32_t form_of(const Combine& c) {
  return static_cast<int32_t>((c.fp32 ? 1 : 0) | (c.row_weights ? 2 : 0) | (c.log_format ? 4 : 0));
}

inline const Elsewhere& said_at(const Group& g, int rank, uint32_t tick) {
  return *reinterpret_cast<const Elsewhere*>(slot_at(g, rank, tick));
}

// Whether all ranks of the host that staged `tick` give back such rows.
inline bool all_give_alike(const Group& g, uint32_t tick) {
  const Elsewhere& mine = said_at(g, g.rank, tick);
  for (int l = 0; l < g.num_local; l++) {
    const Elsewhere& its = said_at(g, g.rank_of[l], tick);
    if (g.masked[g.rank_of[l]]) continue;
    if (its.kind != mine.kind || its.hidden != mine.hidden || its.form != mine.form ||
        its.serial != mine.serial || its.call != mine.call)
      return false;
  }
  return true;
}

// The first tick that no rank takes for a combine in which they disagree at `tick`.
inline uint32_t tick_after(const Group& g, uint32_t tick) {
  uint32_t last = tick + 1;
  for (int l = 0; l < g.num_local; l++) {
    const Elsewhere& its = said_at(g, g.rank_of[l], tick);
    if (its.kind == kCombine && static_cast<int32_t>(its.next - last) > 0) last = its.next;
  }
  return last;
}

// Where the weights of `entries` rows that stay elsewhere lie, behind their places.
inline uint8_t* weights_beside(const Slot& slot, int64_t entries) {
  auto* memory = reinterpret_cast<uint8_t*>(slot.elsewhere);
  return memory + up(reinterpret_cast<uint8_t*>(slot.place + entries) - memory, 64);
}

// Stage this rank's rows for tokens below `end` of all (other) sources; entries come in
// the order of tokens, so the cursor stands at the first that was not staged yet. Rows that stay in
// shared memory cost an index (and their weights) each: the first tick names those of all tokens,
// and where all ranks' rows stay, all are added up at once (`all_stay`).
inline int64_t stage_rows(const Group& g, const Combine& c, int64_t end, int64_t max_entries,
                          int64_t stride, uint32_t tick, int32_t next) {
  uint8_t* memory = slot_at(g, g.rank, tick);
  Slot slot = slot_of(memory, g.num_ranks, max_entries);
  bool shared = c.shared_at >= 0, stays = c.zero_copy || shared;
  bool whole = shared && tick == static_cast<uint32_t>(c.base);
  int64_t bytes = staged_bytes(c, stride), head = slot.rows - memory, entries = 0, used = 0;
  auto listed = [&](int64_t s, int64_t j) {
    return j < c.order_start[s + 1] && (whole || c.order_token[j] < end);
  };
  auto is_staged = [&](int s) { return s != g.rank || c.keep_own; };
  for (int s = 0; s < g.num_ranks; s++)
    for (int64_t j = c.cursor[s]; is_staged(s) && listed(s, j); j++) entries++;
  uint8_t* weights = weights_beside(slot, entries);
  if (shared) head = weights - memory + entries * tail(c);
  if (entries > max_entries && !shared) return kNoRoom;
  if (int64_t status = reserve(g, tick, head + (stays ? 0 : entries * bytes))) return status;
  *slot.elsewhere = {c.shared_at,
                     c.x_stride,
                     kCombine,
                     static_cast<int32_t>(c.hidden),
                     form_of(c),
                     static_cast<int32_t>(c.serial),
                     static_cast<int32_t>(c.call),
                     next};
  for (int s = 0; s < g.num_ranks; s++) {
    slot.start[s] = static_cast<uint32_t>(used);
    int64_t& next_entry = c.cursor[s];
    for (int64_t j = next_entry; listed(s, j); j++) {
      next_entry += c.order_token[j] < end;
      if (!is_staged(s)) continue;
      int64_t from = c.order ? c.order[j] : j;
      slot.place[used] = static_cast<uint32_t>(stays ? from : used);
      if (shared && c.row_weights)
        memcpy(weights + used * tail(c), c.row_weights + from * c.top_k, tail(c));
      uint8_t* to = slot.rows + used++ * bytes;
      if (stays) continue;
      const uint8_t* row = c.x + from * c.x_stride;
      if (c.log_format)
        log_encode(reinterpret_cast<const uint16_t*>(row), c.hidden, to);
      else
        memcpy(to, row, c.hidden * elem(c));
      if (c.row_weights) memcpy(to + weights_at(c), c.row_weights + from * c.top_k, 4 * c.top_k);
    }
  }
  slot.start[g.num_ranks] = static_cast<uint32_t>(used);
  return 0;
}

// Whether all ranks' rows of `tick` lie in shared memory, so that each has named all it has.
inline bool all_stay(const Group& g, uint32_t tick) {
  for (int l = 0; l < g.num_local; l++)
    if (reinterpret_cast<Elsewhere*>(slot_at(g, g.rank_of[l], tick))->at < 0) return false;
  return true;
}

// Walks the entries that the local ranks staged for one source, token by token.
struct Reader {
  const Group& g;
  const Combine& c;
  const uint32_t* place[kMaxRanks];
  const uint8_t* rows[kMaxRanks];
  const uint8_t* weights[kMaxRanks];  // of the next row, where they are not behind it; or null
  int64_t bytes[kMaxRanks];
  int64_t entries[kMaxRanks], most[kMaxRanks];  // that are left; rows that the memory can hold
  bool whole = true;                            // all rows that were taken were there

  Reader(const Group& g, const Combine& c, int source, uint32_t tick, int64_t max_entries,
         int64_t stride)
      : g(g), c(c) {
    for (int l = 0; l < g.num_local; l++) {
      uint8_t* memory = slot_at(g, g.rank_of[l], tick);
      Slot slot = slot_of(memory, g.num_ranks, max_entries);
      int64_t first = slot.start[source], end = slot.start[source + 1];
      int64_t room = (g.slot_bytes - (reinterpret_cast<uint8_t*>(slot.place) - memory)) / 4;
      entries[l] = first <= end && end <= room ? end - first : 0;
      place[l] = slot.place + first;
      bool here = g.slots_only || slot.elsewhere->at < 0;
      rows[l] = here ? slot.rows : g.shared[g.rank_of[l]] + slot.elsewhere->at;
      bytes[l] = here ? staged_bytes(c, stride) : slot.elsewhere->stride;
      most[l] = here ? (g.slot_bytes - (slot.rows - memory)) / bytes[l] : INT64_MAX;
      int64_t all = slot.start[g.num_ranks];
      weights[l] = here ? nullptr : weights_beside(slot, all) + first * tail(c);
    }
  }

  const uint8_t* take(int local, const float** its_weights = nullptr) {
    int64_t at = entries[local]-- > 0 ? *place[local]++ : INT64_MAX;
    if (at >= most[local]) return whole = false, nullptr;
    const uint8_t* row = rows[local] + at * bytes[local];
    if (its_weights)
      *its_weights =
          reinterpret_cast<const float*>(weights[local] ? weights[local] : row + weights_at(c));
    if (weights[local]) weights[local] += tail(c);
    return row;
  }
};

inline void add_weights(const Combine& c, const Terms& terms, int64_t t) {
  float* out = c.out_weights + t * c.top_k;
  for (int64_t k = 0; k < c.top_k; k++) out[k] = 0;
  for (int j = 0; j < terms.n; j++)
    for (int64_t k = 0; k < c.top_k; k++) out[k] += terms.row_weights[j][k];
}

// The rank of an expert, or false for -1.
inline bool rank_of_expert(const Combine& c, int64_t expert, int* rank) {
  if (expert < 0) return false;
  *rank = static_cast<int>(expert / c.experts_per_rank);
  return true;
}

// Finds the rows of this rank's tokens of a block, in the order in which they are added.
struct Collector {
  const Group& g;
  const Combine& c;
  Reader reader;
  int64_t own;  // this rank's next own entry
  int64_t remote_bytes, remote_at[64] = {};
  std::vector<uint8_t> coded;  // own rows of a token, as they would travel
  std::vector<float> wide;     // rows of a token that travelled as LogFMT

  Collector(const Group& g, const Combine& c, uint32_t tick, int64_t max_entries, int64_t stride,
            int64_t own)
      : g(g),
        c(c),
        reader(g, c, g.rank, tick, max_entries, stride),
        own(own),
        remote_bytes(up(weights_at(c) + tail(c), 64)),
        coded(c.log_format ? c.top_k * log_most_bytes(c.hidden) : 0),
        wide(c.log_format ? c.top_k * c.hidden : 0) {}

  // The next row that `rank` has for this rank; null where that rank is masked.
  const uint8_t* next(int rank, const float** weights) {
    if (rank == g.rank && !c.keep_own) {
      int64_t j = own++, from = c.order ? c.order[j] : j;
      *weights = c.row_weights ? c.row_weights + from * c.top_k : nullptr;
      return c.x + from * c.x_stride;
    }
    if (g.local_of[rank] >= 0)
      return g.masked[rank] && rank != g.rank ? nullptr : reader.take(g.local_of[rank], weights);
    int host = c.host_of[rank];
    if (!c.remote[host]) return nullptr;  // all its ranks are masked
    const uint8_t* row = c.remote[host] + remote_at[host];
    remote_at[host] += c.log_format ? log_bytes(row, c.hidden) : remote_bytes;
    *weights = reinterpret_cast<const float*>(row + weights_at(c));
    return g.masked[rank] ? nullptr : row;
  }

  void push(Terms& terms, int rank, float weight, int host) {
    const uint8_t* row = next(rank, &terms.row_weights[terms.n]);
    if (!row) return;
    if (c.log_format && rank == g.rank && !c.keep_own) {
      uint8_t* to = coded.data() + terms.n * log_most_bytes(c.hidden);
      log_encode(reinterpret_cast<const uint16_t*>(row), c.hidden, to);
      row = to;
    }
    terms.row[terms.n] = row;
    terms.weight[terms.n] = weight;
    terms.host[terms.n++] = host;
  }

  void collect(int64_t t, Terms& terms) {
    terms.n = 0;
    if (c.per_selection) {
      for (int64_t k = 0; k < c.top_k; k++) {
        int rank;
        if (rank_of_expert(c, c.topk_idx[t * c.top_k + k], &rank))
          push(terms, rank, c.topk_weights[t * c.top_k + k], 0);
      }
      return;
    }
    const uint8_t* wanted = c.in_rank + t * g.num_ranks;
    int host_done = -1;
    for (int rank = 0; rank < g.num_ranks; rank++) {
      if (!wanted[rank]) continue;
      int host = c.num_hosts > 1 ? c.host_of[rank] : 0;
      bool remote = g.local_of[rank] < 0;
      if (remote && host == host_done) continue;  // one row a host; its ranks are neighbours
      push(terms, rank, 1, host);
      if (remote) host_done = host;
    }
  }

  // Add up rows that travelled as LogFMT.
  void add_decoded(Terms& terms, int64_t t) {
    for (int j = 0; j < terms.n; j++) {
      float* to = wide.data() + j * c.hidden;
      log_decode(terms.row[j], c.hidden, to);
      terms.row[j] = reinterpret_cast<const uint8_t*>(to);
    }
    Combine decoded = c;
    decoded.fp32 = 1;
    add_terms(decoded, terms, t);
  }

  // Put out the rows of token t unadded, zeros where there is none; `skip`: only move on.
  void put(int64_t t, bool skip) {
    int64_t bytes = c.hidden * elem(c);
    auto* to = static_cast<uint8_t*>(c.out) + t * c.top_k * bytes;
    for (int64_t k = 0; k < c.top_k; k++, to += bytes) {
      int rank;
      const float* weights;
      bool there = rank_of_expert(c, c.topk_idx[t * c.top_k + k], &rank);
      const uint8_t* row = there ? next(rank, &weights) : nullptr;
      if (skip) continue;
      if (row)
        copy_row(to, row, bytes, c.big);
      else
        memset(to, 0, bytes);
    }
  }
};

// Add up this rank's tokens [first, end) of a block that begins at `begin`; those before `first`
// only move the readers on. `own`: this rank's next own entry. False where rows were not there.
inline bool sum_block(const Group& g, const Combine& c, int64_t begin, int64_t first, int64_t end,
                      uint32_t tick, int64_t max_entries, int64_t stride, int64_t* own) {
  Collector collector(g, c, tick, max_entries, stride, *own);
  Terms terms;
  for (int64_t t = begin; t < end; t++) {
    if (c.per_selection && !c.topk_weights) {
      collector.put(t, t < first);
      continue;
    }
    collector.collect(t, terms);
    if (t < first) continue;
    if (c.log_format)
      collector.add_decoded(terms, t);
    else
      add_terms(c, terms, t);
    if (c.out_weights) add_weights(c, terms, t);
  }
  *own = collector.own;
  return collector.reader.whole;
}

// What a proxy sends for tokens [first, last) of its list: the host's sums, or its rows; its bytes.
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
        const uint8_t* row = g.masked[rank] ? nullptr : reader.take(g.local_of[rank]);
        int64_t used = c.hidden * elem(c);
        if (c.log_format) used = row ? log_bytes(row, c.hidden) : log_most_bytes(c.hidden);
        if (row)
          memcpy(to, row, used);
        else
          memset(to, 0, used);
        to += c.log_format ? used : bytes;
      }
      continue;
    }
    Terms terms;
    for (int l = 0; l < g.num_local; l++) {
      if (!(mask[j] >> l & 1)) continue;
      const uint8_t* row = reader.take(l);
      if (!row) return kMiscounted;
      terms.row_weights[terms.n] = reinterpret_cast<const float*>(row + weights_at(c));
      terms.row[terms.n++] = row;
    }
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
  return reader.whole ? to - out : kMiscounted;
}

}  // namespace wf_ep
