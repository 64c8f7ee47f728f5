// Stored rows by address, and bringing rows to come into L2 while others are used.
#pragma once
#include <algorithm>
#include "rows.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace wf::attention {
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int kTile = 64;
constexpr int kPanel = 192;   // by AMX's tiles: sums of O stay in them long enough to pay their way
constexpr int kPadding = 24;  // pointers behind a tile's last, all valid
constexpr int kScores = kLanes == 4 ? 8 : kLanes;  // accumulators of `scores`

// Stored rows, by address.
using Rows = const void* const*;
template <class Row>
inline const typename Row::Element* row_at(Rows rows, int64_t t) {
  return static_cast<const typename Row::Element*>(rows[t]);
}

// Where the rows of some keys are. Behind the last of n, the last is repeated.
template <int Keys>
struct KeyRows {
  static constexpr int kKeys = Keys;
  const void* k[Keys + kPadding];
  const void* v[Keys + kPadding];
  int n = 0;
};
using Tile = KeyRows<kTile>;
// Keys taken at once.
template <class Row>
using TileOf = KeyRows<kTiles<Row> ? kPanel : kTile>;

// Rows on their way into L1. A CPU drops a prefetch while its queue is full (Zen 5: of 64 lines,
// for L2 of 126), and arithmetic asks for lines faster than memory delivers them. A dropped line of
// a page just begun is a stall, since the machine's own prefetching takes a microsecond to find its
// stride there. So a line is asked for `Chances` times, so many rows before it is used: past L2,
// where it would push out another. Rows that are in L2 need one chance, and so do Intel's CPUs:
// they drop none, and fetch past L2 at a third of the speed.
constexpr int kLeads[] = {9, 12, 15, 18, 21};
constexpr int kNumLeads = sizeof kLeads / sizeof *kLeads;
static_assert(kLeads[kNumLeads - 1] <= kPadding);
inline bool drops_prefetches() {
#if defined(__x86_64__)
  unsigned most = 0, b = 0, c = 0, d = 0;
  static const bool intel = __get_cpuid(0, &most, &b, &c, &d) && c == signature_INTEL_ecx;
  return !intel;
#else
  return true;
#endif
}
template <int Chances>
class Nearing {
 public:
  explicit Nearing(Rows at) {
    for (int i = 0; i < Chances; ++i)
      rows_[i] = static_cast<const char*>(at[kLeads[Chances == 1 ? kNumLeads / 2 : i]]);
  }
  void line(int64_t offset) const {
#pragma GCC unroll 8
    for (int i = 0; i < Chances; ++i)
      Chances == 1 ? prefetch_l1(rows_[i] + offset) : prefetch_once(rows_[i] + offset);
  }

 private:
  const char* rows_[Chances];
};

// Rows to bring into L2 during one call of a kernel: a line at a time in the order of memory, as
// DRAM likes best, and spread over the call, since lines asked for in a burst wait for each other.
struct Fetch {
  Rows rows = nullptr;
  int count = 0;      // of rows
  int64_t bytes = 0;  // of a row
  int chances = 0;    // not 0: into L1, as `Nearing` does
  int64_t offset = 0, due = 0;

  // The lines due at one of `beats` moments of a call.
  int64_t each(int64_t beats) const {
    return beats ? ceil_div(count * ceil_div(bytes, 64), beats) : 0;
  }
  void lines(int64_t due) {
    if (chances) return chances == 1 ? near_row<1>() : near_row<kNumLeads>();
    for (; due > 0 && count > 0; --due) {
      prefetch_l2(static_cast<const char*>(*rows) + offset);
      offset += 64;
      if (offset >= bytes) offset = 0, ++rows, --count;
    }
  }
  template <int Chances>
  void near_row() {
    if (count <= 0) return;
    const Nearing<Chances> nearing(rows);
    for (int64_t at = 0; at < bytes; at += 64) nearing.line(at);
    ++rows, --count;
  }
  // What is due, where it has been found: that much with each call.
  void operator()() { lines(due); }
  // The same for each row, where it is one or two as a rule.
  void line_of_few(int64_t at) const {
    prefetch_l2(static_cast<const char*>(rows[0]) + at);
    for (int i = 1; i < count; ++i) prefetch_l2(static_cast<const char*>(rows[i]) + at);
  }
  // The same for one row, without the bookkeeping: what kernels bound by arithmetic can afford.
  void line_of_each(int64_t at) const {
    for (int i = 0; i < count; ++i) prefetch_l2(static_cast<const char*>(rows[i]) + at);
  }
};

// Rows shared out over the calls of a kernel.
class Share {
 public:
  int chances = 0;  // as Fetch's

  Share() = default;
  Share(Rows rows, int64_t count, int64_t bytes, int64_t calls)
      : rows_(rows), left_(int(count)), bytes_(bytes) {
    each_ = kEven ? int(calls) : calls ? int(ceil_div(count, calls)) : 0;
  }
  Fetch next() {
    if (left_ == 0) return {};  // else g++ counts in vectors, which wait behind the arithmetic
    const int count = kEven ? part() : std::min(each_, left_);
    left_ -= count;
    rows_ += count;
    return {rows_ - count, count, bytes_, chances};
  }

 private:
  // As evenly as whole rows allow, or as many each time and then none: each where it is faster.
  static constexpr bool kEven = kLanes == 8;
  int part() { return each_ > 0 ? int(ceil_div(left_, each_--)) : 0; }

  Rows rows_ = nullptr;
  int left_ = 0, each_ = 0;  // kEven: the calls that are left
  int64_t bytes_ = 0;
};
}  // namespace wf::attention
