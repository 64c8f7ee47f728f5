// Sorting records by key: entries of 16 bytes are sorted, then records gathered once.
//
// An entry holds the key's 10 bytes as a number and the record's index: (hi, lo) = (key[0..8),
// key[8..10) << 48 | index). It orders as (key, index): the sort is stable and its result does not
// depend on threads. Entries are dealt into buckets by sampled splitters, each bucket sorted by a
// radix on the 16 bits below its common prefix, then runs of equal bits by comparison.
// Bound: random reads of records in `gather` (one cache miss and a half a record).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "generate.h"
#include "whalefall/pool.h"

namespace graysort {
struct Entry {
  uint64_t hi, lo;
  bool operator<(const Entry& other) const {
    return hi != other.hi ? hi < other.hi : lo < other.lo;
  }
};

inline Entry entry_of(const uint8_t* record, uint64_t index) {
  uint64_t hi;
  uint16_t lo;
  std::memcpy(&hi, record, 8);
  std::memcpy(&lo, record + 8, 2);
  return {__builtin_bswap64(hi), (uint64_t(__builtin_bswap16(lo)) << 48) | index};
}

// Sort one bucket; `scratch` is as long.
inline void sort_bucket(Entry* data, Entry* scratch, int64_t n) {
  if (n < 64) {
    std::sort(data, data + n);
    return;
  }
  uint64_t any = 0;
  for (int64_t i = 1; i < n; ++i) any |= data[i].hi ^ data[0].hi;
  const int top = bits_of(any);  // bits above are the same in all
  if (top == 0) {
    std::sort(data, data + n);
    return;
  }
  const int shift = std::max(0, top - 16);
  for (int pass = 0; pass < 2; ++pass) {
    const int low = shift + 8 * pass;
    int64_t counts[257] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[((data[i].hi >> low) & 255) + 1];
    for (int b = 0; b < 256; ++b) counts[b + 1] += counts[b];
    for (int64_t i = 0; i < n; ++i) scratch[counts[(data[i].hi >> low) & 255]++] = data[i];
    std::swap(data, scratch);
  }
  // two passes: the result is where it was; what is left to order lies within runs of equal bits
  for (int64_t begin = 0, end; begin < n; begin = end) {
    const uint64_t bits = data[begin].hi >> shift;
    for (end = begin + 1; end < n && data[end].hi >> shift == bits; ++end) {
    }
    if (end - begin > 1) std::sort(data + begin, data + end);
  }
}

struct Buckets {
  std::vector<Entry> splitters;
  int64_t find(const Entry& e) const {
    return std::upper_bound(splitters.begin(), splitters.end(), e) - splitters.begin();
  }
};

// Splitters into `count` buckets from an evenly spaced sample.
inline Buckets sample(const uint8_t* records, int64_t n, int64_t count) {
  Buckets buckets;
  if (n == 0 || count < 2) return buckets;
  const int64_t wanted = std::min<int64_t>(n, count * 32);
  std::vector<Entry> taken(wanted);
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t at = int64_t((u128(i) * u128(n)) / u128(wanted));
    taken[i] = entry_of(records + at * kRecord, uint64_t(at));
  }
  std::sort(taken.begin(), taken.end());
  for (int64_t b = 1; b < count; ++b) buckets.splitters.push_back(taken[b * wanted / count]);
  return buckets;
}

// entries[0..n) := the records' entries in order; scratch as long.
inline void sort_entries(const uint8_t* records, int64_t n, Entry* entries, Entry* scratch) {
  const int64_t num_buckets = std::clamp<int64_t>(n / 16384, 1, 1024);
  const Buckets buckets = sample(records, n, num_buckets);
  const int64_t num_blocks = std::max<int64_t>(1, std::min<int64_t>(64, n / 4096));
  std::vector<int64_t> counts(num_blocks * num_buckets + 1, 0);
  std::vector<uint16_t> home(n);
  auto block_begin = [&](int64_t b) { return n * b / num_blocks; };
  wf::parallel_for(num_blocks, [&](int64_t b, int) {
    for (int64_t i = block_begin(b); i < block_begin(b + 1); ++i) {
      const int64_t bucket = buckets.find(entry_of(records + i * kRecord, uint64_t(i)));
      home[i] = uint16_t(bucket);
      ++counts[b * num_buckets + bucket];
    }
  });
  std::vector<int64_t> begins(num_buckets + 1, 0);
  int64_t total = 0;
  for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    begins[bucket] = total;
    for (int64_t b = 0; b < num_blocks; ++b) {
      int64_t& slot = counts[b * num_buckets + bucket];
      const int64_t here = slot;
      slot = total;
      total += here;
    }
  }
  begins[num_buckets] = total;
  wf::parallel_for(num_blocks, [&](int64_t b, int) {
    int64_t* next = counts.data() + b * num_buckets;
    for (int64_t i = block_begin(b); i < block_begin(b + 1); ++i)
      entries[next[home[i]]++] = entry_of(records + i * kRecord, uint64_t(i));
  });
  wf::parallel_for(num_buckets, [&](int64_t bucket, int) {
    const int64_t begin = begins[bucket];
    sort_bucket(entries + begin, scratch + begin, begins[bucket + 1] - begin);
  });
}

constexpr uint64_t kIndexMask = (uint64_t(1) << 48) - 1;

inline void gather(const uint8_t* records, const Entry* entries, int64_t n, uint8_t* out) {
  constexpr int kAhead = 12;
  wf::parallel_for((n + 4095) / 4096, [&](int64_t block, int) {
    const int64_t end = std::min(n, (block + 1) * 4096);
    for (int64_t i = block * 4096; i < end; ++i) {
      if (i + kAhead < end) {
        const uint8_t* next = records + (entries[i + kAhead].lo & kIndexMask) * kRecord;
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
      }
      std::memcpy(out + i * kRecord, records + (entries[i].lo & kIndexMask) * kRecord, kRecord);
    }
  });
}
}  // namespace graysort
