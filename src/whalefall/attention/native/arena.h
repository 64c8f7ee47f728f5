// Memory that kernels keep from call to call.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace wf::attention {
// Memory of one thread that stays for its next call; it grows, and is 64-byte aligned.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = (count + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_t(size_) * sizeof(float)));
      if (!data_) size_ = 0, std::abort();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};
}  // namespace wf::attention
