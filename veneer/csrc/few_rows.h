// Products of a quantised weight, by row, with few rows of x: each weight is decoded once, in registers, and used for
// all.
#pragma once

#include "product.h"

namespace {

constexpr int64_t kFewRows = 12;  // from here on, packing panels is faster; with AMX see kMoreRows

// One row of a 4-bit weight times the rows of x: any depth, any instruction set.
void DotRow(const FourBit& w, int64_t first, int64_t depth, const uint16_t* x, int64_t ldx, int64_t m, float* sums) {
  constexpr int64_t kPiece = 512;
  alignas(64) uint16_t row[kPiece];
  for (int64_t i = 0; i < m; ++i) sums[i] = 0.f;
  for (int64_t from = 0; from < depth; from += kPiece) {
    const int64_t count = depth - from < kPiece ? depth - from : kPiece;
    Decode<kBFloat16>(w, first + from, count, row);
    for (int64_t i = 0; i < m; ++i) {
      const uint16_t* a = x + i * ldx + from;
      Vec total = Vec{};
      int64_t d = 0;
      for (; d + kWidth <= count; d += kWidth) total = Fma(LoadBFloat16(row + d), LoadBFloat16(a + d), total);
      float rest = 0.f;
      for (; d < count; ++d) rest += FromBFloat16(row[d]) * FromBFloat16(a[d]);
      sums[i] += Sum(total) + rest;
    }
  }
}

// R rows of an 8-bit weight times M rows of x, sums (R, M): the codes are multiplied as they are, in fp32, the sum
// scaled.
template <int M, int R>
void DotInt8(const Int8& w, int64_t row, int64_t depth, const uint16_t* x, int64_t ldx, float* sums) {
  const int8_t* codes = w.codes + row * depth;
  Vec total[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) total[r][i] = Vec{};
  int64_t d = 0;
  for (; d + kWidth <= depth; d += kWidth) {
    Vec weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weights[r] = LoadInt8(codes + r * depth + d);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec a = LoadBFloat16(x + i * ldx + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][i] = Fma(weights[r], a, total[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < M; ++i) {
      float rest = 0.f;
      for (int64_t k = d; k < depth; ++k) rest += codes[r * depth + k] * FromBFloat16(x[i * ldx + k]);
      sums[r * M + i] = (Sum(total[r][i]) + rest) * w.scale[row + r];
    }
}

template <int M>
void DotInt8Of(int64_t m, int64_t rows, const Int8& w, int64_t row, int64_t depth, const uint16_t* x, int64_t ldx,
               float* sums) {
  if constexpr (M > 0) {
    if (m != M) return DotInt8Of<M - 1>(m, rows, w, row, depth, x, ldx, sums);
    constexpr int kRowsAtOnce = M <= 2 ? 4 : M <= 5 ? 2 : 1;  // their sums stay in registers, and do not wait
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) DotInt8<M, kRowsAtOnce>(w, row + r, depth, x, ldx, sums + r * M);
    for (; r < rows; ++r) DotInt8<M, 1>(w, row + r, depth, x, ldx, sums + r * M);
  }
}

#if defined(__AVX512BW__)
// The scales of some blocks, as FourBit::Scale gives them.
void Scales(const FourBit& w, int64_t first, int64_t count, float* out) {
  if (!w.nested) {
    std::memcpy(out, w.absmax + first, count * 4);
    return;
  }
  const __m512 offset = _mm512_set1_ps(*w.offset);
  while (count > 0) {
    const int64_t left = kNestedBlock - first % kNestedBlock, some = left < count ? left : count;
    const __m512 nested = _mm512_set1_ps(w.nested[first / kNestedBlock]);
    int64_t i = 0;
    for (; i + 16 <= some; i += 16) {
      const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.absmax_code + first + i));
      const __m512 value = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(code), w.dynamic_map, 4);
      _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_mul_ps(value, nested), offset));
    }
    for (; i < some; ++i) out[i] = w.Scale(first + i);
    first += some, count -= some, out += some;
  }
}

// 128 weights are 64 bytes, of two blocks: as 32 lanes of 16 bits, lane l holds the codes of weights 4l to 4l + 3, so
// one lookup in a table of 16 bits gives 32 weights, 4 apart; x is brought into that order.
constexpr int64_t kGroup = 128;

