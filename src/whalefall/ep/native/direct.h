// Dispatch straight into the receivers' results: one copy, without slots.
//
// Every rank offered a piece of its shared memory in its header; where all pieces are large enough
// (all ranks see all counts and all offers, so all decide alike), each source writes its rows to
// the places which the counts give them, says so, and waits for the others. A row is read once, for
// all who want it. Behind the rows of x lie scales, then what is small and is copied out at the
// end: ids, weights, tokens, order.
#pragma once
#include <vector>

#include "counts.h"
#include "dispatch.h"

namespace wf_ep {

constexpr int64_t kStep = 1 << 16;  // pieces are multiples of it

// Where this rank's rows go.
struct Direct {
  uint8_t* to[kMaxRanks];         // each receiver's piece, as this process sees it
  int64_t rows[kMaxRanks];        // that it receives
  int64_t next[kMaxRanks];        // row from here
  int64_t next_order[kMaxRanks];  // per selection: place in order of (source, token, lane)
  std::vector<int64_t> next_of;   // [E] per selection: row of each expert at its rank
};

struct Form {  // of a row
  int64_t x_bytes, scale_bytes, top_k, weights, per_selection;
};

struct Sections {
  int64_t scale, idx, weights, token, order, order_token, bytes;
};

inline Sections sections_of(const Form& f, int64_t rows) {
  Sections s = {};
  int64_t each = f.per_selection ? 1 : f.top_k;
  s.scale = up(rows * f.x_bytes, 64);
  s.idx = s.scale + up(rows * f.scale_bytes, 64);
  s.weights = s.idx + (f.per_selection ? 0 : 8 * rows * f.top_k);
  s.token = s.weights + (f.weights ? up(4 * rows * each, 8) : 0);
  s.order = s.token + up(4 * rows, 8);
  s.order_token = s.order + (f.per_selection ? 8 * rows : 0);
  s.bytes = s.order_token + (f.per_selection ? up(4 * rows, 8) : 0);
  return s;
}

inline Form form_of(const Dispatch& d) {
  return {d.x_bytes, d.scale_bytes, d.topk_idx ? d.top_k : 0, d.topk_weights != nullptr,
          d.per_selection};
}

// Whether as many tokens go to each rank as its count says.
inline bool counted(const Group& g, const Dispatch& d, const int32_t* per_rank) {
  int64_t n[kMaxRanks] = {0};
  for (int64_t t = 0; t < d.tokens; t++)
    for (int r = 0; r < g.num_ranks; r++) n[r] += d.in_rank[t * g.num_ranks + r];
  for (int r = 0; r < g.num_ranks; r++)
    if (n[r] != per_rank[r]) return false;
  return true;
}

// Whether each rank's piece has room for what comes to it.
inline bool all_fit(const Group& g, const Dispatch& d, const Heads& heads, const Fields& offers) {
  for (int r = 0; r < g.num_ranks; r++)
    if (sections_of(form_of(d), heads.rows_to(r)).bytes > offers.of(r)[kRoom] * kStep) return false;
  return true;
}

inline void aim(const Group& g, const Heads& heads, const Fields& offers, Direct& to) {
  for (int r = 0; r < g.num_ranks; r++) {
    to.to[r] = g.shared[r] + offers.of(r)[kRoomAt] * kStep;
    to.rows[r] = heads.rows_to(r);
    to.next[r] = 0;
    for (int s = 0; s < g.rank; s++) to.next[r] += heads.rows(s, r);
    to.next_order[r] = to.next[r];
  }
  if (!heads.per_selection) return;
  int64_t each = heads.num_experts / g.num_ranks;
  to.next_of.resize(heads.num_experts);
  for (int64_t e = 0, at = 0; e < heads.num_experts; e++) {
    if (e % each == 0) at = 0;
    for (int s = 0; s < g.num_ranks; s++) {
      if (s == g.rank) to.next_of[e] = at;
      at += heads.experts(s)[e];
    }
  }
}

template <class T>
inline T* at_section(uint8_t* piece, int64_t section) {
  return reinterpret_cast<T*>(piece + section);
}

// Where one token's row goes, over all ranks (and selections).
struct Places {
  uint8_t* to[256];
  int n = 0;
};

// Copy a token's row to all its places; around the caches it is read once for each two of them.
inline void copy_to(const Places& places, const uint8_t* from, int64_t bytes, bool past) {
  int i = 0;
#if defined(__AVX512F__)
  auto aligned = [&](int j) { return reinterpret_cast<uintptr_t>(places.to[j]) % 64 == 0; };
  for (; past && bytes % 64 == 0 && i + 1 < places.n && aligned(i) && aligned(i + 1); i += 2) {
    auto* one = reinterpret_cast<__m512i*>(places.to[i]);
    auto* two = reinterpret_cast<__m512i*>(places.to[i + 1]);
    auto* line = reinterpret_cast<const __m512i*>(from);
    for (int64_t l = 0; l < bytes / 64; l++) {
      __m512i value = _mm512_loadu_si512(line + l);
      _mm512_stream_si512(one + l, value);
      _mm512_stream_si512(two + l, value);
    }
  }
#endif
  for (; i < places.n; i++) copy_row(places.to[i], from, bytes, past);
}

// Token t takes row `at` of rank r: all but its x.
inline void take_row(const Dispatch& d, const Direct& to, const Sections& s, int r, int64_t at,
                     int64_t t, Places& places) {
  uint8_t* piece = to.to[r];
  places.to[places.n++] = piece + at * d.x_bytes;
  if (d.scale_bytes)
    memcpy(piece + s.scale + at * d.scale_bytes, d.scale + t * d.scale_bytes, d.scale_bytes);
  at_section<int32_t>(piece, s.token)[at] = static_cast<int32_t>(t);
}

// Token t for rank r, a row a selection. False where the counts were not true: nothing is written
// past a piece.
inline bool take_selections(const Dispatch& d, Direct& to, const Sections& s, int r, int64_t t,
                            Places& places) {
  uint8_t* piece = to.to[r];
  int64_t first = r * d.experts_per_rank;
  for (int64_t k = 0; k < d.top_k; k++) {
    int64_t e = d.topk_idx[t * d.top_k + k];
    if (e < first || e >= first + d.experts_per_rank) continue;
    int64_t at = to.next_of[e]++, j = to.next_order[r]++;
    if (at >= to.rows[r] || j >= to.rows[r] || places.n == 256) return false;
    take_row(d, to, s, r, at, t, places);
    at_section<int64_t>(piece, s.order)[j] = at;
    at_section<int32_t>(piece, s.order_token)[j] = static_cast<int32_t>(t);
    if (d.topk_weights) at_section<float>(piece, s.weights)[at] = d.topk_weights[t * d.top_k + k];
  }
  return true;
}

// The same, one row.
inline bool take_token(const Dispatch& d, Direct& to, const Sections& s, int r, int64_t t,
                       Places& places) {
  uint8_t* piece = to.to[r];
  int64_t first = r * d.experts_per_rank, at = to.next[r]++;
  if (at >= to.rows[r]) return false;
  take_row(d, to, s, r, at, t, places);
  for (int64_t k = 0; d.topk_idx && k < d.top_k; k++) {
    int64_t e = d.topk_idx[t * d.top_k + k] - first;
    bool there = e >= 0 && e < d.experts_per_rank;
    at_section<int64_t>(piece, s.idx)[at * d.top_k + k] = there ? e : -1;
    if (d.topk_weights)
      at_section<float>(piece, s.weights)[at * d.top_k + k] =
          there ? d.topk_weights[t * d.top_k + k] : 0.0f;
  }
  return true;
}

// Write all tokens to ranks [first, last).
inline bool write_to(const Group& g, const Dispatch& d, Direct& to, int first, int last) {
  Sections s[kMaxRanks];
  for (int r = first; r < last; r++) s[r] = sections_of(form_of(d), to.rows[r]);
  bool fits = true;
  for (int64_t t = 0; t < d.tokens; t++) {
    Places places;
    for (int r = first; r < last; r++)
      if (d.in_rank[t * g.num_ranks + r])
        fits &= d.per_selection ? take_selections(d, to, s[r], r, t, places)
                                : take_token(d, to, s[r], r, t, places);
    copy_to(places, d.x + t * d.x_stride, d.x_bytes, d.big);
  }
  if (d.big) fence_streams();
  return fits;
}

inline bool write_all(const Group& g, const Dispatch& d, Direct& to) {
  if (d.threads <= 1) return write_to(g, d, to, 0, g.num_ranks);
  std::atomic<bool> fits{true};  // a receiver each
  wf::parallel_for(g.num_ranks, [&](int64_t r, int) {
    if (!write_to(g, d, to, static_cast<int>(r), static_cast<int>(r) + 1)) fits = false;
  });
  return fits;
}

// What is small leaves the piece, so that it is kept only as long as its rows are.
inline void take_out(const Dispatch& d, const uint8_t* piece, int64_t rows) {
  int64_t each = d.per_selection ? 1 : d.top_k;
  Sections s = sections_of(form_of(d), rows);
  memcpy(d.recv_token, piece + s.token, 4 * rows);
  if (d.recv_idx) memcpy(d.recv_idx, piece + s.idx, 8 * rows * d.top_k);
  if (d.recv_weights) memcpy(d.recv_weights, piece + s.weights, 4 * rows * each);
  if (!d.per_selection) return;
  memcpy(d.order, piece + s.order, 8 * rows);
  memcpy(d.order_token, piece + s.order_token, 4 * rows);
}

}  // namespace wf_ep
