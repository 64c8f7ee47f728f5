// Grouped products by what says whose rows are whose: an index of each row's group, the end of each
// group, or how many rows of each padded group count. Looks at all of it first, then makes one
// segment of each run of rows.
#pragma once
#include "gemm.h"

namespace wf::gemm {
enum Whose : int32_t { kIndex = 0, kEnds = 1, kCounts = 2 };

struct Grouped {
  Product product;  // its segments are made here
  const uint8_t* a;
  const uint8_t* a_scale;
  const uint8_t* b;
  const uint8_t* b_scale;
  uint8_t* d;
  const int32_t* whose;
  int64_t whose_step;  // in numbers
  int64_t rows, groups, k;
  int64_t a_row, a_scale_row, d_row;  // bytes from a row to the next
  int64_t a_group, a_scale_group, b_group, b_scale_group, d_group;
  int64_t alignment;  // of kEnds: where the next group starts
  int32_t form;
  int32_t zero_gaps;  // of kEnds: write 0 between an end and the next start
};

class GroupedRows {
 public:
  // Returns whether `whose` says only what can be; nothing is written otherwise.
  bool run(const Grouped& call, Gemm& gemm) {
    call_ = &call;
    segments_.clear();
    if (!is_sound()) return false;
    if (call.form == kIndex)
      by_index();
    else if (call.form == kEnds)
      by_ends();
    else
      for (int64_t g = 0; g < call.groups; ++g) add(g, 0, whose(g), true);
    if (segments_.empty() || call.product.n == 0) return true;
    Product product = call.product;
    product.segments = segments_.data();
    product.num_segments = int64_t(segments_.size());
    gemm.run(product);
    return true;
  }

 private:
  int64_t whose(int64_t i) const { return call_->whose[i * call_->whose_step]; }

  bool is_sound() const {
    const int64_t count = call_->form == kIndex ? call_->rows : call_->groups;
    const int64_t least = call_->form == kIndex ? -1 : call_->form == kCounts ? 0 : INT32_MIN;
    const int64_t most = call_->form == kIndex ? call_->groups - 1 : call_->rows;
    for (int64_t i = 0; i < count; ++i)
      if (whose(i) < least || whose(i) > most) return false;
    return true;
  }

  void by_index() {
    for (int64_t first = 0, last; first < call_->rows; first = last) {
      for (last = first + 1; last < call_->rows && whose(last) == whose(first);) ++last;
      if (whose(first) < 0)
        zero(first, last);
      else
        add(whose(first), first, last, false);
    }
  }

  void by_ends() {
    const int64_t alignment = std::min(call_->alignment, int64_t(1) << 40);  // beyond all rows
    int64_t start = 0;
    for (int64_t g = 0; g < call_->groups; ++g) {
      const int64_t end = whose(g), next = round_up(std::max(start, end), alignment);
      if (end > start) {
        add(g, start, end, false);
        if (call_->zero_gaps) zero(end, std::min(next, call_->rows));
      }
      start = next;
    }
  }

  void add(int64_t group, int64_t first, int64_t last, bool padded) {
    if (last <= first) return;
    const Grouped& c = *call_;
    const int64_t of = padded ? group : 0;  // operands that are one matrix have no groups
    const uint8_t* a_scale = c.a_scale;
    if (a_scale) a_scale += of * c.a_scale_group + first * c.a_scale_row;
    const uint8_t* b_scale = c.b_scale ? c.b_scale + group * c.b_scale_group : nullptr;
    segments_.push_back({c.a + of * c.a_group + first * c.a_row,
                         reinterpret_cast<const float*>(a_scale), c.b + group * c.b_group,
                         reinterpret_cast<const float*>(b_scale),
                         c.d + of * c.d_group + first * c.d_row, nullptr, last - first, c.k});
  }

  void zero(int64_t first, int64_t last) {
    const size_t bytes = size_t(call_->product.n * kind_bytes(call_->product.d_kind));
    for (int64_t row = first; row < last; ++row)
      std::memset(call_->d + row * call_->d_row, 0, bytes);
  }

  const Grouped* call_ = nullptr;
  std::vector<Segment> segments_;
};
}  // namespace wf::gemm