void OrderForGroups(const uint16_t* x, int64_t depth, uint16_t* to) {  // a last half group is filled up with zeros
  alignas(64) uint16_t places[2][32];  // of 64 elements: those of part 0 and 1, and those of part 2 and 3
  for (int l = 0; l < 32; ++l) places[0][l] = l % 16 * 4 + l / 16, places[1][l] = places[0][l] + 2;
  const __m512i first = _mm512_load_si512(places[0]), second = _mm512_load_si512(places[1]);
  for (int64_t g = 0; g < depth; g += kGroup, to += kGroup) {
    const __mmask32 there = g + kGroup <= depth ? 0xffffffffu : 0;
    const __m512i a = _mm512_loadu_si512(x + g), b = _mm512_loadu_si512(x + g + 32);
    const __m512i c = _mm512_maskz_loadu_epi16(there, x + g + 64), d = _mm512_maskz_loadu_epi16(there, x + g + 96);
    const __m512i ab = _mm512_permutex2var_epi16(a, first, b), cd = _mm512_permutex2var_epi16(c, first, d);
    _mm512_storeu_si512(to, _mm512_shuffle_i64x2(ab, cd, 0x44));
    _mm512_storeu_si512(to + 32, _mm512_shuffle_i64x2(ab, cd, 0xee));
    const __m512i ef = _mm512_permutex2var_epi16(a, second, b), gh = _mm512_permutex2var_epi16(c, second, d);
    _mm512_storeu_si512(to + 64, _mm512_shuffle_i64x2(ef, gh, 0x44));
    _mm512_storeu_si512(to + 96, _mm512_shuffle_i64x2(ef, gh, 0xee));
  }
}

// ---- one row, or a few: whole numbers --------------------------------------------------------------------
// Sums of 16-bit whole numbers are exact in 32 bits, three times as fast as bf16 dot products (Xeon), and the table
// needs no scaling: FP4's values times w.whole are whole numbers, NF4's are off by at most 0.32, which is 4e-5 of a
// block's largest weight (rounding to bf16: 2e-3). w.whole is below 8192. x has 15 bits and a power of two for each
// block: what is over 1/128 of the block's largest is exact, the rest is off by at most 2^-15 of that. Eight products
// of a lane stay below 2^31.

#if defined(__AVX512BF16__)
constexpr int kWholeRows = 2;  // beyond, bf16 dot products, or tiles, are as fast
#else
constexpr int kWholeRows = kFewRows - 1;
#endif
// A row of x as whole numbers in the order of the lookups, and, 16 lanes a group, what their sums are multiplied with.
// False: something in it is not finite.
bool WholeNumbers(const uint16_t* x, int64_t depth, float whole, uint16_t* to, float* factors) {
  constexpr int kSmallest = 27;  // exponents below it, numbers below 2^-100, are taken for it
  for (int64_t from = 0; from < depth; from += kBlock) {
    const __m512i a = _mm512_loadu_si512(x + from), b = _mm512_loadu_si512(x + from + 32);
    const __m512i most = _mm512_and_si512(_mm512_max_epu16(_mm512_slli_epi16(a, 1), _mm512_slli_epi16(b, 1)),
                                          _mm512_set1_epi16(static_cast<int16_t>(0xff00)));
    const __m512i pairs = _mm512_max_epu16(most, _mm512_srli_epi32(most, 16));
    int exponent = _mm512_reduce_max_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff))) >> 8;
    if (exponent == 255) return false;
    exponent = exponent < kSmallest ? kSmallest : exponent;
    const Vec scale = (Vec)_mm512_set1_epi32((268 - exponent) << 23);             // 2^(14 - (exponent - 127))
    const Vec back = (Vec)_mm512_set1_epi32((exponent - 14) << 23) / Set(whole);  // its inverse / whole
    for (int64_t i = 0; i < kBlock; i += kWidth) {
      const __m512i number = _mm512_cvtps_epi32((__m512)(LoadBFloat16(x + from + i) * scale));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + from + i), _mm512_cvtepi32_epi16(number));
    }
    _mm256_storeu_ps(factors + from / 8, _mm512_castps512_ps256((__m512)back));
  }
  if (depth % kGroup) std::memset(factors + depth / 8, 0, 32);
  OrderForGroups(to, depth, to);
  return true;
}

