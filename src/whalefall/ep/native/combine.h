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
#include "wire.h"

namespace wf_ep {

struct Combine {
  const uint8_t* x;  // rows to give back, hidden elements of bf16 or fp32
  int64_t x_stride, hidden, fp32;
  const float* row_weights;    // [rows, K] to be added up too (per rank), or null
  const int64_t* order;        // row of the j-th entry, in order of (source, token, lane); null: j
  const int32_t* order_token;  // [entries] its token
  const int64_t* order_start;  // [R + 1] first entry of each source
  int64_t* cursor;             // [R] next entry of each source
  int64_t top_k, tokens, block, base, experts_per_rank, per_selection, zero_copy;
  // the tokens of this rank
  const uint8_t* in_rank;          // [T, R]
  const int64_t* topk_idx;         // [T, K], per selection
  const float* topk_weights;       // [T, K], per selection; null: rows are not added but put out
  const uint16_t* bias[2];         // [T, hidden] bf16 or null
  void* out;                       // [T, hidden], bf16 or (out_fp32) fp32; or rows [T, K, hidden]
  int64_t out_fp32, big, threads;  // big: write around the caches
  float* out_weights;              // [T, K]
  // other hosts, in order; null where there is one host
  int64_t num_hosts, host;
  const int32_t* host_of;        // [R]
  const uint8_t* const* remote;  // [hosts] its message for this block
  int64_t shared_at;             // x begins there in this rank's shared memory; -1: it is private
};

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

inline int64_t elem(const Combine& c) { return c.fp32 ? 4 : 2; }
// Where the weights of a row begin.
inline int64_t weights_at(const Combine& c) { return up(c.hidden * elem(c), 4); }
inline int64_t tail(const Combine& c) { return c.row_weights ? 4 * c.top_k : 0; }
inline int64_t staged_bytes(const Combine& c, int64_t stride) {
  return stride ? stride : up(weights_at(c) + tail(c), 64);
}

inline float widen(uint16_t b) {
  uint32_t u = static_cast<uint32_t>(b) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t narrow(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16 | 0x40) : rounded);
}

// Eight elements at a time; compilers lower these vectors to whatever the level has.
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

inline F8 load8(const uint8_t* row, int64_t at, bool fp32) {
  F8 out;
  if (fp32) {
    memcpy(&out, row + 4 * at, 32);
    return out;
  }
  H8 half;
  memcpy(&half, row + 2 * at, 16);
  U8 wide = __builtin_convertvector(half, U8) << 16;
  memcpy(&out, &wide, 32);
  return out;
}

inline H8 narrow8(F8 f) {
  U8 u;
  memcpy(&u, &f, 32);
  U8 rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  I8 nan = (I8)(u & 0x7FFFFFFF) > (I8)(U8{} + 0x7F800000);
  U8 chosen = ((u >> 16 | 0x40) & (U8)nan) | (rounded & (U8)~nan);
  return __builtin_convertvector(chosen, H8);
}

// Two vectors to 16 bf16 (or fp32) at column `at`; kStream writes around the caches.
template <bool kStream>
inline void store16(void* out, int64_t at, F8 low, F8 high, bool fp32) {
  if (fp32) {
    memcpy(static_cast<float*>(out) + at, &low, 32);
    memcpy(static_cast<float*>(out) + at + 8, &high, 32);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + at;
#if defined(__AVX2__)
  auto rounded = [](F8 f) {
    __m256i u = _mm256_castps_si256((__m256)f);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)f, (__m256)f, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  };
  __m256i packed = _mm256_packus_epi32(rounded(low), rounded(high));
  packed = _mm256_permute4x64_epi64(packed, 0xD8);
  if (kStream)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), packed);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
#else
  H8 halves[2] = {narrow8(low), narrow8(high)};
  memcpy(to, halves, 32);
#endif
}

// The rows of one token: pointers in the order in which they are added.
struct Terms {
  const uint8_t* row[256];
  float weight[256];
  int32_t host[256];
  int n = 0;
};

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

