// Row formats: how 2 * kLanes stored elements become two vectors, and in which order; both at once
// (`load2`) or one after the other (`first`, `second`).
//
// bf16 splits by a shift and a mask into its even and its odd elements (no shuffle); q and the
// accumulators of the output are kept in that same order, and put right when they are stored. For
// bf16 dots rows are used as they are, q is bf16 too, and the output has an order of its own.
#pragma once
#include <cstdint>
#include "lanes.h"
#include "whalefall/dot.h"

namespace wf::attention {
constexpr int kStep = 2 * kLanes;  // elements handled at a time; rows are padded to it
enum class Order { kPlain, kInterleaved, kQuads };  // of the elements of a step in two vectors
enum class Type : int32_t { fp32 = 0, bf16 = 1, fp16 = 2, fp8 = 3 };

inline float fp16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &u, 4);
  f *= 5.192296858534828e33f;  // 2^112: exponent bias 15 -> 127, subnormals made normal
  if ((h & 0x7c00) == 0x7c00) {
    u |= 0x7f800000;
    std::memcpy(&f, &u, 4);
  }
  std::memcpy(&u, &f, 4);
  u |= uint32_t(h & 0x8000) << 16;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t float_to_fp16(float f) {  // to nearest even; overflow gives inf; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // 65520 and up
  if (u < 0x38800000) {                       // below 2^-14: counts of 2^-24
    float count;
    std::memcpy(&count, &u, 4);
    count = count * 16777216.0f + 12582912.0f;
    std::memcpy(&u, &count, 4);
    return sign | uint16_t(u - 0x4b400000);
  }
  return sign | uint16_t((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
}

struct Fp32Row {
  using Element = float;
  static constexpr Order kOrder = Order::kPlain;
  static void load2(const Element* p, vf& a, vf& b) {
    a = load(p);
    b = load(p + kLanes);
  }
  static vf first(const Element* p) { return load(p); }
  static vf second(const Element* p, vf) { return load(p + kLanes); }
};
struct Bf16Row {
  using Element = uint16_t;
  static constexpr Order kOrder = Order::kInterleaved;
  static void load2(const Element* p, vf& a, vf& b) {
    vi words;
    std::memcpy(&words, p, sizeof words);
    a = (vf)(words << 16);
    b = (vf)(words & int32_t(0xffff0000));
  }
  static vf first(const Element* p) {
    vi words;
    std::memcpy(&words, p, sizeof words);
    return (vf)(words << 16);
  }
  // `zeros`: some `first`, whose lower halves are 0. Taken from there, they need no mask, and read
  // from memory again, words need no register between the two.
  static vf second(const Element* p, vf zeros) {
#if WF_ISA == 1
    vf b;
    asm("vpblendw $0xaa, %2, %1, %0"
        : "=x"(b)
        : "x"(zeros), "m"(*reinterpret_cast<const vf_any_alignment*>(p)));
    return b;
#else
    vf a, b;
    load2(p, a, b);
    return b;
#endif
  }
};
struct Fp16Row {
  using Element = uint16_t;
  static constexpr Order kOrder = Order::kPlain;
  static vf load1(const Element* p) {
#if WF_ISA >= 2
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif WF_ISA == 1
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return vf{fp16_to_float(p[0]), fp16_to_float(p[1]), fp16_to_float(p[2]), fp16_to_float(p[3])};
#endif
  }
  static void load2(const Element* p, vf& a, vf& b) {
    a = load1(p);
    b = load1(p + kLanes);
  }
  static vf first(const Element* p) { return load1(p); }
  static vf second(const Element* p, vf) { return load1(p + kLanes); }
};

// bf16 for the dot kernels. Outputs: elements 8j … 8j + 3 in lanes 4j … of the first vector, the
// next four in those of the second, as unpacking two rows into pairs leaves them.
struct DotRow {
  using Element = uint16_t;
  static constexpr Order kOrder = Order::kQuads;
};
template <class Row>
constexpr bool kDots = std::is_same_v<Row, DotRow>;
// bf16 for AMX's tiles; outputs in the same order, for the same reason.
struct TileRow {
  using Element = uint16_t;
  static constexpr Order kOrder = Order::kQuads;
};
template <class Row>
constexpr bool kTiles = std::is_same_v<Row, TileRow>;
// Memory of a step of a packed q.
template <class Row>
constexpr int kQueryFloats = kDots<Row> || kTiles<Row> ? kLanes : 2 * kLanes;

// kLanes consecutive elements from index i, whatever their type, and back.
inline vf read(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::bf16:
      return load_bf16(static_cast<const uint16_t*>(data) + i);
    case Type::fp16:
      return Fp16Row::load1(static_cast<const uint16_t*>(data) + i);
    default:
      return load(static_cast<const float*>(data) + i);
  }
}
inline void write(void* data, Type type, int64_t i, vf value) {
  switch (type) {
    case Type::bf16:
      return store_bf16(static_cast<uint16_t*>(data) + i, value);
    case Type::fp16:
      for (int lane = 0; lane < kLanes; ++lane)
        static_cast<uint16_t*>(data)[i + lane] = float_to_fp16(value[lane]);
      return;
    default:
      return store(static_cast<float*>(data) + i, value);
  }
}
inline int64_t bytes_of(Type type) { return type == Type::fp32 ? 4 : type == Type::fp8 ? 1 : 2; }

template <int... L>
inline vf evens(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, (2 * L)...);
}
template <int... L>
inline vf odds(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, (2 * L + 1)...);
}
template <int Upper, int... L>
inline vf zip(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y, (L / 2 + Upper * kLanes / 2 + L % 2 * kLanes)...);
}

