// Headers: what each rank tells all others before its rows go, and what follows from all of them.
//
// A header is kFields int32, then per_rank [R] (tokens for each rank), per_host [H], per_expert
// [E].
#pragma once
#include "wire.h"

namespace wf_ep {

enum Field {  // HEADER_FIELDS of handle.py
  kKind,
  kTokens,
  kXBytes,
  kScaleBytes,
  kTopK,
  kFlags,
  kExperts,
  kExtra,
  kRoom,
  kRoomAt,
  kCall,
  kFields
};
constexpr int kAgreed[] = {kKind, kCall, kXBytes, kScaleBytes, kTopK, kFlags, kExperts, kExtra};
constexpr int kRepeat = 4, kCombine = 5;  // kinds of calls, KINDS of counts.py
constexpr int64_t kDisagree = -2'000'003, kMiscounted = -2'000'004;

// All ranks' headers within one host.
struct Heads {
  const int32_t* heads;  // [R, length]
  int64_t ranks, num_experts, per_selection;

  int64_t length() const { return kFields + ranks + 1 + num_experts; }
  const int32_t* of(int rank) const { return heads + rank * length(); }
  const int32_t* experts(int rank) const { return of(rank) + kFields + ranks + 1; }

  // Rows from s to r.
  int64_t rows(int s, int r) const {
    if (!per_selection) return of(s)[kFields + r];
    int64_t n = 0, each = num_experts / ranks;
    for (int64_t e = r * each; e < (r + 1) * each; e++) n += experts(s)[e];
    return n;
  }

  int64_t rows_to(int r) const {
    int64_t n = 0;
    for (int s = 0; s < ranks; s++) n += rows(s, r);
    return n;
  }

  int64_t most_tokens() const {
    int64_t most = 0;
    for (int s = 0; s < ranks; s++) most = of(s)[kTokens] > most ? of(s)[kTokens] : most;
    return most;
  }
};

// The first fields of all ranks' headers, which lie `stride` apart.
struct Fields {
  const int32_t* first;
  int64_t stride;
  const int32_t* of(int rank) const { return first + rank * stride; }
};

// Whether every rank calls the same collective with the same sizes as this one.
inline bool all_agree(const Group& g, const Fields& fields) {
  for (int s = 0; s < g.num_ranks; s++)
    for (int field : kAgreed)
      if (fields.of(s)[field] != fields.of(g.rank)[field]) return false;
  return true;
}

// Collect header number `count` of every rank into out [R, bytes]; a masked rank's is all zeros.
inline int64_t collect(const Group& g, uint32_t count, void* out, int64_t bytes) {
  for (int s = 0; s < g.num_ranks; s++) {
    auto* to = static_cast<uint8_t*>(out) + s * bytes;
    int64_t status = await_rank(g, s, g.stream[s]->posted, count + 1);
    if (status < 0) return status;
    if (status > 0)
      memset(to, 0, bytes);
    else
      memcpy(to, g.mailbox[s] + (count % g.mailboxes) * g.mailbox_bytes, bytes);
  }
  return left(g);
}

}  // namespace wf_ep
