// Ep room: the collectives of one process over the shared memory of its host.
// wire.h says what lies there; dispatch.h, announce.h and combine.h are the two directions.
#include <vector>

#include "announce.h"
#include "cast.h"
#include "combine.h"
#include "dispatch.h"
#include "wire.h"

using namespace wf_ep;

// Counts of a routing. -1 - t where token t names an expert that does not exist.
WF_EXPORT int64_t wf_ep_layout(const int64_t* topk_idx, int64_t tokens, int64_t top_k,
                               int64_t experts, int64_t ranks, const int32_t* host_of,
                               int64_t hosts, int32_t* per_rank, int32_t* per_host,
                               int32_t* per_expert, uint8_t* in_rank) {
  memset(per_rank, 0, 4 * ranks);
  memset(per_host, 0, 4 * hosts);
  memset(per_expert, 0, 4 * experts);
  memset(in_rank, 0, tokens * ranks);
  int64_t each = experts / ranks;
  for (int64_t t = 0; t < tokens; t++) {
    uint8_t* here = in_rank + t * ranks;
    for (int64_t k = 0; k < top_k; k++) {
      int64_t e = topk_idx[t * top_k + k];
      if (e == -1) continue;
      if (e < 0 || e >= experts) return -1 - t;
      per_expert[e]++;
      here[e / each] = 1;
    }
    int64_t last = -1;
    for (int64_t r = 0; r < ranks; r++) {
      if (!here[r]) continue;
      per_rank[r]++;
      if (host_of[r] != last) per_host[host_of[r]]++;
      last = host_of[r];
    }
  }
  return 0;
}

// Put this rank's header into its mailbox as number `count`, once the mailbox is free.
WF_EXPORT int64_t wf_ep_post(const Group* g, uint32_t count, const void* header, int64_t bytes) {
  memcpy(g->mailbox[g->rank] + (count % g->mailboxes) * g->mailbox_bytes, header, bytes);
  advance(g->stream[g->rank]->posted, count + 1);
  return 0;
}

// Collect header number `count` of every rank into out [R, bytes]; a masked rank's is all zeros.
// 1: they are there, but do not agree.
WF_EXPORT int64_t wf_ep_collect(const Group* g, uint32_t count, void* out, int64_t bytes) {
  if (int64_t status = collect(*g, count, out, bytes)) return status;
  return !all_agree(*g, {static_cast<const int32_t*>(out), bytes / 4});
}

// Wait until tick's slot is free on this host.
WF_EXPORT int64_t wf_ep_await_slot(const Group* g, uint32_t tick) { return await_slot(*g, tick); }

// A proxy has filled the slot of a remote rank's stream.
WF_EXPORT void wf_ep_staged(const Group* g, int64_t rank, uint32_t tick) {
  advance(g->stream[rank]->staged, tick + 1);
}

WF_EXPORT void wf_ep_posted(const Group* g, int64_t rank, uint32_t count) {
  advance(g->stream[rank]->posted, count + 1);
}

// Nothing more will come from `rank` of another host: whoever waits for it gets `status`.
WF_EXPORT void wf_ep_failed(const Group* g, int64_t rank, int64_t status) {
  uint32_t nothing = 0;  // the first reason stays: a rank that gives up closes its connections too
  g->stream[rank]->failed.compare_exchange_strong(nothing, static_cast<uint32_t>(-status));
}

// This rank waits for `rank` outside of this library; -1: no longer.
WF_EXPORT void wf_ep_awaits(const Group* g, int64_t rank) {
  say(g->control[g->local]->waiting, static_cast<int>(rank));
}

// The status of a wait for `rank` outside of this library whose time is up.
WF_EXPORT int64_t wf_ep_silence(const Group* g, int64_t rank) {
  int64_t status = told(*g);
  return status ? status : -(kSilent + culprit(*g, static_cast<int>(rank)));
}

// The rank that this one waits for, -1: none.
WF_EXPORT int64_t wf_ep_awaited(const Group* g) {
  return g->control[g->local]->waiting.awaited.load() - 1;
}

// The rank that another one waits for in these calls, -1: none.
WF_EXPORT int64_t wf_ep_awaited_by(const Group* g, int64_t rank) {
  return awaited_by(*g, static_cast<int>(rank));
}

