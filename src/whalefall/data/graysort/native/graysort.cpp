// GraySort: generate, check, deal out, sort. Bound by memory traffic; see generate.h and sort.h.
#include <array>

#include "sort.h"

namespace {
using namespace graysort;

// zlib's CRC-32 of a record, eight bytes at a time.
struct CrcTables {
  std::array<std::array<uint32_t, 256>, 8> t{};
  CrcTables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[0][i] = c;
    }
    for (int s = 1; s < 8; ++s)
      for (uint32_t i = 0; i < 256; ++i) t[s][i] = t[0][t[s - 1][i] & 255] ^ (t[s - 1][i] >> 8);
  }
};
const CrcTables kCrc;

uint32_t crc_of(const uint8_t* p) {
  const auto& t = kCrc.t;
  uint32_t c = ~0u;
  int i = 0;
  for (; i + 8 <= kRecord; i += 8) {
    uint64_t word;
    std::memcpy(&word, p + i, 8);
    word ^= c;
    c = t[7][word & 255] ^ t[6][(word >> 8) & 255] ^ t[5][(word >> 16) & 255] ^
        t[4][(word >> 24) & 255] ^ t[3][(word >> 32) & 255] ^ t[2][(word >> 40) & 255] ^
        t[1][(word >> 48) & 255] ^ t[0][word >> 56];
  }
  for (; i < kRecord; ++i) c = t[0][(c ^ p[i]) & 255] ^ (c >> 8);
  return ~c;
}
}  // namespace

extern "C" {
WF_EXPORT void wf_graysort_generate(uint8_t* out, uint64_t begin, int64_t count, int ascii,
                                    int skewed) {
  constexpr int64_t kBlock = 1 << 14;
  wf::parallel_for((count + kBlock - 1) / kBlock, [&](int64_t b, int) {
    const int64_t at = b * kBlock;
    generate(out + at * kRecord, begin + uint64_t(at), std::min(kBlock, count - at), ascii != 0,
             skewed != 0);
  });
}

// totals: sum of CRCs (low, high 64 bits), records out of order, duplicates, first out of order.
WF_EXPORT void wf_graysort_check(const uint8_t* records, int64_t count, uint64_t* totals) {
  constexpr int64_t kBlock = 1 << 15;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  struct Part {
    uint64_t sum = 0, unordered = 0, equal = 0, first = ~uint64_t(0);
  };
  std::vector<Part> parts(blocks);
  wf::parallel_for(blocks, [&](int64_t b, int) {
    Part& part = parts[b];
    for (int64_t i = b * kBlock; i < std::min(count, (b + 1) * kBlock); ++i) {
      const uint8_t* record = records + i * kRecord;
      part.sum += crc_of(record);
      if (i == 0) continue;
      const int order = std::memcmp(record - kRecord, record, kKey);
      part.equal += order == 0;
      if (order > 0) {
        if (part.unordered++ == 0) part.first = uint64_t(i);
      }
    }
  });
  u128 sum = 0;
  std::fill(totals, totals + 5, 0);
  totals[4] = ~uint64_t(0);
  for (const Part& part : parts) {
    sum += part.sum;
    totals[2] += part.unordered;
    totals[3] += part.equal;
    totals[4] = std::min(totals[4], part.first);
  }
  totals[0] = uint64_t(sum);
  totals[1] = uint64_t(sum >> 64);
}

// entries, scratch: 16 * count bytes each; entries gets the order.
WF_EXPORT void wf_graysort_order(const uint8_t* records, int64_t count, void* entries,
                                 void* scratch) {
  sort_entries(records, count, static_cast<Entry*>(entries), static_cast<Entry*>(scratch));
}

// out := records in the order of entries[begin .. begin + count).
WF_EXPORT void wf_graysort_gather(const uint8_t* records, const void* entries, int64_t begin,
                                  int64_t count, uint8_t* out) {
  gather(records, static_cast<const Entry*>(entries) + begin, count, out);
}

// Deal records into num_parts ranges: part p holds the keys in [splitters[p - 1], splitters[p]).
// splitters: 10 bytes each, ascending. out: the records, part after part. counts: records a part.
WF_EXPORT void wf_graysort_deal(const uint8_t* records, int64_t count, const uint8_t* splitters,
                                int64_t num_parts, uint8_t* out, int64_t* counts) {
  std::vector<Entry> points(num_parts - 1);
  for (int64_t p = 0; p + 1 < num_parts; ++p) points[p] = entry_of(splitters + p * kKey, 0);
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(64, count / 4096));
  auto begin_of = [&](int64_t b) { return count * b / blocks; };
  std::vector<int64_t> next(blocks * num_parts, 0);
  std::vector<uint16_t> home(count);
  wf::parallel_for(blocks, [&](int64_t b, int) {
    for (int64_t i = begin_of(b); i < begin_of(b + 1); ++i) {
      const Entry e = entry_of(records + i * kRecord, 0);
      const int64_t p = std::upper_bound(points.begin(), points.end(), e) - points.begin();
      home[i] = uint16_t(p);
      ++next[b * num_parts + p];
    }
  });
  int64_t total = 0;
  for (int64_t p = 0; p < num_parts; ++p) {
    const int64_t begin = total;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = next[b * num_parts + p];
      next[b * num_parts + p] = total;
      total += here;
    }
    counts[p] = total - begin;
  }
  wf::parallel_for(blocks, [&](int64_t b, int) {
    int64_t* slot = next.data() + b * num_parts;
    for (int64_t i = begin_of(b); i < begin_of(b + 1); ++i)
      std::memcpy(out + slot[home[i]]++ * kRecord, records + i * kRecord, kRecord);
  });
}
}
