// Records of the Sort Benchmark: record i from i alone.
//
// Random numbers: x <- A x + C (mod 2^128) from 0; record i takes the numbers i+1 … i+10 of the
// sequence. Binary: the top 10 bytes of each, all but the first (the key) xored with a constant.
// ASCII: key in base 95, record number in hexadecimal, 13 digits four times each. Skewed: the head
// of the key is replaced by the head of a constant, of a length drawn from the random number.
#pragma once
#include <cstdint>
#include <cstring>

#include "skew.h"

namespace graysort {
using u128 = unsigned __int128;
constexpr int kRecord = 100, kKey = 10;
constexpr u128 wide(uint64_t hi, uint64_t lo) { return (u128(hi) << 64) | lo; }
constexpr u128 kA = wide(0x2360ED051FC65DA4, 0x4385DF649FCCF645);
constexpr u128 kC = wide(0x4A696D4772617952, 0x4950202020202001);
constexpr uint64_t kMask[10][2] = {{0, 0},
                                   {0xF0E8E4E2E1D8D4D2, 0xD1CC},
                                   {0xCAC9C6C5C3B8B4B2, 0xB1AC},
                                   {0xAAA9A6A5A39C9A99, 0x9695},
                                   {0x938E8D8B87787472, 0x716C},
                                   {0x6A696665635C5A59, 0x5655},
                                   {0x534E4D4B473C3A39, 0x3635},
                                   {0x332E2D2B271E1D1B, 0x170F},
                                   {0xC8C4C2C198949291, 0x8CE0},
                                   {0x170F332E2D2B271E, 0x1D1B}};

// Bits of a number without its leading zeros.
inline int bits_of(uint64_t number) { return number ? 64 - __builtin_clzll(number) : 0; }

// The state after `steps` steps from 0.
inline u128 state_after(uint64_t steps) {
  u128 a = kA, c = kC, state_a = 1, state_c = 0;
  for (; steps; steps >>= 1) {
    if (steps & 1) {
      state_c = state_c * a + c;
      state_a *= a;
    }
    c = c * a + c;
    a *= a;
  }
  return state_c;
}

inline void put10(uint8_t* out, u128 number, const uint64_t mask[2]) {
  const uint64_t hi = __builtin_bswap64(uint64_t(number >> 64) ^ mask[0]);
  const uint16_t lo = __builtin_bswap16(uint16_t(uint64_t(number) >> 48) ^ uint16_t(mask[1]));
  std::memcpy(out, &hi, 8);
  std::memcpy(out + 8, &lo, 2);
}

inline void skew_binary(uint8_t* key, u128 number, uint64_t index) {
  int bits = int(uint64_t(number) >> 32) & 0x3F;
  if (bits > 8 * kSkewBytes) return;  // a quarter of the records
  const uint64_t head = kSkewBinary[bits_of(index)];
  for (int i = 0; bits > 0; ++i, bits -= 8) {
    const uint8_t keep = bits >= 8 ? 0 : uint8_t(0xFF >> bits);
    key[i] = uint8_t((head >> (40 - 8 * i)) & uint8_t(~keep)) | (key[i] & keep);
  }
}

inline void put_ascii(uint8_t* out, u128 number, uint64_t index, bool skewed) {
  constexpr char kHex[] = "0123456789ABCDEF";
  uint64_t hi = uint64_t(number >> 64), lo = uint64_t(number);
  for (int i = 0; i < 8; ++i, hi /= 95) out[i] = uint8_t(' ' + hi % 95);
  for (int i = 8; i < 10; ++i, lo /= 95) out[i] = uint8_t(' ' + lo % 95);
  lo = uint64_t(number);
  std::memset(out + 10, ' ', 2);
  std::memset(out + 12, '0', 16);  // record numbers stay below 2^64 here
  for (int i = 0; i < 16; ++i) out[28 + i] = kHex[(index >> (60 - 4 * i)) & 15];
  std::memset(out + 44, ' ', 2);
  for (int i = 0; i < 13; ++i) std::memset(out + 46 + 4 * i, kHex[(lo >> (48 - 4 * i)) & 15], 4);
  out[98] = '\r';
  out[99] = '\n';
  const int count = int(lo >> 32) & 7;
  if (skewed && count <= kSkewBytes) std::memcpy(out, kSkewAscii[bits_of(index)], count);
}

// Records `begin` to `begin + count`, one after the other.
inline void generate(uint8_t* out, uint64_t begin, int64_t count, bool ascii, bool skewed) {
  u128 ring[16];
  ring[0] = state_after(begin + 1);
  for (int i = 1; i < 10; ++i) ring[i] = ring[i - 1] * kA + kC;
  for (int64_t r = 0; r < count; ++r, out += kRecord) {
    const uint64_t index = begin + uint64_t(r);
    const u128 first = ring[r & 15];
    if (ascii) {
      put_ascii(out, first, index, skewed);
    } else {
      for (int i = 0; i < 10; ++i) put10(out + 10 * i, ring[(r + i) & 15], kMask[i]);
      if (skewed) skew_binary(out, first, index);
    }
    ring[(r + 10) & 15] = ring[(r + 9) & 15] * kA + kC;
  }
}
}  // namespace graysort
