// Products on Intel's matrix unit (AMX): a tile holds 16 rows of 64 bytes, and one instruction adds the product of a
// 16 x 32 tile of A and a 32 x 16 tile of B, both bf16, to a 16 x 16 tile of fp32. B is wanted in pairs along the
// depth, which is the layout the other instruction sets use too (simd.h), and A as it lies in memory.
#pragma once

#include "simd.h"

namespace {

struct Slice {  // a stretch of the depth of a product
  const uint32_t* a;
  int64_t lda, depth;  // in pairs
};

constexpr int64_t kTile = 16;  // rows, columns, and pairs of the depth
// Rows that lie a multiple of so many bf16 apart fall on so few places of a first-level cache that it cannot hold 32.
constexpr int64_t kCollide = 1024;

#if defined(__AMX_BF16__)

// The tiles of this thread are ours as long as this lives. Others (oneDNN) look before they use theirs.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = kTile;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// sum (16 R, 16 C) fp32 [+]= A x B over all slices, whose depths are multiples of 16 pairs; rows from `row` of each A.
// `across`: from a tile of B to the one beside it.
template <int R, int C>
inline void TileProduct(const Slice* slices, int count, int64_t row, const uint32_t* b, int64_t ldb, float* sum,
                        int64_t ldsum, bool add, int64_t across = kTile) {
  static_assert(R <= 2 && C <= 2, "four sums, two tiles of A and two of B make eight");
  float* below = sum + kTile * ldsum;
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
  if (add) {
    _tile_loadd(0, sum, ldsum * 4);
    if constexpr (C > 1) _tile_loadd(1, sum + kTile, ldsum * 4);
    if constexpr (R > 1) _tile_loadd(2, below, ldsum * 4);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, below + kTile, ldsum * 4);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int s = 0; s < count; ++s) {
    const int64_t lda = slices[s].lda;
    const uint32_t* a = slices[s].a + row * lda;
    for (int64_t k = 0; k < slices[s].depth; k += kTile, b += kTile * ldb) {
      _tile_stream_loadd(6, b, ldb * 4);
      _tile_loadd(4, a + k, lda * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (C > 1) {
        _tile_stream_loadd(7, b + across, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        _tile_loadd(5, a + kTile * lda + k, lda * 4);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sum, ldsum * 4);
  if constexpr (C > 1) _tile_stored(1, sum + kTile, ldsum * 4);
  if constexpr (R > 1) _tile_stored(2, below, ldsum * 4);
  if constexpr (R > 1 && C > 1) _tile_stored(3, below + kTile, ldsum * 4);
  asm volatile("" ::: "memory");
}

#else

struct Tiles {
  Tiles() {}
};

#endif

}  // namespace
