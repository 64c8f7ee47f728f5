// Read n pieces of files and check the CRC-32 of each, in one call without the GIL.
//
// A piece is read in parts that fit the L2 cache and each part's CRC is taken while it is there, so
// memory is gone through once. Bound: the kernel's copy out of the page cache.
// `crc` is comm's wf_crc32 (value, data, bytes, table_only), given as an address.
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

namespace {

constexpr size_t kPart = 128 << 10;

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

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// fds, offsets, sizes, out: [n]. found: [n], the CRC of each piece, if crc is given.
// *error: 0, errno, or -1 for a short file; gives the piece at which it happened, or n.
int64_t wf_read_batch(const int32_t* fds, const int64_t* offsets, const int64_t* sizes,
                      uint8_t* const* out, uint32_t* found, int64_t n, Crc crc, int table_only,
                      int* error) {
  for (int64_t i = 0; i < n; i++) {
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