// A rank of another host tells that it waits for `awaited`; -1: no longer.
WF_EXPORT void wf_ep_told_awaited(const Group* g, int64_t rank, int64_t awaited) {
  say(g->stream[rank]->waiting, static_cast<int>(awaited));
}

// This thread forwards for other ranks: what it waits for is not what its rank waits for.
WF_EXPORT void wf_ep_forwards() { Awaiting::is_forwarding() = true; }

// This rank takes part in nothing more: whoever waits for it gets `status`.
WF_EXPORT void wf_ep_give_up(const Group* g, int64_t status) {
  g->control[g->local]->gave_up.store(status);
}

// This rank has done `tick`, in whatever order (the low-latency form); or all before `tick`.
WF_EXPORT void wf_ep_done(const Group* g, uint32_t tick) { end_tick(*g, tick); }
WF_EXPORT void wf_ep_done_before(const Group* g, uint32_t tick) { catch_up(*g, tick); }

WF_EXPORT int64_t wf_ep_is_alive(const Group* g, int64_t local) {
  return is_alive(*g, static_cast<int>(local));
}

// Pack a block for another host into `out`; returns its bytes.
WF_EXPORT int64_t wf_ep_pack(const Group* g, const Dispatch* d, int64_t begin, int64_t end,
                             const int32_t* ranks, int64_t n, uint8_t* out) {
  return pack(*g, *d, begin, end, ranks, static_cast<int>(n), g->rank, out);
}

// Pull one tick from every source: each with cursors of its own, so threads may share them out.
static int64_t pull_tick(const Group& g, const Dispatch& d, int64_t begin, int64_t end,
                         uint32_t tick) {
  std::vector<int64_t> status(g.num_ranks, 0);
  auto pull = [&](int64_t n) {  // everyone starts with itself, then with another neighbour
    int s = static_cast<int>((g.rank + n) % g.num_ranks);
    if (status[s]) return;  // masked
    bool fits;
    if (n == 0 && !d.keep_own) {
      std::vector<int32_t> ids(d.top_k + 1);
      fits = pull_own(g, d, begin, end, ids.data());
    } else {
      fits = pull_block(g, d, s, slot_at(g, s, tick));
    }
    if (!fits) status[s] = kNoRoom;
    if (d.big) fence_streams();
  };
  auto arrived = [&](int64_t n) {
    int s = static_cast<int>((g.rank + n) % g.num_ranks);
    int64_t began = d.waited_ns ? now_ns() : 0;
    status[s] = await_rank(g, s, g.stream[s]->staged, tick + 1);
    if (d.waited_ns) d.waited_ns[s] += now_ns() - began;
    return status[s] >= 0;
  };
  if (d.threads > 1) {
    for (int64_t n = 1; n < g.num_ranks; n++)
      if (!arrived(n)) return status[(g.rank + n) % g.num_ranks];
    wf::parallel_for(g.num_ranks, [&](int64_t n, int) { pull(n); });
  } else {
    pull(0);
    for (int64_t n = 1; n < g.num_ranks; n++) {
      if (!arrived(n)) return status[(g.rank + n) % g.num_ranks];
      pull(n);
    }
  }
  for (int64_t one : status)
    if (one < 0) return one;
  return 0;
}

// The data phase of a dispatch, all ticks; d->stage and d->pull choose the halves.
WF_EXPORT int64_t wf_ep_dispatch(const Group* group, const Dispatch* dispatch) {
  const Group& g = *group;
  const Dispatch& d = *dispatch;
  if (d.stage && d.pull) catch_up(g, d.base);
  for (int64_t i = 0; i < d.ticks; i++) {
    uint32_t tick = static_cast<uint32_t>(d.base + i);
    int64_t begin = i * d.block < d.tokens ? i * d.block : d.tokens;
    int64_t end = begin + d.block < d.tokens ? begin + d.block : d.tokens;
    if (d.stage) {
      if (int64_t status = await_slot(g, tick)) return status;
      int64_t most = (end - begin) * (row_bytes(d) + sizeof(Meta)) + 128;
      if (int64_t status = reserve(g, tick, most)) return status;
      pack(g, d, begin, end, g.rank_of, g.num_local, d.keep_own ? -1 : g.rank,
           slot_at(g, g.rank, tick));
      advance(g.stream[g.rank]->staged, tick + 1);
    }
    if (!d.pull) continue;
    int64_t status = pull_tick(g, d, begin, end, tick);
    if (int64_t its = left(g)) status = its;
    if (status) return status;
    if (d.stage)
      catch_up(g, d.base + i + 1);
    else
      end_tick(g, tick);
  }
  return 0;
}

