// LogFMT-10: rows of bf16 as signs and logarithms, 10 bits a value, as low-latency combine sends
// them with `use_logfmt`. A block of 128 channels has its largest and smallest magnitude (bf16) in
// front; codes 1 ... 511 divide the logarithms between them evenly, 0 is zero, what lies 32 octaves
// below the largest is zero too. Rounding is to the nearest value, not to the nearest logarithm.
// A block goes as plain bf16 where its largest magnitude is 1 or more (or no number), or where all
// magnitudes are one. Bound: arithmetic (two logarithms' worth a value), so it pays between hosts.
//
//   row = [blocks] {amax, amin}, then for each block 128 low bits' bytes, 16 bytes of ninth bits,
//         16 bytes of signs; or 128 bf16
//
// Source: DeepEP `logfmt_encode`, `decode_and_accumulate` (which decide for some blocks together).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace wf_ep {

constexpr int kLogBlock = 128, kLogBytes = 160, kPlainBytes = 256, kLogSteps = 510;
constexpr float kLogRange = 32;  // octaves

// Bytes of a row of which no block is coded; zeros are such a row.
inline int64_t log_most_bytes(int64_t n) { return n / kLogBlock * (4 + kPlainBytes); }

// Logarithms of a block's ends; `coded` false: it is not coded.
struct LogRange {
  float low, step;
  bool coded;
};

// log2 of a bf16 magnitude, from its bits: that of 1.m, or for tiny ones of m, is in a table.
struct LogTable {
  float of[256];
  LogTable() {
    for (int m = 0; m < 128; m++) {
      of[m] = log2f(1.0f + static_cast<float>(m) / 128.0f) - 127.0f;
      of[128 + m] = m ? log2f(static_cast<float>(m)) - 133.0f : -1e30f;
    }
  }
};

inline float log_of(const LogTable& table, uint16_t magnitude) {
  int exponent = magnitude >> 7, m = magnitude & 127;
  return table.of[exponent ? m : 128 + m] + static_cast<float>(exponent);
}

inline const LogTable& log_table() {
  static const LogTable table;
  return table;
}

inline LogRange log_range(uint16_t amax, uint16_t amin) {
  if (amax >= 0x3F80 || amax == amin) return {0, 0, false};
  float high = log_of(log_table(), amax), low = high - kLogRange;
  if (amin) low = fmaxf(low, log_of(log_table(), amin));
  return {low, (high - low) / kLogSteps, true};
}

// 2^x for -165 <= x <= 0, to 2^-22 of itself; below 2^-126 by two factors.
inline float power_of_two(float x) {
  auto whole = static_cast<int32_t>(x - 0.5f);  // to the nearest, as x is not positive
  float f = (x - static_cast<float>(whole)) * 0.69314718f;
  float p = 1.0f / 720 + f * (1.0f / 5040);
  p = 1.0f / 24 + f * (1.0f / 120 + f * p);
  p = 1.0f + f * (1.0f + f * (0.5f + f * (1.0f / 6 + f * p)));
  int32_t bits = (whole + 64 + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale * 5.421010862427522e-20f;  // 2^-64
}

// Write a row of n channels (whole blocks); returns the bytes.
inline int64_t log_encode(const uint16_t* x, int64_t n, uint8_t* out) {
  const LogTable& table = log_table();
  auto* ends = reinterpret_cast<uint16_t*>(out);
  uint8_t* to = out + n / kLogBlock * 4;
  for (; n; n -= kLogBlock, x += kLogBlock, ends += 2) {
    uint16_t amax = 0, amin = 0x7FFF;
    for (int i = 0; i < kLogBlock; i++) {
      uint16_t a = x[i] & 0x7FFF;
      amax = a > amax ? a : amax;
      amin = a < amin ? a : amin;
    }
    ends[0] = amax, ends[1] = amin;
    LogRange range = log_range(amax, amin);
    if (!range.coded) {
      memcpy(to, x, kPlainBytes);
      to += kPlainBytes;
      continue;
    }
    float inverse = 1.0f / range.step;
    float middle = log2f((1.0f + exp2f(range.step)) * 0.5f) * inverse;  // between two values
    float shift = 2.0f - middle - range.low * inverse;
    int32_t code[kLogBlock];
    for (int i = 0; i < kLogBlock; i++) {
      float place = log_of(table, x[i] & 0x7FFF) * inverse + shift;
      place = place < 0 ? 0 : place > 511 ? 511 : place;
      code[i] = static_cast<int32_t>(place);
    }
    for (int i = 0; i < kLogBlock; i++) to[i] = static_cast<uint8_t>(code[i]);
    for (int i = 0; i < kLogBlock; i += 8) {
      uint8_t high = 0, minus = 0;
      for (int b = 0; b < 8; b++) high |= (code[i + b] >> 8) << b, minus |= (x[i + b] >> 15) << b;
      to[kLogBlock + i / 8] = high, to[kLogBlock + 16 + i / 8] = minus;
    }
    to += kLogBytes;
  }
  return to - out;
}

// The bytes of an encoded row, from its ends.
inline int64_t log_bytes(const uint8_t* row, int64_t n) {
  auto* ends = reinterpret_cast<const uint16_t*>(row);
  int64_t bytes = n / kLogBlock * 4;
  for (int64_t b = 0; b < n / kLogBlock; b++)
    bytes += log_range(ends[2 * b], ends[2 * b + 1]).coded ? kLogBytes : kPlainBytes;
  return bytes;
}

// Read an encoded row into n floats.
inline void log_decode(const uint8_t* row, int64_t n, float* out) {
  auto* ends = reinterpret_cast<const uint16_t*>(row);
  const uint8_t* from = row + n / kLogBlock * 4;
  for (; n; n -= kLogBlock, out += kLogBlock, ends += 2) {
    LogRange range = log_range(ends[0], ends[1]);
    if (!range.coded) {
      for (int i = 0; i < kLogBlock; i++) {
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        uint32_t bits = static_cast<uint32_t>(half) << 16;
        memcpy(out + i, &bits, 4);
      }
      from += kPlainBytes;
      continue;
    }
    int32_t code[kLogBlock];
    uint32_t minus[kLogBlock];
    for (int i = 0; i < kLogBlock; i += 8) {
      uint8_t high = from[kLogBlock + i / 8], signs = from[kLogBlock + 16 + i / 8];
      for (int b = 0; b < 8; b++) {
        code[i + b] = from[i + b] | (high >> b & 1) << 8;
        minus[i + b] = static_cast<uint32_t>(signs >> b & 1) << 31;
      }
    }
    for (int i = 0; i < kLogBlock; i++) {
      float value = power_of_two(static_cast<float>(code[i] - 1) * range.step + range.low);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      bits = (bits & static_cast<uint32_t>(-code[i] >> 31)) | minus[i];  // code 0: zero
      memcpy(out + i, &bits, 4);
    }
    from += kLogBytes;
  }
}

}  // namespace wf_ep
