// Batched chunk IO with CRC-32C in the same pass; the CRC itself is comm's.
//   write: per 64 KiB block its CRC, then a write past the page cache; whole = all CRCs combined
//   read:  a piece of half a block or more: the block is read and compared with its
//   recorded CRC;
//          a smaller piece: only the 4 KiB units it touches, each compared with the unit's CRC
// CRCs of units are kept in memory for blocks read lately and are believed only if they combine to
// the block's recorded CRC. So an entry that is stale, torn, or another block's is merely a miss,
// and every byte that leaves here was checked after it was read. Bound: the copy from the cache.
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace {

constexpr int64_t kBlock = 64 << 10, kUnit = 4 << 10, kUnits = kBlock / kUnit;
constexpr int64_t kKept = 1 << 16;  // blocks whose units' CRCs are kept: 4 MiB for 4 GiB of data
constexpr int64_t kAligned = 4 << 10, kCopied = 1 << 20;  // of writes past the page cache
constexpr int kCorrupt = -100000;

using Crc = uint32_t (*)(uint32_t, const void*, size_t, int);
using Combine = uint32_t (*)(int, uint32_t, uint32_t, uint64_t);

// As wf_fs_setup was given them.
Crc crc_of;
Combine combine_of;
int table_only;

uint32_t crc32c(const uint8_t* data, size_t size) { return crc_of(0, data, size, table_only); }

// shift(crc): the CRC after as many zero bytes as the table is for; combining is linear.
struct Shift {
  uint32_t table[4][256];
  void make(int64_t bytes) {
    for (uint32_t i = 0; i < 4; ++i)
      for (uint32_t value = 0; value < 256; ++value)
        table[i][value] = combine_of(1, value << (8 * i), 0, bytes);
  }
  uint32_t operator()(uint32_t crc) const {
    return table[0][crc & 255] ^ table[1][(crc >> 8) & 255] ^ table[2][(crc >> 16) & 255] ^
           table[3][crc >> 24];
  }
};
Shift by_unit, by_block;

std::atomic<uint32_t> kept[kKept][kUnits];

// A chunk's content as the caller's records have it.
struct Content {
  int64_t fd, place, size;
  const uint32_t* crcs;
};

std::atomic<uint32_t>* kept_of(int64_t fd, int64_t at) {
  const uint64_t key = static_cast<uint64_t>(at / kBlock) * 0x9E3779B97F4A7C15u ^
                       static_cast<uint64_t>(fd) * 0xBF58476D1CE4E5B9u;
  return kept[key >> 48];
}

// The CRC of a block from those of its units.
uint32_t combined(const uint32_t* units, int64_t size) {
  uint32_t all = units[0];
  int64_t unit = 1;
  for (; (unit + 1) * kUnit <= size; ++unit) all = by_unit(all) ^ units[unit];
  return unit * kUnit < size ? combine_of(1, all, units[unit], size - unit * kUnit) : all;
}

// 0 or errno.
int write_all(int fd, const uint8_t* data, int64_t size, int64_t offset) {
  while (size) {
    const ssize_t done = pwrite(fd, data, size, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return done ? errno : ENOSPC;
    data += done, offset += done, size -= done;
  }
  return 0;
}

// As write_all past the page cache, whose fresh pages cost several times the write: whole kAligned
// units straight from aligned memory, all else by way of an aligned copy. The last unit is filled
// up with zeros, which the slot has room for.
int write_direct(int fd, const uint8_t* data, int64_t size, int64_t offset) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kAligned == 0;
  const int64_t straight = aligned ? size / kAligned * kAligned : 0;
  int status = write_all(fd, data, straight, offset);
  if (status || straight == size) return status;
  const int64_t room = std::min(kCopied, (size - straight + kAligned - 1) / kAligned * kAligned);
  void* memory;
  if (posix_memalign(&memory, kAligned, room)) return ENOMEM;
  for (int64_t at = straight; at < size && !status; at += room) {
    const int64_t take = std::min(room, size - at);
    const int64_t filled = (take + kAligned - 1) / kAligned * kAligned;
    std::memcpy(memory, data + at, take);
    std::memset(static_cast<uint8_t*>(memory) + take, 0, filled - take);
    status = write_all(fd, static_cast<uint8_t*>(memory), filled, offset + at);
  }
  std::free(memory);
  return status;
}

// 0, -errno, or kCorrupt where the file ends too early.
int read_all(int fd, uint8_t* data, int64_t size, int64_t offset) {
  while (size) {
    const ssize_t done = pread(fd, data, size, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return -errno;
    if (!done) return kCorrupt;
    data += done, offset += done, size -= done;
  }
  return 0;
}

// The units of a block that hold [from, from + take), if their CRCs are kept and match.
bool read_units(int fd, int64_t at, int64_t size, uint32_t crc, int64_t from, int64_t take,
                uint8_t* out, uint8_t* scratch) {
  const std::atomic<uint32_t>* entry = kept_of(fd, at);
  uint32_t units[kUnits];
  for (int64_t i = 0; i < kUnits; ++i) units[i] = entry[i].load(std::memory_order_relaxed);
  if (combined(units, size) != crc) return false;
  const int64_t first = from / kUnit * kUnit;
  const int64_t end = std::min((from + take + kUnit - 1) / kUnit * kUnit, size);
  const bool aligned = first == from && end == from + take;
  uint8_t* target = aligned ? out : scratch;
  if (read_all(fd, target, end - first, at + first)) return false;
  for (int64_t unit = first; unit < end; unit += kUnit)
    if (crc32c(target + (unit - first), std::min(kUnit, end - unit)) != units[unit / kUnit])
      return false;
  if (!aligned) std::memcpy(out, scratch + (from - first), take);
  return true;
}

// A whole block to `target`, checked; keeps its units' CRCs if `keep`.
int read_block(int fd, int64_t at, int64_t size, uint32_t crc, bool keep, uint8_t* target) {
  const int status = read_all(fd, target, size, at);
  if (status) return status;
  if (!keep) return crc32c(target, size) == crc ? 0 : kCorrupt;
  uint32_t units[kUnits] = {};
  for (int64_t unit = 0; unit * kUnit < size; ++unit)
    units[unit] = crc32c(target + unit * kUnit, std::min(kUnit, size - unit * kUnit));
  if (combined(units, size) != crc) return kCorrupt;
  std::atomic<uint32_t>* entry = kept_of(fd, at);
  for (int64_t i = 0; i < kUnits; ++i) entry[i].store(units[i], std::memory_order_relaxed);
  return 0;
}

// [offset, offset + length) of a chunk.
int read_piece(const Content& chunk, int64_t offset, int64_t length, uint8_t* out,
               uint8_t* scratch) {
  const int fd = static_cast<int>(chunk.fd);
  for (int64_t at = offset; at < offset + length;) {
    const int64_t start = at / kBlock * kBlock;
    const int64_t end = std::min(start + kBlock, chunk.size);
    const int64_t take = std::min(end, offset + length) - at;
    const uint32_t crc = chunk.crcs[start / kBlock];
    const bool small = 2 * take < end - start;
    const bool done = small && read_units(fd, chunk.place + start, end - start, crc, at - start,
                                          take, out, scratch);
    if (!done) {
      const bool whole = take == end - start;
      const int status =
          read_block(fd, chunk.place + start, end - start, crc, small, whole ? out : scratch);
      if (status) return status;
      if (!whole) std::memcpy(out, scratch + (at - start), take);
    }
    out += take, at += take;
  }
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Once, before anything else: comm's wf_crc32c and wf_crc_combine.
EXPORT void wf_fs_setup(Crc crc, Combine combine, int without_instructions) {
  crc_of = crc, combine_of = combine, table_only = without_instructions;
  by_unit.make(kUnit);
  by_block.make(kBlock);
}

// Returns 0 or errno; what was written is on the disk only after the caller's next fdatasync.
// fd < 0: only the checksums. direct: fd was opened with O_DIRECT. crcs: one per block; whole: of
// everything.
EXPORT int wf_fs_write(int fd, int direct, int64_t place, const uint8_t* data, int64_t size,
                       uint32_t* crcs, uint32_t* whole) {
  uint32_t all = 0;
  for (int64_t at = 0; at < size; at += kBlock) {
    const int64_t take = std::min(kBlock, size - at);
    const uint32_t crc = crcs[at / kBlock] = crc32c(data + at, take);
    all = take == kBlock ? by_block(all) ^ crc : combine_of(1, all, crc, take);
  }
  *whole = all;
  if (fd < 0) return 0;
  return direct ? write_direct(fd, data, size, place) : write_all(fd, data, size, place);
}

// plan: [count][2], offset and length of a piece of chunks[i]; out: the pieces, one after another.
// status[i]: 0, -errno, or -100000 for a checksum that does not match.
EXPORT void wf_fs_read(int64_t count, const Content* chunks, const int64_t (*plan)[2], uint8_t* out,
                       int32_t* status) {
  std::unique_ptr<uint8_t[]> scratch(new uint8_t[kBlock]);
  // A cold batch: let the disk work on all of it at once.
  for (int64_t i = 0; count > 1 && i < count; ++i)
    if (plan[i][1] >= 2 * kBlock)
      posix_fadvise(static_cast<int>(chunks[i].fd), chunks[i].place + plan[i][0], plan[i][1],
                    POSIX_FADV_WILLNEED);
  for (int64_t i = 0; i < count; ++i) {
    status[i] = read_piece(chunks[i], plan[i][0], plan[i][1], out, scratch.get());
    out += plan[i][1];
  }
}