// Stage tick i of a combine. `stride`: of staged rows, 0 for the natural one.
WF_EXPORT int64_t wf_ep_combine_stage(const Group* group, const Combine* combine, int64_t i,
                                      int64_t max_entries, int64_t stride) {
  const Group& g = *group;
  const Combine& c = *combine;
  uint32_t tick = static_cast<uint32_t>(c.base + i);
  if (int64_t status = await_slot(g, tick)) return status;
  int64_t ticks = c.most > 0 ? (c.most + c.block - 1) / c.block : 1;
  int64_t status = stage_rows(g, c, (i + 1) * c.block, max_entries, stride, tick,
                              static_cast<int32_t>(c.base + ticks));
  if (status == 0) advance(g.stream[g.rank]->staged, tick + 1);
  return status;
}

// Say in header number `count` which form of combine this is.
WF_EXPORT void wf_ep_post_form(const Group* g, const Combine* c, uint32_t count) {
  auto* to =
      reinterpret_cast<int32_t*>(g->mailbox[g->rank] + (count % g->mailboxes) * g->mailbox_bytes);
  memset(to, 0, 4 * kFields);
  to[kKind] = kCombine;
  to[kXBytes] = static_cast<int32_t>(c->hidden);
  to[kFlags] = form_of(*c);
  to[kExtra] = c->serial;
  to[kCall] = c->call;
  advance(g->stream[g->rank]->posted, count + 1);
}

// What each rank of this host says of the combine that it staged at `tick`: [R, fields].
WF_EXPORT void wf_ep_combine_said(const Group* group, int64_t tick, int32_t* out) {
  for (int r = 0; r < group->num_ranks; r++) {
    if (group->local_of[r] < 0 || group->masked[r]) continue;
    const Elsewhere& its = said_at(*group, r, static_cast<uint32_t>(tick));
    int32_t* to = out + r * kFields;
    to[kKind] = its.kind;
    to[kXBytes] = its.hidden;
    to[kFlags] = its.form;
    to[kExtra] = its.serial;
    to[kCall] = its.call;
  }
}

// Wait until the local ranks have staged tick i; at the first find whether they combine alike.
WF_EXPORT int64_t wf_ep_combine_await(const Group* group, int64_t base, int64_t i,
                                      int64_t* waited_ns) {
  const Group& g = *group;
  for (int l = 0; l < g.num_local; l++) {
    int rank = g.rank_of[l];
    int64_t began = waited_ns ? now_ns() : 0;
    int64_t status =
        await_rank(g, rank, g.stream[rank]->staged, static_cast<uint32_t>(base + i + 1));
    if (waited_ns) waited_ns[rank] += now_ns() - began;
    if (status < 0) return status;
  }
  bool alike = i > 0 || all_give_alike(g, static_cast<uint32_t>(base));
  if (int64_t status = left(g)) return status;
  return alike ? 0 : kDisagree;
}

WF_EXPORT int64_t wf_ep_combine_sum(const Group* group, const Combine* combine, int64_t i,
                                    int64_t max_entries, int64_t stride, int64_t* own) {
  const Combine& c = *combine;
  int64_t begin = i * c.block < c.tokens ? i * c.block : c.tokens;
  int64_t end = begin + c.block < c.tokens ? begin + c.block : c.tokens;
  int64_t parts = c.threads > 1 && end - begin >= 2 * c.threads ? c.threads : 1, last = *own;
  auto bound = [&](int64_t part) { return begin + (end - begin) * part / parts; };
  std::atomic<bool> whole{true};
  wf::parallel_for(parts, [&](int64_t part, int) {
    int64_t mine = *own;
    if (!sum_block(*group, c, begin, bound(part), bound(part + 1),
                   static_cast<uint32_t>(c.base + i), max_entries, stride, &mine))
      whole = false;
    if (c.big) fence_streams();
    if (part + 1 == parts) last = mine;
  });
  *own = last;
  // Who has no rows for this rank took no part in its dispatch with it.
  return whole ? left(*group) : -(kSilent + group->rank);
}