// Group g of R rows of the weight, of two blocks or (half) of one, added to the sums.
template <int M, int R, bool kHalf>
inline void AddWhole(__m512i table, const uint8_t* packed, int64_t bytes_of_row, const float* scales, int64_t blocks,
                     const uint16_t* x, int64_t ldx, const float* factors, __m512 (&sum)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r, packed += bytes_of_row, scales += blocks) {
    __builtin_prefetch(packed + R * bytes_of_row);
    const __m512i bytes = kHalf ? _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)))
                                : _mm512_loadu_si512(packed);
    const __m512 both =
        _mm512_mask_broadcastss_ps(_mm512_set1_ps(scales[0]), 0xff00, _mm_load_ss(scales + (kHalf ? 0 : 1)));
    __m512i weights[4] = {_mm512_srli_epi16(bytes, 4), bytes, _mm512_srli_epi16(bytes, 12),
                          _mm512_srli_epi16(bytes, 8)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) weights[j] = _mm512_permutexvar_epi16(weights[j], table);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_loadu_si512(x + i * ldx + 32 * j);
#if defined(__AVX512VNNI__)
        total = _mm512_dpwssd_epi32(total, weights[j], a);
#else
        total = _mm512_add_epi32(total, _mm512_madd_epi16(weights[j], a));
#endif
      }
      const __m512 factor = _mm512_mul_ps(both, _mm512_loadu_ps(factors + i * ldx / 8));
      sum[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, sum[r][i]);
    }
  }
}

// sums (R, M) = R rows of the weight times M rows of x. x: (M, ldx) from WholeNumbers, factors: (M, ldx / 8),
// scales: (R, blocks of a row).
template <int M, int R>
void DotWhole(const FourBit& w, int64_t first, int64_t depth, const float* scales, const uint16_t* x, int64_t ldx,
              const float* factors, float* sums) {
  const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w.code), _mm512_set1_ps(w.whole)));
  const __m512i table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(code));  // of an index 5 bits count: twice
  const int64_t blocks = depth / kBlock;
  const uint8_t* packed = w.packed + first / 2;
  __m512 sum[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[r][i] = _mm512_setzero_ps();
  int64_t g = 0;
  for (; g + kGroup <= depth; g += kGroup)
    AddWhole<M, R, false>(table, packed + g / 2, depth / 2, scales + g / kBlock, blocks, x + g, ldx, factors + g / 8,
                          sum);
  if (g < depth)
    AddWhole<M, R, true>(table, packed + g / 2, depth / 2, scales + g / kBlock, blocks, x + g, ldx, factors + g / 8,
                         sum);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sums[r * M + i] = _mm512_reduce_add_ps(sum[r][i]);
}

template <int M>
void DotWholeOf(int64_t m, const FourBit& w, int64_t first, int64_t depth, const float* scales, const uint16_t* x,
                int64_t ldx, const float* factors, float* sums) {
  if constexpr (M > 0) {
    if (m == M) return DotWhole<M, 1>(w, first, depth, scales, x, ldx, factors, sums);
    DotWholeOf<M - 1>(m, w, first, depth, scales, x, ldx, factors, sums);
  }
}
#endif

#if defined(__AVX512BF16__)
// ---- more of them: bf16 ----------------------------------------------------------------------------------
// The values of both blocks stand in one register.

inline void DecodeGroup(const uint8_t* packed, const float* code, const float* scales, bool whole, __m512i* weights) {
  const __m512 codes = _mm512_loadu_ps(code), low = _mm512_mul_ps(codes, _mm512_set1_ps(scales[0]));
  const __m512 high = whole ? _mm512_mul_ps(codes, _mm512_set1_ps(scales[1])) : low;
  const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low), nibble = _mm512_set1_epi16(15);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const __m512i bytes = _mm512_maskz_loadu_epi16(whole ? 0xffffffffu : 0xffffu, packed);
  const __m512i index[4] = {_mm512_srli_epi16(bytes, 4), bytes, _mm512_srli_epi16(bytes, 12),
                            _mm512_srli_epi16(bytes, 8)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)  // (index & nibble) | second
    weights[j] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(index[j], nibble, second, 0xea), values);
}

