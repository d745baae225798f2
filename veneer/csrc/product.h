// What a product is made of, for its kernels: product.cpp and few_rows.h.
#pragma once

#include "quantized.h"
#include "tile.h"

namespace {

constexpr int kMaxTerms = kMaxSlices;

enum Kind { kByRow = 0, kByColumn = 1, kQuantizedByRow = 2, kQuantizedByColumn = 3 };

// One term of a sum: a (m, depth) bf16 times a weight, which lies as (n, depth) "by row" or as (depth, n) "by column".
struct Term {
  const uint16_t* a;
  int64_t lda;    // elements between rows of a
  int64_t depth;  // even
  const uint16_t* weight;
  int64_t ldw;  // elements between rows of the weight
  const FourBit* four_bit;
  const Int8* int8;  // of a quantised weight there is one of the two
  int64_t kind;
  const float* row_scale;  // (depth) of a weight that lies by column, or null: its rows are multiplied with it

  // Elements [from, from + count) of a row of a quantised weight, as bf16.
  void DecodeRow(int64_t row, int64_t from, int64_t count, uint16_t* out) const {
    const int64_t first = row * ldw + from;
    if (int8)
      DecodeInt8(int8->codes + first, int8->scale[row], count, out);
    else
      Decode<kBFloat16>(*four_bit, first, count, out);
  }
  // Elements [from, from + count) of a row of a weight by column: where it lies, or decoded to `room`.
  const uint16_t* Row(int64_t row, int64_t from, int64_t count, uint16_t* room) const {
    if (kind == kByColumn) return weight + row * ldw + from;
    DecodeRow(row, from, count, room);
    return room;
  }
};

// Where finished sums go: scaled, bias and residual added, rounded, stored; columns beyond `live` are not there. The
// rests, dense like what they belong to, are what rounding took away: a residual stream of 16 bits twice is as good as
// one of fp32. plain, which lies as y does: the sums themselves.
struct Output {
  uint16_t* y;
  int64_t ldy;
  const uint16_t *bias, *residual;
  int64_t ldr, live;
  const uint16_t* residual_rest;
  uint16_t* rest;
  const float* scale;  // (n)
  uint16_t* plain;

  Output At(int64_t shift) const { return Moved(shift, shift, shift, live - shift); }
  Output From(int64_t row) const { return Moved(row * ldy, 0, row * ldr, live); }
  Output Moved(int64_t of_y, int64_t of_bias, int64_t of_residual, int64_t columns) const {
    return {y + of_y,
            ldy,
            bias ? bias + of_bias : nullptr,
            residual ? residual + of_residual : nullptr,
            ldr,
            columns,
            residual_rest ? residual_rest + of_residual : nullptr,
            rest ? rest + of_y : nullptr,
            scale ? scale + of_bias : nullptr,
            plain ? plain + of_y : nullptr};
  }
  void Put(int64_t row, int64_t j, float value) const {
    if (plain) plain[row * ldy + j] = ToBFloat16(value);
    if (scale) value *= scale[j];
    if (bias) value += FromBFloat16(bias[j]);
    if (residual) value += FromBFloat16(residual[row * ldr + j]);
    if (residual_rest) value += FromBFloat16(residual_rest[row * ldr + j]);
    const uint16_t rounded = y[row * ldy + j] = ToBFloat16(value);
    if (rest) rest[row * ldy + j] = ToBFloat16(value - FromBFloat16(rounded));
  }
  void Put(int64_t row, int64_t j, Vec value) const {
    if (plain) StoreForLater(plain + row * ldy + j, value);
    if (scale) value *= Load(scale + j);
    if (bias) value += LoadBFloat16(bias + j);
    if (residual) value += LoadBFloat16(residual + row * ldr + j);
    if (residual_rest) value += LoadBFloat16(residual_rest + row * ldr + j);
    if (rest) StoreBFloat16(rest + row * ldy + j, value - (Vec)(RoundBFloat16(value) << 16));
    StoreBFloat16(y + row * ldy + j, value);
  }
  void Some(int64_t row, int64_t columns, const float* sum) const {
    for (int64_t j = 0; j < columns && j < live; ++j) Put(row, j, sum[j]);
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
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) Put(row + r, j * kWidth, sum[r][j]);
  }
};

thread_local Scratch decoded;  // while `scratch` of the first thread holds what all threads read

struct Terms {
  const Term* terms;
  int count;
  int64_t depth;
};

}  // namespace
