// The inner loop of the products that do not run on a matrix unit: a tile of sums in registers, 64 columns of B packed
// in pairs of bf16 along the depth (simd.h), A as it lies.
//
// Sets with a bf16 dot product multiply the pairs as they are. For the others both sides are brought to fp32 before,
// some rows and a stretch of the depth at a time, so that the inner loop is loads and multiply-adds only: taking pairs
// apart there costs half of the speed.
#pragma once

#include "amx.h"

namespace {

#if defined(__AVX512BF16__)
constexpr bool kWiden = false;
constexpr int kRows = 6, kColumns = 4;  // of a tile, in rows and vectors: 24 of 32 registers
#else
constexpr bool kWiden = true;
#if defined(__AVX512F__)
constexpr int kRows = 12, kColumns = 2;
#elif defined(__AVX2__)
constexpr int kRows = 6, kColumns = 2;  // 12 of 16 registers
#else
constexpr int kRows = 4, kColumns = 2;
#endif
#endif
constexpr int64_t kStrip = kColumns * kWidth;
constexpr int64_t kWideDepth = 256;               // values of the depth that are brought to fp32 at once
constexpr int64_t kWideRows = 48;                 // rows that share a strip of B in the first-level cache
constexpr int64_t kWideStride = kWideDepth + 16;  // not a power of two: rows would share the sets of a cache
constexpr int kMaxSlices = 16;

// sum += A x B. Depth and lda in pairs; where kWiden, in values, and both sides are the bits of fp32.
template <int R, int C>
inline void Accumulate(Vec (&sum)[R][C], const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Bits right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = LoadAs<Bits>(b + j * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Bits left = Bits{} + a[r * lda + k];
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j)
#if defined(__AVX512BF16__)
        sum[r][j] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][j], (__m512bh)left, (__m512bh)right[j]);
#else
        sum[r][j] = Fma((Vec)left, (Vec)right[j], sum[r][j]);
#endif
    }
  }
}

// Where the sums of a tile go. This one: they stay, to be added to or turned by the caller.
struct Keep {
  Keep At(int64_t) const { return {}; }
  Keep From(int64_t) const { return {}; }
  template <int R, int C>
  void Take(int64_t, const Vec (&sum)[R][C], float* part, int64_t ldpart) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) Store(part + r * ldpart + j * kWidth, sum[r][j]);
  }
};

// kFirst: the sums start at zero, else at what stands in `part`. All loops over the sums are unrolled: they live in
// registers only if every index is known, and if nothing around them wants registers too: so it is not inlined.
template <int R, int C, bool kFirst, class Out>
__attribute__((noinline)) void Tile(const Slice* slices, int count, int64_t row, const uint32_t* b, int64_t ldb,
                                    float* part, int64_t ldpart, const Out& out) {
  Vec sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sum[r][j] = kFirst ? Vec{} : Load(part + r * ldpart + j * kWidth);
  if constexpr (kWiden) {
    Accumulate<R, C>(sum, slices->a + row * kWideStride, kWideStride, b, kStrip, slices->depth);
  } else {
    for (int s = 0; s < count; ++s) {
      Accumulate<R, C>(sum, slices[s].a + row * slices[s].lda, slices[s].lda, b, ldb, slices[s].depth);
      b += slices[s].depth * ldb;
    }
  }
  out.template Take<R, C>(row, sum, part, ldpart);
}

// The rows that are left after the full tiles: one tile of just so many.
template <int R, int C, bool kFirst, class Out>
inline void Rest(int64_t rows, const Slice* slices, int count, int64_t row, const uint32_t* b, int64_t ldb, float* part,
                 int64_t ldpart, const Out& out) {
  if constexpr (R > 0) {
    if (rows == R) return Tile<R, C, kFirst>(slices, count, row, b, ldb, part, ldpart, out);
    Rest<R - 1, C, kFirst>(rows, slices, count, row, b, ldb, part, ldpart, out);
  }
}

template <int C, bool kFirst, class Out>
void Rows(const Slice* slices, int count, int64_t rows, const uint32_t* b, int64_t ldb, float* part, int64_t ldpart,
          const Out& out) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    Tile<kRows, C, kFirst>(slices, count, row, b, ldb, part + row * ldpart, ldpart, out);
  Rest<kRows - 1, C, kFirst>(rows - row, slices, count, row, b, ldb, part + row * ldpart, ldpart, out);
}