template <int M>
void DotGroups(const FourBit& w, int64_t first, int64_t depth, const float* scales, const uint16_t* x, int64_t ldx,
               float* sums) {
  constexpr int kChains = M <= 2 ? 4 : M <= 4 ? 2 : 1;  // sums of one row that do not wait for each other
  __m512 sum[M][kChains];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t g = 0; g < depth; g += kGroup) {
    __m512i weights[4];
    DecodeGroup(w.packed + (first + g) / 2, w.code, scales + g / kBlock, g + kGroup <= depth, weights);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
        sum[i][j % kChains] = _mm512_dpbf16_ps(sum[i][j % kChains], (__m512bh)weights[j],
                                               (__m512bh)_mm512_loadu_si512(x + i * ldx + g + 32 * j));
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    __m512 total = sum[i][0];
#pragma GCC unroll 4
    for (int j = 1; j < kChains; ++j) total = _mm512_add_ps(total, sum[i][j]);
    sums[i] = _mm512_reduce_add_ps(total);
  }
}

template <int M>
void DotGroupsOf(int64_t m, const FourBit& w, int64_t first, int64_t depth, const float* scales, const uint16_t* x,
                 int64_t ldx, float* sums) {
  if constexpr (M > 0) {
    if (m == M) return DotGroups<M>(w, first, depth, scales, x, ldx, sums);
    DotGroupsOf<M - 1>(m, w, first, depth, scales, x, ldx, sums);
  }
}
#endif

// ---- what there is of these on every instruction set -----------------------------------------------------

enum Way { kPlain, kWholeNumbers, kBFloat16Groups };

// The rows of x as they are multiplied: as they lie, or brought into the order of the lookups.
struct Left {
  Way way;
  const uint16_t* x;
  int64_t ldx;
  const float* factors;
};

constexpr int64_t kTogether = 4;  // rows of the weight, which share a place's x

#if defined(__AVX512BW__)
Left Prepare(const Term& t, int64_t m) {  // in `scratch`
  if (t.int8 || t.depth % kBlock) return {kPlain, t.a, t.lda, nullptr};
  const int64_t ldx = (t.depth + kGroup - 1) / kGroup * kGroup;
  scratch.Reserve(m * ldx * 2 + m * ldx / 2 + 4096);
  uint16_t* x = scratch.Take<uint16_t>(m * ldx);
  float* factors = scratch.Take<float>(m * ldx / 8);
  bool whole = m <= kWholeRows;
  for (int64_t i = 0; whole && i < m; ++i)
    whole = WholeNumbers(t.a + i * t.lda, t.depth, t.four_bit->whole, x + i * ldx, factors + i * ldx / 8);
  if (whole) return {kWholeNumbers, x, ldx, factors};
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < m; ++i) OrderForGroups(t.a + i * t.lda, t.depth, x + i * ldx);
  return {kBFloat16Groups, x, ldx, nullptr};
#else
  return {kPlain, t.a, t.lda, nullptr};
#endif
}
#else
Left Prepare(const Term& t, int64_t) { return {kPlain, t.a, t.lda, nullptr}; }
#endif

