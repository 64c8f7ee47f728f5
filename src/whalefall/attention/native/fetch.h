// Stored rows by address, and bringing rows to come into L2 while others are used.
#pragma once
#include <algorithm>
#include "rows.h"

namespace wf::attention {
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int kTile = 64;
constexpr int kPadding = 16;                       // pointers behind a tile's last, all valid
constexpr int kScores = kLanes == 4 ? 8 : kLanes;  // accumulators of `scores`

// Stored rows, by address.
using Rows = const void* const*;
template <class Row>
inline const typename Row::Element* row_at(Rows rows, int64_t t) {
  return static_cast<const typename Row::Element*>(rows[t]);
}

// Rows to bring into L2 during one call of a kernel: a line at a time in the order of memory, as
// DRAM likes best, and spread over the call, since lines asked for in a burst wait for each other.
struct Fetch {
  Rows rows = nullptr;
  int count = 0;      // of rows
  int64_t bytes = 0;  // of a row
  bool near = false;  // into L1
  int64_t offset = 0;

  // The lines due at one of `beats` moments of a call.
  int64_t each(int64_t beats) const {
    return beats ? ceil_div(count * ceil_div(bytes, 64), beats) : 0;
  }
  void lines(int64_t due) {
    if (near) return lines_near(due);
    for (; due > 0 && count > 0; --due) {
      prefetch_l2(static_cast<const char*>(*rows) + offset);
      offset += 64;
      if (offset >= bytes) offset = 0, ++rows, --count;
    }
  }
  void lines_near(int64_t due) {
    while (due > 0 && count > 0) {
      const char* line = static_cast<const char*>(*rows) + offset;
      const int64_t now = std::min(due, ceil_div(bytes - offset, 64));
      for (int64_t i = 0; i < now; ++i) prefetch_l1(line + i * 64);
      due -= now, offset += now * 64;
      if (offset >= bytes) offset = 0, ++rows, --count;
    }
  }
  // The same for one row, without the bookkeeping: what kernels bound by arithmetic can afford.
  void line_of_each(int64_t at) const {
    for (int i = 0; i < count; ++i) prefetch_l2(static_cast<const char*>(rows[i]) + at);
  }
};

// Rows shared out over the calls of a kernel.
class Share {
 public:
  bool near = false;  // into L1

  Share() = default;
  Share(Rows rows, int64_t count, int64_t bytes, int64_t calls)
      : rows_(rows), left_(int(count)), bytes_(bytes) {
    each_ = calls ? int(ceil_div(count, calls)) : 0;
  }
  Fetch next() {
    const int count = std::min(each_, left_);
    left_ -= count;
    rows_ += count;
    return {rows_ - count, count, bytes_, near};
  }

 private:
  Rows rows_ = nullptr;
  int left_ = 0, each_ = 0;
  int64_t bytes_ = 0;
};
}  // namespace wf::attention
