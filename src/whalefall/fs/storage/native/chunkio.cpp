// Batched chunk IO with CRC-32C in the same pass.
//   write: per 64 KiB block, crc then pwrite while the block is in cache; whole = combine(blocks)
//   read:  per request, pread of the blocks it touches, crc compared with the recorded one
// Bound: memory bandwidth (three crc32 chains of 8 bytes a cycle outrun it).
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

#include <memory>

namespace {

constexpr uint32_t kPoly = 0x82F63B78u;

using Matrix = uint32_t[32];

uint32_t times(const Matrix& matrix, uint32_t vector) {
  uint32_t sum = 0;
  for (int bit = 0; vector; vector >>= 1, ++bit)
    if (vector & 1) sum ^= matrix[bit];
  return sum;
}

// powers[k]: appends 2^k zero bytes to a checksum.
struct Powers {
  Matrix power[48];
  uint32_t table[8][256];
  Powers() {
    Matrix bit, even;
    bit[0] = kPoly;
    for (int i = 1; i < 32; ++i) bit[i] = 1u << (i - 1);
    for (int i = 0; i < 32; ++i) even[i] = times(bit, bit[i]);      // 2 bits
    for (int i = 0; i < 32; ++i) bit[i] = times(even, even[i]);     // 4 bits
    for (int i = 0; i < 32; ++i) power[0][i] = times(bit, bit[i]);  // 8 bits
    for (int k = 1; k < 48; ++k)
      for (int i = 0; i < 32; ++i) power[k][i] = times(power[k - 1], power[k - 1][i]);
    for (uint32_t n = 0; n < 256; ++n) {
      uint32_t crc = n;
      for (int k = 0; k < 8; ++k) crc = crc & 1 ? (crc >> 1) ^ kPoly : crc >> 1;
      table[0][n] = crc;
    }
    for (int t = 1; t < 8; ++t)
      for (int n = 0; n < 256; ++n)
        table[t][n] = table[0][table[t - 1][n] & 255] ^ (table[t - 1][n] >> 8);
  }
  uint32_t shift(uint32_t crc, uint64_t bytes) const {
    for (int k = 0; bytes; bytes >>= 1, ++k)
      if (bytes & 1) crc = times(power[k], crc);
    return crc;
  }
};

const Powers& powers() {
  static const Powers instance;
  return instance;
}

uint64_t load(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, 8);
  return value;
}

#if defined(__SSE4_2__)
uint32_t raw(uint32_t crc, const uint8_t* data, size_t size) {
  constexpr size_t kStripe = 2048;  // three independent chains hide crc32's latency of 3 cycles
  uint64_t value = crc;
  while (size >= 3 * kStripe) {
    uint64_t one = value, two = 0, three = 0;
    for (size_t i = 0; i < kStripe; i += 8) {
      one = __builtin_ia32_crc32di(one, load(data + i));
      two = __builtin_ia32_crc32di(two, load(data + kStripe + i));
      three = __builtin_ia32_crc32di(three, load(data + 2 * kStripe + i));
    }
    const Matrix& by = powers().power[11];
    value = times(by, times(by, static_cast<uint32_t>(one)) ^ static_cast<uint32_t>(two)) ^
            static_cast<uint32_t>(three);
    data += 3 * kStripe;
    size -= 3 * kStripe;
  }
  for (; size >= 8; size -= 8, data += 8) value = __builtin_ia32_crc32di(value, load(data));
  for (; size; --size, ++data) value = __builtin_ia32_crc32qi(static_cast<uint32_t>(value), *data);
  return static_cast<uint32_t>(value);
}
#else
uint32_t raw(uint32_t crc, const uint8_t* data, size_t size) {
  const auto& table = powers().table;
  for (; size >= 8; size -= 8, data += 8) {
    const uint64_t x = load(data) ^ crc;
    crc = 0;
    for (int t = 0; t < 8; ++t) crc ^= table[7 - t][(x >> (8 * t)) & 255];
  }
  for (; size; --size, ++data) crc = table[0][(crc ^ *data) & 255] ^ (crc >> 8);
  return crc;
}
#endif

uint32_t crc32c(const uint8_t* data, size_t size) { return ~raw(~0u, data, size); }

int write_all(int fd, const uint8_t* data, int64_t size, int64_t offset) {
  while (size) {
    const ssize_t done = pwrite(fd, data, size, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return done ? errno : ENOSPC;
    data += done, offset += done, size -= done;
  }
  return 0;
}

// Bytes read (fewer only at the end of the file), or -errno.
int64_t read_all(int fd, uint8_t* data, int64_t size, int64_t offset) {
  int64_t got = 0;
  while (got < size) {
    const ssize_t done = pread(fd, data + got, size - got, offset + got);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return -errno;
    if (!done) break;
    got += done;
  }
  return got;
}

constexpr int kCorrupt = -100000;

// One request: [offset, offset + length) of a chunk of `size` bytes that starts at `place`.
int read_one(int fd, int64_t place, int64_t size, int64_t offset, int64_t length,
             const uint32_t* crcs, int64_t block, uint8_t* out, uint8_t* scratch) {
  for (int64_t at = offset; at < offset + length;) {
    const int64_t start = at / block * block;
    const int64_t end = start + block < size ? start + block : size;
    const int64_t take = (end < offset + length ? end : offset + length) - at;
    const bool whole = at == start && take == end - start;
    uint8_t* target = whole ? out : scratch;
    const int64_t got = read_all(fd, target, end - start, place + start);
    if (got < 0) return static_cast<int>(got);
    if (got < end - start || crc32c(target, end - start) != crcs[start / block]) return kCorrupt;
    if (!whole) std::memcpy(out, scratch + (at - start), take);
    out += take, at += take;
  }
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT uint32_t wf_fs_crc32c(const uint8_t* data, int64_t size) { return crc32c(data, size); }

// Returns 0 or errno. crcs: one per block; whole: of everything. fd < 0: only the checksums.
EXPORT int wf_fs_write(int fd, int64_t place, const uint8_t* data, int64_t size, int64_t block,
                       uint32_t* crcs, uint32_t* whole) {
  uint32_t all = 0;
  for (int64_t at = 0; at < size; at += block) {
    const int64_t take = size - at < block ? size - at : block;
    const uint32_t crc = crc32c(data + at, take);
    crcs[at / block] = crc;
    all = powers().shift(all, take) ^ crc;
  }
  *whole = all;
  return fd < 0 ? 0 : write_all(fd, data, size, place);
}

// status[i]: 0, -errno, or -100000 for a checksum that does not match.
EXPORT void wf_fs_read(int64_t count, const int32_t* fds, const int64_t* places,
                       const int64_t* sizes, const int64_t* offsets, const int64_t* lengths,
                       const uint32_t* const* crcs, int64_t block, uint8_t* const* outs,
                       int32_t* status) {
  std::unique_ptr<uint8_t[]> scratch(new uint8_t[block]);
  // A cold batch: let the disk work on all of it at once.
  for (int64_t i = 0; count > 1 && i < count; ++i)
    if (lengths[i] >= 2 * block)
      posix_fadvise(fds[i], places[i] + offsets[i], lengths[i], POSIX_FADV_WILLNEED);
  for (int64_t i = 0; i < count; ++i)
    status[i] = read_one(fds[i], places[i], sizes[i], offsets[i], lengths[i], crcs[i], block,
                         outs[i], scratch.get());
}