// sums (rows, m) = some rows of the weight, at most kTogether from `row` on, times all rows of x.
void RowSums(const Term& t, const Left& left, int64_t m, int64_t row, int64_t rows, float* sums) {
  if (t.int8) return DotInt8Of<kFewRows - 1>(m, rows, *t.int8, row, t.depth, left.x, left.ldx, sums);
  const int64_t first = row * t.ldw;
  if (left.way == kPlain) {
    for (int64_t r = 0; r < rows; ++r)
      DotRow(*t.four_bit, first + r * t.ldw, t.depth, left.x, left.ldx, m, sums + r * m);
    return;
  }
#if defined(__AVX512BW__)
  const int64_t blocks = t.depth / kBlock;
  decoded.Reserve((rows * blocks + 1) * 4);
  float* scales = decoded.Take<float>(0);
  Scales(*t.four_bit, row * blocks, rows * blocks, scales);
  for (int64_t r = 0; r < rows;) {
    const int64_t at = first + r * t.depth;
    const float* scale = scales + r * blocks;
    float* to = sums + r * m;
    if (left.way == kWholeNumbers && m == 1 && rows - r >= 4) {
      DotWhole<1, 4>(*t.four_bit, at, t.depth, scale, left.x, left.ldx, left.factors, to);
      r += 4;
    } else if (left.way == kWholeNumbers && m == 2 && rows - r >= 2) {
      DotWhole<2, 2>(*t.four_bit, at, t.depth, scale, left.x, left.ldx, left.factors, to);
      r += 2;
    } else {
      if (left.way == kWholeNumbers)
        DotWholeOf<kWholeRows>(m, *t.four_bit, at, t.depth, scale, left.x, left.ldx, left.factors, to);
#if defined(__AVX512BF16__)
      if (left.way == kBFloat16Groups)
        DotGroupsOf<kFewRows - 1>(m, *t.four_bit, at, t.depth, scale, left.x, left.ldx, to);
#endif
      ++r;
    }
  }
#endif
}

// The first term quantised and by row, the others 16-bit by row.
void FewRows(const Terms& sum, int64_t m, int64_t n, const Output& out, int threads) {
  const Term& t = sum.terms[0];
  const Left left = Prepare(t, m);
#pragma omp parallel for schedule(static) num_threads(threads) if (n * t.depth > 131072)
  for (int64_t first = 0; first < n; first += kTogether) {
    const int64_t rows = n - first < kTogether ? n - first : kTogether;
    float sums[kTogether * kFewRows];
    RowSums(t, left, m, first, rows, sums);
    for (int64_t place = 0; place < rows * m; ++place) {
      const int64_t row = first + place / m, i = place % m;
      float value = sums[place];
      for (int s = 1; s < sum.count; ++s) {
        const Term& extra = sum.terms[s];
        for (int64_t d = 0; d < extra.depth; ++d)
          value += FromBFloat16(extra.a[i * extra.lda + d]) * FromBFloat16(extra.weight[row * extra.ldw + d]);
      }
      out.Put(i, row, value);
    }
  }
}

#if defined(__AMX_BF16__)
// ---- the same on the matrix unit: 32 rows of the weight are the left side, x the right ------------------------------

// Up to so many rows this is faster than packing the weight; the second, where rows of x collide in the first-level
// cache, which packing wants them to stay in.
constexpr int64_t kMoreRows = 80, kMoreRowsColliding = 384;
constexpr int64_t kTall = 2 * kTile;  // rows of the weight at once

inline int64_t Groups(const Term& t) { return (t.depth + kGroup - 1) / kGroup; }

// Group g of a term for some of 32 rows of the weight from `row` on, `stride` elements apart; zeros beyond its depth.
inline void FillGroup(const Term& t, int64_t row, int64_t g, const float* scales, int64_t from, int64_t end,
                      uint16_t* to, int64_t stride) {
  const int64_t left = t.depth - g * kGroup, some = left < kGroup ? left : kGroup;
  if (t.kind == kByRow) {
    for (int64_t r = from; r < end; ++r) {
      std::memcpy(to + r * stride, t.weight + (row + r) * t.ldw + g * kGroup, some * 2);
      std::memset(to + r * stride + some, 0, (kGroup - some) * 2);
    }
    return;
  }
  const int64_t blocks = t.depth / kBlock;
  for (int64_t r = from; r < end; ++r) {
    __m512i weights[4];
    const uint8_t* packed = t.four_bit->packed + ((row + r) * t.ldw + g * kGroup) / 2;
    __builtin_prefetch(packed + 4 * kGroup / 2);
    DecodeGroup(packed, t.four_bit->code, scales + r * blocks + 2 * g, some == kGroup, weights);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(to + r * stride + 32 * j, weights[j]);
  }
}