// Returns the bytes written to `out`, or kMiscounted: some rank of this host went on without the
// source; or the status that ends this rank.
WF_EXPORT int64_t wf_ep_combine_forward(const Group* group, const Combine* combine, int64_t source,
                                        int64_t i, int64_t max_entries, int64_t stride,
                                        int64_t first, int64_t last, const uint64_t* mask,
                                        const int32_t* idx, uint8_t* out) {
  int64_t used = forward_block(*group, *combine, static_cast<int>(source),
                               static_cast<uint32_t>(combine->base + i), max_entries, stride, first,
                               last, mask, idx, out);
  if (int64_t status = left(*group)) return status;
  return group->stream[source]->left.load() ? kMiscounted : used;
}

// All ticks of a combine within one host; `heads` are those of its dispatch.
WF_EXPORT int64_t wf_ep_combine(const Group* group, Combine* combine, const int32_t* heads,
                                int64_t num_experts, int64_t ticks, int64_t max_entries) {
  const Group& g = *group;
  Combine c = *combine;
  Heads counts = {heads, g.num_ranks, num_experts, c.per_selection};
  int64_t start[kMaxRanks + 1] = {0}, cursor[kMaxRanks], staged = 0;
  for (int s = 0; s < g.num_ranks; s++) start[s + 1] = start[s] + counts.rows(s, g.rank);
  memcpy(cursor, start, sizeof cursor);
  c.order_start = start;
  c.cursor = cursor;
  int64_t own = start[g.rank];
  catch_up(g, c.base);
  auto first = static_cast<uint32_t>(c.base), last = static_cast<uint32_t>(c.base + ticks - 1);
  bool at_once = false;
  for (int64_t i = 0; i < ticks && !at_once; i++) {
    // One tick ahead, so that no rank waits for what its neighbours are staging now; but rows that
    // stay where they are may need one tick in all.
    int64_t ahead = i == 0 && c.shared_at >= 0 ? 1 : i + g.slots, status = 0;
    for (; !status && staged < ticks && staged < ahead; staged++)
      status = wf_ep_combine_stage(group, &c, staged, max_entries, 0);
    if (!status) status = wf_ep_combine_await(group, c.base, i, nullptr);
    if (status == kDisagree) combine->base += tick_after(g, first) - first;  // where all go on
    if (!status && i == 0 && all_stay(g, first)) {
      at_once = true;
      c.block = c.most;
    }
    if (!status) status = wf_ep_combine_sum(group, &c, i, max_entries, 0, &own);
    if (status) return status;
    catch_up(g, (at_once ? c.base + ticks - 1 : c.base + i) + 1);
  }
  return c.shared_at < 0 ? 0 : await_readers(g, last);
}

// bf16 rows to FP8 rows [T, hidden] and scales [T, hidden / 128].
WF_EXPORT void wf_ep_cast(const uint16_t* x, int64_t stride, int64_t tokens, int64_t hidden,
                          int64_t round_scale, uint8_t* out, float* scales) {
  for (int64_t t = 0; t < tokens; t++)
    cast_row(x + t * stride, hidden, round_scale, out + t * hidden, scales + t * (hidden / 128));
}

// Rows [rows, hidden] of bf16 through LogFMT and back, as floats; returns the bytes between.
WF_EXPORT int64_t wf_ep_through_log(const uint16_t* x, int64_t rows, int64_t hidden, float* out) {
  std::vector<uint8_t> row(log_most_bytes(hidden));
  int64_t bytes = 0;
  for (int64_t i = 0; i < rows; i++, x += hidden, out += hidden) {
    bytes += log_encode(x, hidden, row.data());
    log_decode(row.data(), hidden, out);
  }
  return bytes;
}