// out[t] = bias + terms, columns [at, at + 8 * kWide), each held in a register over all terms.
template <int kWide, bool kWeighted, bool kFp32, bool kByHost, bool kStream>
inline void add_columns(const Combine& c, const Terms& terms, int64_t t, int64_t at) {
  F8 acc[kWide], part[kWide];
  int64_t base = t * c.hidden + at;
#pragma GCC unroll 8
  for (int v = 0; v < kWide; v++) acc[v] = part[v] = F8{} + 0.0f;
  for (const uint16_t* bias : c.bias) {
    if (!bias) continue;
#pragma GCC unroll 8
    for (int v = 0; v < kWide; v++)
      acc[v] += load8(reinterpret_cast<const uint8_t*>(bias), base + 8 * v, false);
  }
  for (int j = 0; j < terms.n; j++) {
    const uint8_t* row = terms.row[j];
    if (!kByHost) {
#pragma GCC unroll 8
      for (int v = 0; v < kWide; v++) {
        F8 value = load8(row, at + 8 * v, kFp32);
        acc[v] += kWeighted ? value * terms.weight[j] : value;
      }
      continue;
    }
    bool first = j == 0 || terms.host[j - 1] != terms.host[j];
    bool last = j + 1 == terms.n || terms.host[j + 1] != terms.host[j];
#pragma GCC unroll 8
    for (int v = 0; v < kWide; v++) {
      F8 value = load8(row, at + 8 * v, kFp32);
      part[v] = first ? value + 0.0f : part[v] + value;
      if (!last) continue;  // each host's sum is rounded as it would be on the wire
      H8 rounded = narrow8(part[v]);
      acc[v] += kFp32 ? part[v] : load8(reinterpret_cast<const uint8_t*>(&rounded), 0, false);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kWide; v += 2)
    store16<kStream>(c.out, base + 8 * v, acc[v], acc[v + 1], c.out_fp32);
}

// The same for the last columns, which fill no vector.
inline void add_rest(const Combine& c, const Terms& terms, int64_t t, int64_t at, bool by_host) {
  auto value = [](const uint8_t* row, int64_t i, bool fp32) {
    float f;
    memcpy(&f, row + 4 * i, fp32 ? 4 : 0);
    return fp32 ? f : widen(reinterpret_cast<const uint16_t*>(row)[i]);
  };
  for (int64_t i = at; i < c.hidden; i++) {
    float acc = 0, part = 0;
    for (const uint16_t* bias : c.bias)
      if (bias) acc += widen(bias[t * c.hidden + i]);
    for (int j = 0; j < terms.n; j++) {
      float row = value(terms.row[j], i, c.fp32);
      if (!by_host) {
        acc += c.per_selection ? terms.weight[j] * row : row;
        continue;
      }
      part += row;
      if (j + 1 < terms.n && terms.host[j + 1] == terms.host[j]) continue;
      acc += c.fp32 ? part : widen(narrow(part));
      part = 0;
    }
    if (c.out_fp32)
      static_cast<float*>(c.out)[t * c.hidden + i] = acc;
    else
      static_cast<uint16_t*>(c.out)[t * c.hidden + i] = narrow(acc);
  }
}

template <bool kWeighted, bool kFp32, bool kByHost>
inline void add_row(const Combine& c, const Terms& terms, int64_t t) {
  int64_t at = 0;
  bool aligned = reinterpret_cast<uintptr_t>(c.out) % 32 == 0 && c.hidden % 16 == 0;
  if (c.big && aligned && !c.out_fp32)
    for (; at + 64 <= c.hidden; at += 64)
      add_columns<8, kWeighted, kFp32, kByHost, true>(c, terms, t, at);
  for (; at + 64 <= c.hidden; at += 64)
    add_columns<8, kWeighted, kFp32, kByHost, false>(c, terms, t, at);
  for (; at + 16 <= c.hidden; at += 16)
    add_columns<2, kWeighted, kFp32, kByHost, false>(c, terms, t, at);
  if (at < c.hidden) add_rest(c, terms, t, at, kByHost);
}

inline void add_terms(const Combine& c, const Terms& terms, int64_t t) {
  if (c.per_selection)
    c.fp32 ? add_row<true, true, false>(c, terms, t) : add_row<true, false, false>(c, terms, t);
  else if (terms.n == 1 && !c.bias[0] && !c.bias[1] && c.fp32 == c.out_fp32)
    copy_row(static_cast<uint8_t*>(c.out) + t * c.hidden * elem(c), terms.row[0],
             c.hidden * elem(c), c.big);
  else if (c.num_hosts > 1)
    c.fp32 ? add_row<false, true, true>(c, terms, t) : add_row<false, false, true>(c, terms, t);
  else
    c.fp32 ? add_row<false, true, false>(c, terms, t) : add_row<false, false, false>(c, terms, t);
}

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
  alignas(64) static thread_local uint8_t own_copy[1 << 17];
  bool skip = true;
  auto own_row = [&]() -> const uint8_t* {
    int64_t j = (*own)++, from = c.order ? c.order[j] : j;
    const uint8_t* row = c.x + from * c.x_stride;
    if (!c.row_weights || skip) return row;
    memcpy(own_copy, row, c.hidden * elem(c));
    memcpy(own_copy + weights_at(c), c.row_weights + from * c.top_k, 4 * c.top_k);
    return own_copy;
  };
  for (int64_t t = begin; t < end; t++) {
    skip = t < first;
    Terms terms;
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
      if (c.topk_weights && !skip) add_terms(c, terms, t);
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
    add_terms(c, terms, t);
    if (c.out_weights) add_weights(c, terms, t);
  }
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
