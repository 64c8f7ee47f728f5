// Read n pieces of files and check the CRC-32 of each, in one call without the GIL.
//
// A small piece is copied out of the mapped file: that costs half of what pread does, on pages that
// are in the page cache. A page that cannot be had (the file was cut, the disk failed) raises
// SIGBUS there; the copy then ends and pread tells what is wrong. Where a copy took so long that
// the disk must have been asked, the kernel is told the rest of the batch, to fetch it all at once.
// A large piece is read in parts that fit the L2 cache and each part's CRC is taken while it is
// there, so memory is gone through once. Bound: the copy out of the page cache.
// `crc` is comm's wf_crc32 (value, data, bytes, table_only), given as an address.
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace {

constexpr size_t kPart = 128 << 10;
constexpr int64_t kMapped = 32 << 10;  // pieces up to this size are copied from the mapping
constexpr int64_t kAhead = 2 << 10;    // of the next piece, fetched into the cache meanwhile
constexpr int64_t kSlowNs = 40'000;    // far more than a copy of kMapped, far less than a disk

using Crc = uint32_t (*)(uint32_t, const void*, size_t, int);

// 0, or errno, or -1 if the file ended too soon
int read_part(int fd, uint8_t* to, size_t bytes, int64_t offset) {
  while (bytes > 0) {
    ssize_t got = pread(fd, to, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return -1;
    to += got;
    bytes -= static_cast<size_t>(got);
    offset += got;
  }
  return 0;
}

// Where this thread goes on if a page of a mapping cannot be had.
thread_local sigjmp_buf* volatile after_fault = nullptr;
struct sigaction handler_before;

void on_fault(int signal, siginfo_t*, void*) {
  if (after_fault) siglongjmp(*after_fault, 1);
  // Not ours: whoever was there before sees it when the instruction is tried again.
  sigaction(signal, &handler_before, nullptr);
}

bool catch_faults() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGBUS, &action, &handler_before) == 0;
}

bool copy(uint8_t* to, const uint8_t* from, size_t bytes) {
  sigjmp_buf here;
  if (sigsetjmp(here, 0)) {
    after_fault = nullptr;
    return false;
  }
  after_fault = &here;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // the copy stays in between
  memcpy(to, from, bytes);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  after_fault = nullptr;
  return true;
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// fds, offsets, sizes, out: [n]. maps: [n], where the piece's file is mapped, or 0 for pread.
// found: [n], the CRC of each piece, if crc is given.
// *error: 0, errno, or -1 for a short file; gives the piece at which it happened, or n.
int64_t wf_read_batch(const int32_t* fds, const uint8_t* const* maps, const int64_t* offsets,
                      const int64_t* sizes, uint8_t* const* out, uint32_t* found, int64_t n,
                      Crc crc, int table_only, int* error) {
  static const bool guarded = catch_faults();
  bool told = false;
  int64_t before = now_ns();
  for (int64_t i = 0; i < n; i++) {
    // Without a CRC the zeros behind a cut in a page would pass for data.
    if (crc && guarded && maps && maps[i] && sizes[i] <= kMapped &&
        copy(out[i], maps[i] + offsets[i], static_cast<size_t>(sizes[i]))) {
      if (i + 1 < n && maps[i + 1])
        for (int64_t line = 0; line < kAhead && line < sizes[i + 1]; line += 64)
          __builtin_prefetch(maps[i + 1] + offsets[i + 1] + line);
      found[i] = crc(0, out[i], static_cast<size_t>(sizes[i]), table_only);
      const int64_t now = told ? before : now_ns();
      if (now - before > kSlowNs) {
        told = true;
        for (int64_t k = i + 1; k < n; k++)
          posix_fadvise(fds[k], offsets[k], sizes[k], POSIX_FADV_WILLNEED);
      }
      before = now;
      continue;
    }
    uint32_t value = 0;
    for (int64_t at = 0; at < sizes[i];) {
      int64_t left = sizes[i] - at;
      // without a CRC to take there is nothing to keep in the cache
      size_t part = !crc || left < (int64_t)(kPart + kPart / 2) ? (size_t)left : kPart;
      *error = read_part(fds[i], out[i] + at, part, offsets[i] + at);
      if (*error) return i;
      if (crc) value = crc(value, out[i] + at, part, table_only);
      at += (int64_t)part;
    }
    if (crc) found[i] = value;
  }
  *error = 0;
  return n;
}
}
#pragma GCC visibility pop