template <int Upper, int... L>
inline vf quads(vf x, vf y, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, y,
                                 (L / 4 % 2 * kLanes + L / 8 * 4 + L % 4 + Upper * kLanes / 2)...);
}

// One step of a row as it stands: elements i … i + count - 1, zeros behind them.
inline void read_plain(const void* data, Type type, int64_t i, int64_t count, vf& x, vf& y) {
  alignas(64) char padded[kStep * 4] = {};
  if (count < kStep) {
    std::memcpy(padded, static_cast<const char*>(data) + i * bytes_of(type),
                size_t(count * bytes_of(type)));
    data = padded;
    i = 0;
  }
  x = read(data, type, i), y = read(data, type, i + kLanes);
}
// A step of q as `scores` wants it: row r of R.
template <class Row, int R>
inline void pack_step(const void* data, Type type, int64_t i, int64_t count, int r, float* to) {
  vf x, y;
  read_plain(data, type, i, count, x, y);
#ifdef WF_DOT
  if constexpr (kDots<Row>) {
    _mm512_storeu_si512(to + r * kLanes, to_halves(x, y));
    return;
  }
#endif
  constexpr bool kSplit = Row::kOrder == Order::kInterleaved;
  store(to + r * kLanes, kSplit ? evens(x, y, kEachLane) : x);
  store(to + (R + r) * kLanes, kSplit ? odds(x, y, kEachLane) : y);
}
// Two vectors of an output, in the row format's order, as a step of a row; elements behind `count`
// are not stored.
template <class Row>
inline void write_step(void* data, Type type, int64_t i, int64_t count, vf a, vf b) {
  vf x = a, y = b;
  if constexpr (Row::kOrder == Order::kInterleaved)
    x = zip<0>(a, b, kEachLane), y = zip<1>(a, b, kEachLane);
  if constexpr (Row::kOrder == Order::kQuads)
    x = quads<0>(a, b, kEachLane), y = quads<1>(a, b, kEachLane);
  alignas(64) char padded[kStep * 4];
  void* to = count < kStep ? padded : data;
  int64_t at = count < kStep ? 0 : i;
  write(to, type, at, x);
  write(to, type, at + kLanes, y);
  if (count < kStep)
    std::memcpy(static_cast<char*>(data) + i * bytes_of(type), padded,
                size_t(count * bytes_of(type)));
}
}  // namespace wf::attention
