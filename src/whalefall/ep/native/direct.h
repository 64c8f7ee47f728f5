// Dispatch straight into the receivers' results: one copy, without slots.
//
// Every rank offered a piece of its shared memory in its header; where all pieces are large enough
// (all ranks see all counts and all offers, so all decide alike), each source writes its rows to
// the places which the counts give them, says so, and waits for the others. A row is read once, for
// all who want it. Behind the rows of x lie scales, then what is small and is copied out at the
// end: ids, weights, tokens, order.
#pragma once
#include "dispatch.h"

namespace wf_ep {

struct Direct {
  uint8_t* const* to;   // [R] each receiver's piece, as this process sees it
  const int64_t* rows;  // [R] rows that it receives
  int64_t* next;        // [R] next row from here; per selection [E], of each expert
  int64_t* next_order;  // [R] per selection: next place in order of (source, token, lane)
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

template <class T>
inline T* at_section(uint8_t* piece, int64_t section) {
  return reinterpret_cast<T*>(piece + section);
}

// Write token t to row `at` of rank r.
inline void write_row(const Dispatch& d, const Direct& to, const Sections& s, int r, int64_t at,
                      int64_t t) {
  uint8_t* piece = to.to[r];
  copy_row(piece + at * d.x_bytes, d.x + t * d.x_stride, d.x_bytes, d.big);
  if (d.scale_bytes)
    memcpy(piece + s.scale + at * d.scale_bytes, d.scale + t * d.scale_bytes, d.scale_bytes);
  at_section<int32_t>(piece, s.token)[at] = static_cast<int32_t>(t);
}

// False where the counts were not true: nothing is written past a piece.
inline bool write_token(const Dispatch& d, const Direct& to, const Sections& s, int r, int64_t t) {
  uint8_t* piece = to.to[r];
  int64_t first = r * d.experts_per_rank;
  if (d.per_selection) {
    for (int64_t k = 0; k < d.top_k; k++) {
      int64_t e = d.topk_idx[t * d.top_k + k];
      if (e < first || e >= first + d.experts_per_rank) continue;
      int64_t at = to.next[e]++, j = to.next_order[r]++;
      if (at >= to.rows[r] || j >= to.rows[r]) return false;
      write_row(d, to, s, r, at, t);
      at_section<int64_t>(piece, s.order)[j] = at;
      at_section<int32_t>(piece, s.order_token)[j] = static_cast<int32_t>(t);
      if (d.topk_weights) at_section<float>(piece, s.weights)[at] = d.topk_weights[t * d.top_k + k];
    }
    return true;
  }
  int64_t at = to.next[r]++;
  if (at >= to.rows[r]) return false;
  write_row(d, to, s, r, at, t);
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

inline bool write_all(const Group& g, const Dispatch& d, const Direct& to) {
  Sections s[kMaxRanks];
  for (int r = 0; r < g.num_ranks; r++) s[r] = sections_of(form_of(d), to.rows[r]);
  auto wanted = [&](int64_t t, int r) { return d.in_rank[t * g.num_ranks + r] != 0; };
  std::atomic<bool> fits{true};
  if (d.threads > 1) {  // a receiver each
    wf::parallel_for(g.num_ranks, [&](int64_t n, int) {
      int r = static_cast<int>(n);
      for (int64_t t = 0; t < d.tokens; t++)
        if (wanted(t, r) && !write_token(d, to, s[r], r, t)) fits = false;
      if (d.big) fence_streams();
    });
    return fits;
  }
  for (int64_t t = 0; t < d.tokens; t++)
    for (int r = 0; r < g.num_ranks; r++)
      if (wanted(t, r) && !write_token(d, to, s[r], r, t)) fits = false;
  if (d.big) fence_streams();
  return fits;
}

// What is small leaves the piece, so that it is kept only as long as its rows are.
inline void take_out(const Group& g, const Dispatch& d, const Direct& to) {
  int64_t rows = to.rows[g.rank], each = d.per_selection ? 1 : d.top_k;
  Sections s = sections_of(form_of(d), rows);
  const uint8_t* piece = to.to[g.rank];
  memcpy(d.recv_token, piece + s.token, 4 * rows);
  if (d.recv_idx) memcpy(d.recv_idx, piece + s.idx, 8 * rows * d.top_k);
  if (d.recv_weights) memcpy(d.recv_weights, piece + s.weights, 4 * rows * each);
  if (!d.per_selection) return;
  memcpy(d.order, piece + s.order, 8 * rows);
  memcpy(d.order_token, piece + s.order_token, 4 * rows);
}

}  // namespace wf_ep
