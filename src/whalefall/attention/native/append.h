// Writes new latent rows (normalised latent, then rope) into the pages of a cache.
#pragma once
#include <algorithm>
#include "cache.h"
#include "whalefall/pool.h"

namespace wf::attention {
struct AppendArgs {
  const void *latent, *rope;
  int64_t latent_stride, latent_width, rope_stride, rope_width;  // elements
  Type type;                                                     // of latent and rope
  Type cache_type;               // fp8: the 656-byte row, latent 512 and rope 64 wide
  const int32_t* const* tables;  // [tokens]: each token's block table
  const int32_t* positions;      // [tokens]: its place in the sequence; -1 writes nothing
  int64_t tokens;
  Cache cache;  // data is written
};

inline uint8_t float_to_e4m3(float f) {  // to nearest even; above 464 or NaN: NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint8_t sign = uint8_t(u >> 24 & 0x80);
  u &= 0x7fffffff;
  if (!(u < 0x43e80000)) return sign | 0x7f;  // 464: half way from 448 to the 480 there is not
  if (u < 0x3c800000) {                       // below 2^-6: counts of 2^-9
    std::memcpy(&f, &u, 4);
    f = f * 512.0f + 12582912.0f;
    std::memcpy(&u, &f, 4);
    return sign | uint8_t(u - 0x4b400000);
  }
  u += 0x7ffff + (u >> 20 & 1);
  return sign | uint8_t((u >> 20) - (120 << 3));
}

inline float value_at(const void* data, Type type, int64_t i) {
  if (type == Type::bf16) return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
  if (type == Type::fp16) return fp16_to_float(static_cast<const uint16_t*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

inline void append_as_is(const void* from, Type type, int64_t at, int64_t width, char* to,
                         Type to_type) {
  for (int64_t i = 0; i < width; ++i) {
    const float x = value_at(from, type, at + i);
    if (to_type == Type::fp32)
      std::memcpy(to + i * 4, &x, 4);
    else {
      const uint16_t half = to_type == Type::bf16 ? float_to_bf16(x) : float_to_fp16(x);
      std::memcpy(to + i * 2, &half, 2);
    }
  }
}

inline void append_fp8(const AppendArgs& args, int64_t token, char* to) {
  for (int tile = 0; tile < kFp8Columns / kFp8Tile; ++tile) {
    float x[kFp8Tile], most = 0;
    for (int i = 0; i < kFp8Tile; ++i) {
      x[i] = value_at(args.latent, args.type, token * args.latent_stride + tile * kFp8Tile + i);
      most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    }
    const float scale = fp8_tile_scale(most);
    for (int i = 0; i < kFp8Tile; ++i) to[tile * kFp8Tile + i] = char(float_to_e4m3(x[i] / scale));
    std::memcpy(to + kFp8Columns + tile * 4, &scale, 4);
  }
  append_as_is(args.rope, args.type, token * args.rope_stride, kFp8Rope, to + kFp8Columns + 16,
               Type::bf16);
}

inline void append_row(const AppendArgs& args, int64_t t) {
  const int64_t position = args.positions[t];
  if (position < 0) return;
  char* to = const_cast<char*>(
      args.cache.row(args.tables[t][position / args.cache.page], position % args.cache.page, 0));
  if (args.cache_type == Type::fp8) return append_fp8(args, t, to);
  append_as_is(args.latent, args.type, t * args.latent_stride, args.latent_width, to,
               args.cache_type);
  append_as_is(args.rope, args.type, t * args.rope_stride, args.rope_width,
               to + args.latent_width * bytes_of(args.cache_type), args.cache_type);
}
// No two tokens have one place: rows are written at the same time.
inline void append(const AppendArgs& args) {
  constexpr int64_t kPiece = 16;  // rows a task
  parallel_for(ceil_div(args.tokens, kPiece), [&](int64_t piece, int) {
    for (int64_t t = piece * kPiece; t < std::min(args.tokens, (piece + 1) * kPiece); ++t)
      append_row(args, t);
  });
}
}  // namespace wf::attention