// B: `columns` <= 64 columns in pairs -> fp32, strips of kStrip columns one after the other.
inline void WidenRight(const uint32_t* b, int64_t ldb, int64_t pairs, int64_t columns, uint32_t* to) {
  for (int64_t j = 0; j < columns; j += kWidth) {
    uint32_t* out = to + j / kStrip * kStrip * 2 * pairs + j % kStrip;
    for (int64_t k = 0; k < pairs; ++k, out += 2 * kStrip) {
      const Bits both = LoadAs<Bits>(b + k * ldb + j), low = both << 16, high = both & 0xffff0000u;
      std::memcpy(out, &low, sizeof low);
      std::memcpy(out + kStrip, &high, sizeof high);
    }
  }
}

// A: some rows of all slices side by side, as fp32. more: rows that follow; those wanted next are fetched.
inline void WidenLeft(const Slice* slices, int count, int64_t row, int64_t rows, int64_t more, uint32_t* to) {
  for (int s = 0; s < count; ++s) {
    const int64_t depth = 2 * slices[s].depth;
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* a = reinterpret_cast<const uint16_t*>(slices[s].a + (row + r) * slices[s].lda);
      uint32_t* out = to + r * kWideStride;
      int64_t k = 0;
      const uint16_t* next = r < more ? a + 2 * kWideRows * slices[s].lda : a;
      for (; k + kWidth <= depth; k += kWidth) {
        __builtin_prefetch(next + k);
        const Vec v = LoadBFloat16(a + k);
        std::memcpy(out + k, &v, sizeof v);
      }
      for (; k < depth; ++k) out[k] = static_cast<uint32_t>(a[k]) << 16;
    }
    to += depth;
  }
}

// Rows [from, to) of A, its slices one after the other along the depth, times the columns of a packed B; where kWiden,
// B is what WidenRight makes and the depth kWideDepth values at most. part: fp32, its first row is `from`.
template <bool kFirst, class Out>
void Down(const Slice* slices, int count, int64_t from, int64_t to, const uint32_t* b, int64_t ldb, int64_t columns,
          float* part, int64_t ldpart, const Out& out) {
  static thread_local Scratch wide;
  Slice all{nullptr, kWideStride, 0}, shifted[kMaxSlices];
  uint32_t* left = nullptr;
  if constexpr (kWiden) {
    for (int s = 0; s < count; ++s) all.depth += 2 * slices[s].depth;
    wide.Reserve(kWideRows * kWideStride * 4);
    all.a = left = wide.Take<uint32_t>(kWideRows * kWideStride);
  }
  const int64_t step = kWiden ? kWideRows : to - from;
  for (int64_t row = from; row < to; row += step) {
    const int64_t rows = to - row < step ? to - row : step;
    if constexpr (kWiden) {
      WidenLeft(slices, count, row, rows, to - row - rows, left);
    } else {
      for (int s = 0; s < count; ++s) shifted[s] = {slices[s].a + row * slices[s].lda, slices[s].lda, slices[s].depth};
    }
    const Slice* use = kWiden ? &all : shifted;
    const Out place = out.From(row);
    float* sums = part + (row - from) * ldpart;
    int64_t j = 0;
    for (; j + kStrip - kWidth < columns; j += kStrip)
      Rows<kColumns, kFirst>(use, count, rows, kWiden ? b + j * all.depth : b + j, ldb, sums + j, ldpart, place.At(j));
    for (; j < columns; j += kWidth)
      Rows<1, kFirst>(use, count, rows, kWiden ? b + j / kStrip * kStrip * all.depth + j % kStrip : b + j, ldb,
                      sums + j, ldpart, place.At(j));
  }
}

// The same for 64 columns of pairs on every set.
template <bool kFirst>
void DownPairs(const Slice* slices, int count, int64_t rows, const uint32_t* b, int64_t ldb, int64_t columns,
               float* part, int64_t ldpart) {
  if constexpr (kWiden) {
    static thread_local Scratch wide;
    wide.Reserve(kPanel * kWideDepth * 4);
    uint32_t* right = wide.Take<uint32_t>(kPanel * kWideDepth);
    int64_t pairs = 0;
    for (int s = 0; s < count; ++s) pairs += slices[s].depth;
    WidenRight(b, ldb, pairs, columns, right);
    b = right;
  }
  Down<kFirst>(slices, count, 0, rows, b, ldb, columns, part, ldpart, Keep{});
}

}  // namespace
