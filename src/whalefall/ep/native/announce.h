// A dispatch within one host: what the ranks say before their rows go, and the calls that say it.
#pragma once
#include "direct.h"
#include "whalefall/pool.h"

namespace wf_ep {

// Bytes of a piece for so many rows as `counts` [n] add up to.
WF_EXPORT int64_t wf_ep_room(const Dispatch* dispatch, const int32_t* counts, int64_t n) {
  int64_t rows = 0;
  for (int64_t i = 0; i < n; i++) rows += counts[i];
  return sections_of(form_of(*dispatch), rows).bytes;
}

// What a rank says before a dispatch within one host, and what it learns from the others.
struct Announcement {
  const int32_t *per_rank, *per_expert;  // [R], [E]
  int64_t num_experts, room, room_at, count, call, serial;
  int32_t* heads;   // [R, length], filled; behind them rows of each local expert [El], rounded up
  int32_t* offers;  // [R, fields], filled where the counts are known and only memory is offered
  int64_t alignment;
  int64_t rows, bytes, most_tokens, fits;  // told: rows that come, bytes of a piece for them
  int64_t big_bytes, thread_bytes, cores;  // from where on results go around the caches; threads
};

static Heads heads_of(const Group& g, const Dispatch& d, const Announcement& a) {
  return {a.heads, g.num_ranks, a.num_experts, d.per_selection};
}

// Write a header's fields into this rank's mailbox; returns where they are.
static int32_t* put_fields(const Group& g, const Dispatch& d, const Announcement& a, int kind) {
  auto* to = reinterpret_cast<int32_t*>(
      g.mailbox[g.rank] + (static_cast<uint32_t>(a.count) % g.mailboxes) * g.mailbox_bytes);
  memset(to, 0, 4 * kFields);
  to[kKind] = kind;
  to[kTokens] = static_cast<int32_t>(d.tokens);
  to[kXBytes] = static_cast<int32_t>(d.x_bytes);
  to[kScaleBytes] = static_cast<int32_t>(d.scale_bytes);
  to[kTopK] = static_cast<int32_t>(d.top_k);
  to[kFlags] = static_cast<int32_t>(d.per_selection | (d.topk_weights ? 2 : 0));
  to[kExperts] = static_cast<int32_t>(a.num_experts);
  to[kRoom] = static_cast<int32_t>(a.room);
  to[kRoomAt] = static_cast<int32_t>(a.room_at);
  to[kExtra] = static_cast<int32_t>(a.serial);
  to[kCall] = static_cast<int32_t>(a.call);
  return to;
}

// Say how many rows go where and which memory is free for what comes, and learn it of all others.
// Nothing is said where this rank's own counts are not those of its tokens.
WF_EXPORT int64_t wf_ep_announce(const Group* group, const Dispatch* dispatch, Announcement* a) {
  const Group& g = *group;
  const Dispatch& d = *dispatch;
  if (!d.per_selection && !counted(g, d, a->per_rank)) return kMiscounted;
  Heads heads = heads_of(g, d, *a);
  int32_t* mine = put_fields(g, d, *a, 1);
  auto count = static_cast<uint32_t>(a->count);
  memcpy(mine + kFields, a->per_rank, 4 * g.num_ranks);
  mine[kFields + g.num_ranks] = 0;  // of the one host nobody asks
  memcpy(mine + kFields + g.num_ranks + 1, a->per_expert, 4 * a->num_experts);
  advance(g.stream[g.rank]->posted, count + 1);
  int64_t status = collect(g, count, a->heads, 4 * heads.length());
  if (status < 0) return status;
  Fields fields = {a->heads, heads.length()};
  if (!all_agree(g, fields)) return kDisagree;
  a->rows = heads.rows_to(g.rank);
  a->bytes = sections_of(form_of(d), a->rows).bytes;
  a->most_tokens = heads.most_tokens();
  a->fits = all_fit(g, d, heads, fields);
  int64_t each = a->num_experts / g.num_ranks;
  int32_t* here = a->heads + g.num_ranks * heads.length();
  for (int64_t e = 0; e < each; e++) {
    int64_t n = 0;
    for (int s = 0; s < g.num_ranks; s++) n += heads.experts(s)[g.rank * each + e];
    here[e] = static_cast<int32_t>(up(n, a->alignment));
  }
  return 0;
}

// Write all rows where their receivers will read them, and wait for those that come here.
static int64_t write_rows(const Group& g, const Dispatch& d, const Heads& heads,
                          const Fields& offers, uint32_t tick) {
  static thread_local Direct to;
  aim(g, heads, offers, to);
  if (!write_all(g, d, to)) return kNoRoom;
  advance(g.stream[g.rank]->staged, tick + 1);
  for (int s = 0; s < g.num_ranks; s++)
    if (int64_t status = await_rank(g, s, g.stream[s]->staged, tick + 1)) return status;
  if (d.recv_token) take_out(d, to.to[g.rank], to.rows[g.rank]);
  catch_up(g, tick + 1);
  return 0;
}

// Announce and, where all pieces have room, write at once: all of a dispatch but its results beside
// x, which stay in the piece until wf_ep_take_out. So a rank that shares its core wakes up once.
WF_EXPORT int64_t wf_ep_announce_and_write(const Group* group, Dispatch* dispatch,
                                           Announcement* a) {
  int64_t status = wf_ep_announce(group, dispatch, a);
  if (status || !a->fits) return status;
  Dispatch& d = *dispatch;
  int64_t bytes = a->rows * d.x_bytes, threads = bytes / a->thread_bytes;
  d.big = bytes > a->big_bytes;
  if (!d.threads) d.threads = threads > a->cores ? a->cores : threads;
  Heads heads = heads_of(*group, d, *a);
  return write_rows(*group, d, heads, {a->heads, heads.length()}, static_cast<uint32_t>(d.base));
}

// What it left in the piece goes to the results beside x.
WF_EXPORT void wf_ep_take_out(const Group* group, const Dispatch* dispatch, const Announcement* a) {
  take_out(*dispatch, group->shared[group->rank] + a->room_at * kStep, a->rows);
}

// The rest of a dispatch, straight into the receivers' pieces.
WF_EXPORT int64_t wf_ep_direct(const Group* group, const Dispatch* dispatch,
                               const Announcement* a) {
  Heads heads = heads_of(*group, *dispatch, *a);
  return write_rows(*group, *dispatch, heads, {a->heads, heads.length()},
                    static_cast<uint32_t>(dispatch->base));
}

// Offer memory for a dispatch whose counts are those of an earlier one; returns at once.
WF_EXPORT int64_t wf_ep_offer(const Group* group, const Dispatch* dispatch, const Announcement* a) {
  put_fields(*group, *dispatch, *a, kRepeat);
  advance(group->stream[group->rank]->posted, static_cast<uint32_t>(a->count) + 1);
  return 0;
}

// The rest of it: learn the others' offers and write. 1: one is too small, nothing was written.
WF_EXPORT int64_t wf_ep_again(const Group* group, const Dispatch* dispatch, const Announcement* a) {
  const Group& g = *group;
  const Dispatch& d = *dispatch;
  int64_t status = collect(g, static_cast<uint32_t>(a->count), a->offers, 4 * kFields);
  if (status < 0) return status;
  Fields offers = {a->offers, kFields};
  if (!all_agree(g, offers)) return kDisagree;
  // The earlier dispatch may have had experts, this one has only their counts.
  Heads heads = {a->heads, g.num_ranks, a->num_experts, 0};
  if (!all_fit(g, d, heads, offers)) return 1;
  return write_rows(g, d, heads, offers, static_cast<uint32_t>(d.base));
}

}  // namespace wf_ep
