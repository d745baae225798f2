// What a product is made of, for its kernels: product.cpp and few_rows.h.
#pragma once

#include "nf4.h"
#include "tile.h"

namespace {

constexpr int kMaxTerms = kMaxSlices;

enum Kind { kByRow = 0, kByColumn = 1, kNf4ByRow = 2, kNf4ByColumn = 3 };

// One term of a sum: a (m, depth) bf16 times a weight, which lies as (n, depth) "by row" or as (depth, n) "by column".
struct Term {
  const uint16_t* a;
  int64_t lda;    // elements between rows of a
  int64_t depth;  // even
  const uint16_t* weight;
  int64_t ldw;  // elements between rows of the weight
  const Nf4* nf4;
  int64_t kind;
};

// Where finished sums go: bias and residual added, rounded, stored; columns beyond `live` are not there.
struct Output {
  uint16_t* y;
  int64_t ldy;
  const uint16_t *bias, *residual;
  int64_t ldr, live;

  Output At(int64_t shift) const {
    return {y + shift, ldy, bias ? bias + shift : nullptr, residual ? residual + shift : nullptr, ldr, live - shift};
  }
  Output From(int64_t row) const {
    return {y + row * ldy, ldy, bias, residual ? residual + row * ldr : nullptr, ldr, live};
  }
  void Some(int64_t row, int64_t columns, const float* sum) const {
    for (int64_t j = 0; j < columns && j < live; ++j) {
      float value = sum[j];
      if (bias) value += FromBFloat16(bias[j]);
      if (residual) value += FromBFloat16(residual[row * ldr + j]);
      y[row * ldy + j] = ToBFloat16(value);
    }
  }
  template <int R, int C>
  void Take(int64_t row, Vec (&sum)[R][C], float*, int64_t) const {
    if (live < C * kWidth) {
      float some[R][C * kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) Store(some[r] + j * kWidth, sum[r][j]);
      for (int r = 0; r < R; ++r) Some(row + r, C * kWidth, some[r]);
      return;
    }
    if (bias)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        const Vec more = LoadBFloat16(bias + j * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r][j] += more;
      }
    if (residual)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) sum[r][j] += LoadBFloat16(residual + (row + r) * ldr + j * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) StoreBFloat16(y + (row + r) * ldy + j * kWidth, sum[r][j]);
  }
};

thread_local Scratch decoded;  // while `scratch` of the first thread holds what all threads read

struct Terms {
  const Term* terms;
  int count;
  int64_t depth;
};

}  // namespace