// One tile of the depth. C 1: even and odd ones have sums of their own, which do not wait for each other.
template <int C, int J>
inline void Step(const uint16_t* a, const uint32_t* b, int64_t across) {
  _tile_loadd(6, b + J * kTile * kTile, kTile * 4);
  if constexpr (C > 1) _tile_loadd(7, b + across + J * kTile * kTile, kTile * 4);
  _tile_loadd(4, a + 32 * J, kGroup * 2);
  _tile_loadd(5, a + kTile * kGroup + 32 * J, kGroup * 2);
  if constexpr (C == 1 && J % 2 == 1) {
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(3, 5, 6);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (C > 1) {
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// sum (32, 32) = 32 rows of the weights times up to 32 rows of x. While a group is multiplied the next one is decoded.
template <int C>
void FewTiles(const Terms& sum, int64_t row, const float* scales, const uint32_t* b, int64_t across, float* out) {
  alignas(64) uint16_t weights[2][kTall * kGroup];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int turn = 0;
  FillGroup(sum.terms[0], row, 0, scales, 0, kTall, weights[0], kGroup);
  for (int s = 0; s < sum.count; ++s)
    for (int64_t g = 0, groups = Groups(sum.terms[s]); g < groups; ++g, turn ^= 1, b += kGroup / 2 * kTile) {
      const bool same = g + 1 < groups, more = same || s + 1 < sum.count;
      const Term& next = sum.terms[same || !more ? s : s + 1];
      const auto fill = [&](int64_t from) {
        if (more) FillGroup(next, row, same ? g + 1 : 0, scales, from, from + 8, weights[turn ^ 1], kGroup);
        asm volatile("" ::: "memory");
      };
      fill(0);
      Step<C, 0>(weights[turn], b, across);
      fill(8);
      Step<C, 1>(weights[turn], b, across);
      fill(16);
      Step<C, 2>(weights[turn], b, across);
      fill(24);
      Step<C, 3>(weights[turn], b, across);
    }
  _tile_stored(0, out, kTall * 4);
  _tile_stored(1, out + kTile, kTall * 4);
  _tile_stored(2, out + kTile * kTall, kTall * 4);
  _tile_stored(3, out + kTile * kTall + kTile, kTall * 4);
  asm volatile("" ::: "memory");
  if (C == 1)
    for (int64_t r = 0; r < kTall; ++r) Store(out + r * kTall, Load(out + r * kTall) + Load(out + r * kTall + kTile));
}

// Sums of 32 rows of the weight from `row` on, and of 16 rows of x from `first` on, to where they belong.
void StoreTurned(const float* sum, int64_t ldsum, int64_t row, int64_t first, int64_t m, const Output& out) {
  alignas(64) float turned[kTile * kTile];
  for (int64_t half = 0; half < kTall; half += kTile) {
    Turn(reinterpret_cast<const uint32_t*>(sum + half * ldsum), ldsum, reinterpret_cast<uint32_t*>(turned), kTile);
    for (int64_t i = 0; i < kTile && first + i < m; ++i) out.Put(first + i, row + half, Load(turned + i * kTile));
  }
}

// Some blocks of 32 rows of the weight times all rows of x, a stretch of the depth at a time: what of both sides is
// worked on stays in the second-level cache. weights: (32 blocks, kStretch + 32); sums: (blocks, 32, 16 tiles).
constexpr int64_t kStretch = 512;
constexpr int64_t kStride = kStretch + 32;  // rows of a power of two would fall on the same places of the cache

void Stretches(const Terms& sum, int64_t row, int64_t blocks, const float* scales, const uint32_t* x, int64_t across,
               int64_t tiles, uint16_t* weights, float* sums) {
  int64_t in_stretch = 0;
  bool add = false;
  const int64_t width = tiles * kTile;
  for (int s = 0; s < sum.count; ++s)
    for (int64_t g = 0, groups = Groups(sum.terms[s]); g < groups; ++g) {
      for (int64_t b = 0; b < blocks; ++b)
        FillGroup(sum.terms[s], row + b * kTall, g, scales + b * kTall * (sum.terms[s].depth / kBlock), 0, kTall,
                  weights + b * kTall * kStride + in_stretch, kStride);
      in_stretch += kGroup;
      if (in_stretch < kStretch && (g + 1 < groups || s + 1 < sum.count)) continue;
      for (int64_t b = 0; b < blocks; ++b) {
        const Slice slice{reinterpret_cast<const uint32_t*>(weights + b * kTall * kStride), kStride / 2,
                          in_stretch / 2};
        for (int64_t tile = 0; tile < tiles; tile += 2) {
          float* place = sums + b * kTall * width + tile * kTile;
          if (tile + 1 < tiles)
            TileProduct<2, 2>(&slice, 1, 0, x + tile * across, kTile, place, width, add, across);
          else
            TileProduct<2, 1>(&slice, 1, 0, x + tile * across, kTile, place, width, add, across);
        }
      }
      x += in_stretch / 2 * kTile;
      in_stretch = 0, add = true;
    }
}

// The first term 4-bit by row, whole blocks in each row; n >= 32. The last rows of the weight are done with some before
// them.
void MoreRows(const Terms& sum, int64_t m, int64_t n, const Output& out, int threads) {
  if (m <= kWholeRows) return FewRows(sum, m, n, out, threads);
  int64_t groups = 0, scales_of_row = 0;
  for (int s = 0; s < sum.count; ++s) {
    groups += Groups(sum.terms[s]);
    if (sum.terms[s].kind == kQuantizedByRow) scales_of_row = sum.terms[s].depth / kBlock;
  }
  const int64_t depth = groups * kGroup, tiles = (m + kTile - 1) / kTile, across = depth / 2 * kTile;
  int64_t blocks = tiles <= 2 ? 1 : n / (kTall * 4 * threads);  // of 32 rows in one task
  blocks = blocks < 1 ? 1 : blocks > 4 ? 4 : blocks;
  scratch.Reserve(tiles * kTile * depth * 4 + 4096);
  uint16_t* x = scratch.Take<uint16_t>(tiles * kTile * depth);
  uint32_t* packed = scratch.Take<uint32_t>(tiles * across);
#pragma omp parallel num_threads(threads) if (n * depth > 131072)
  {
    Tiles ours;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles * kTile; ++i) {
      uint16_t* to = x + i * depth;
      if (i >= m) {
        std::memset(to, 0, depth * 2);
        continue;
      }
      for (int s = 0; s < sum.count; to += Groups(sum.terms[s]) * kGroup, ++s) {
        const Term& t = sum.terms[s];
        if (t.kind == kQuantizedByRow) {
          OrderForGroups(t.a + i * t.lda, t.depth, to);
          continue;
        }
        std::memcpy(to, t.a + i * t.lda, t.depth * 2);
        std::memset(to + t.depth, 0, (Groups(t) * kGroup - t.depth) * 2);
      }
    }
#pragma omp for schedule(static) collapse(2)
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t k = 0; k < depth / 2; k += kTile)
        Turn(reinterpret_cast<const uint32_t*>(x + tile * kTile * depth) + k, depth / 2,
             packed + tile * across + k * kTile, kTile);
    const int64_t rows = blocks * kTall, width = tiles <= 2 ? kTall : tiles * kTile;
    decoded.Reserve(rows * (scales_of_row * 4 + kStride * 2 + width * 4) + 4096);
    float* scales = decoded.Take<float>(rows * scales_of_row);
    uint16_t* weights = decoded.Take<uint16_t>(rows * kStride);
    float* sums = decoded.Take<float>(rows * width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t from = 0; from < n; from += rows) {
      const int64_t here = n - from < rows ? (n - from + kTall - 1) / kTall : blocks;
      const int64_t row = from + here * kTall <= n ? from : n - here * kTall;
      Scales(*sum.terms[0].four_bit, row * scales_of_row, here * kTall * scales_of_row, scales);
      if (tiles == 1)
        FewTiles<1>(sum, row, scales, packed, across, sums);
      else if (tiles == 2)
        FewTiles<2>(sum, row, scales, packed, across, sums);
      else
        Stretches(sum, row, here, scales, packed, across, tiles, weights, sums);
      for (int64_t b = 0; b < here; ++b)
        for (int64_t tile = 0; tile < tiles; ++tile)
          StoreTurned(sums + b * kTall * width + tile * kTile, width, row + b * kTall, tile * kTile, m, out);
    }
  }
}
#endif

}  // namespace
