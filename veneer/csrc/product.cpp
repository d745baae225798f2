// Matrix products of a frozen weight, bf16 or NF4, and its low-rank terms, summed in fp32 and rounded once; and the
// gradient of the low-rank factors. Contract and formulas: veneer/ops/linear.py.
//
// A weight is brought panel by panel into the layout the dot product wants: pairs of bf16 along the depth, kPanel columns
// side by side. An NF4 weight is decoded on the way there, so a dense copy never exists.

#include "nf4.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;  // of one tile of accumulators, in rows and vectors: 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 4, kColumns = 2;
#else
constexpr int kRows = 2, kColumns = 2;
#endif
constexpr int64_t kPanel = 64;        // columns of a panel
constexpr int64_t kMaxDepth = 4096;   // of what is packed at once: 512 KiB, half of a usual second-level cache
constexpr int64_t kTaskRows = 1024;   // rows that share one packing of a panel
constexpr int kMaxTerms = 16;

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

struct Slice {  // of one term: what is in the packed panel
  const uint32_t* a;
  int64_t lda, depth;  // in pairs
};

template <int R, int C, bool kFirst, bool kLast, class Finish>
inline void Tile(const Slice* slices, int count, int64_t row, const uint32_t* b, float* part, const Finish& finish) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) sum[r][j] = kFirst ? Vec{} : Load(part + r * kPanel + j * kWidth);
  for (int s = 0; s < count; ++s) {
    const int64_t lda = slices[s].lda, depth = slices[s].depth;
    const uint32_t* a = slices[s].a + row * lda;
    for (int64_t k = 0; k < depth; ++k, b += kPanel) {
      Pair right[C];
      for (int j = 0; j < C; ++j) right[j] = Split(LoadAs<Bits>(b + j * kWidth));
      for (int r = 0; r < R; ++r) {
        const Pair left = Split(Bits{} + a[r * lda + k]);
        for (int j = 0; j < C; ++j) sum[r][j] = Dot2(sum[r][j], left, right[j]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {
      if (kLast)
        finish(row + r, j * kWidth, sum[r][j]);
      else
        Store(part + r * kPanel + j * kWidth, sum[r][j]);
    }
}

// Where finished sums go: bias and residual added, rounded, stored; columns beyond `live` are not there.
struct Output {
  uint16_t* y;
  int64_t ldy;
  const uint16_t *bias, *residual;
  int64_t ldr, live;

  void operator()(int64_t row, int64_t column, Vec sum) const {
    if (column + kWidth <= live) {
      if (bias) sum += LoadBFloat16(bias + column);
      if (residual) sum += LoadBFloat16(residual + row * ldr + column);
      StoreBFloat16(y + row * ldy + column, sum);
      return;
    }
    for (int lane = 0; column + lane < live; ++lane) {
      float value = sum[lane];
      if (bias) value += FromBFloat16(bias[column + lane]);
      if (residual) value += FromBFloat16(residual[row * ldr + column + lane]);
      y[row * ldy + column + lane] = ToBFloat16(value);
    }
  }
  Output At(int64_t shift) const {
    return {y + shift, ldy, bias ? bias + shift : nullptr, residual ? residual + shift : nullptr, ldr, live - shift};
  }
};

template <int R, bool kFirst, bool kLast, class Finish>
inline void Across(const Slice* slices, int count, int64_t row, const uint32_t* b, float* part, int64_t live,
                   const Finish& finish) {
  int64_t j = 0;
  for (; j < kPanel && j + (kColumns - 1) * kWidth < live; j += kColumns * kWidth)
    Tile<R, kColumns, kFirst, kLast>(slices, count, row, b + j, part + j, finish.At(j));
  for (; j < live; j += kWidth) Tile<R, 1, kFirst, kLast>(slices, count, row, b + j, part + j, finish.At(j));
}

template <bool kFirst, bool kLast, class Finish>
void Down(const Slice* slices, int count, int64_t from, int64_t to, const uint32_t* b, float* part, int64_t live,
          const Finish& finish) {
  int64_t row = from;
  for (; row + kRows <= to; row += kRows)
    Across<kRows, kFirst, kLast>(slices, count, row, b, part + (row - from) * kPanel, live, finish);
  if (row + kRows / 2 <= to) {
    Across<kRows / 2, kFirst, kLast>(slices, count, row, b, part + (row - from) * kPanel, live, finish);
    row += kRows / 2;
  }
  for (; row < to; ++row) Across<1, kFirst, kLast>(slices, count, row, b, part + (row - from) * kPanel, live, finish);
}

// 16 x 16 blocks of 32-bit pairs, turned: to[d][i] = from[i][d].
inline void TurnPairs(const uint16_t* from, int64_t stride, uint32_t* to) {
#if defined(__AVX512F__)
  __m512i r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * kPanel, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * kPanel, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * kPanel, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * kPanel, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int d = 0; d < 16; ++d) std::memcpy(to + d * kPanel + i, from + i * stride + 2 * d, 4);
#endif
}

// rows (count <= 64, depth) -> [depth / 2][64]; columns that are not there are zero.
void PackByRow(const uint16_t* rows, int64_t stride, int64_t count, int64_t depth, uint32_t* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    int64_t d = 0;
    for (; d + 16 <= depth / 2; d += 16) TurnPairs(rows + i * stride + 2 * d, stride, to + d * kPanel + i);
    for (; d < depth / 2; ++d)
      for (int64_t r = i; r < i + 16; ++r) std::memcpy(to + d * kPanel + r, rows + r * stride + 2 * d, 4);
  }
  for (; i < kPanel; ++i)
    for (int64_t d = 0; d < depth / 2; ++d) {
      to[d * kPanel + i] = 0;
      if (i < count) std::memcpy(to + d * kPanel + i, rows + i * stride + 2 * d, 4);
    }
}

// Two rows of `count` <= 64 -> 64 pairs.
inline void PackPair(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* to) {
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) {
    const Bits pair = __builtin_convertvector(LoadAs<Halves>(low + j), Bits) |
                      __builtin_convertvector(LoadAs<Halves>(high + j), Bits) << 16;
    std::memcpy(to + j, &pair, sizeof pair);
  }
  for (; j < kPanel; ++j) to[j] = j < count ? low[j] | static_cast<uint32_t>(high[j]) << 16 : 0;
}

// Columns [column, column + live) of depth [from, to) of a term's weight, packed; `rows`: room for 64 decoded rows.
void Pack(const Term& t, int64_t column, int64_t live, int64_t from, int64_t to, uint16_t* rows, uint32_t* b) {
  const int64_t depth = to - from;
  if (t.kind == kByRow) {
    PackByRow(t.weight + column * t.ldw + from, t.ldw, live, depth, b);
  } else if (t.kind == kByColumn) {
    for (int64_t d = 0; d < depth; d += 2) {
      const uint16_t* low = t.weight + (from + d) * t.ldw + column;
      PackPair(low, low + t.ldw, live, b + d / 2 * kPanel);
    }
  } else if (t.kind == kNf4ByRow) {
    for (int64_t i = 0; i < live; i += 16) {  // 16 rows at a time stay in the first-level cache
      const int64_t count = live - i < 16 ? live - i : 16;
      for (int64_t r = 0; r < count; ++r)
        Decode<kBFloat16>(*t.nf4, (column + i + r) * t.ldw + from, depth, rows + r * depth);
      if (count == 16)
        for (int64_t d = 0; d < depth / 2; d += 16) {
          if (d + 16 <= depth / 2)
            TurnPairs(rows + 2 * d, depth, b + d * kPanel + i);
          else
            for (int64_t e = d; e < depth / 2; ++e)
              for (int64_t r = 0; r < 16; ++r) std::memcpy(b + e * kPanel + i + r, rows + r * depth + 2 * e, 4);
        }
      else
        for (int64_t d = 0; d < depth / 2; ++d)
          for (int64_t r = 0; r < count; ++r) std::memcpy(b + d * kPanel + i + r, rows + r * depth + 2 * d, 4);
    }
    for (int64_t d = 0; d < depth / 2; ++d)
      for (int64_t i = live; i < kPanel; ++i) b[d * kPanel + i] = 0;
  } else {
    for (int64_t d = 0; d < depth; d += 2) {
      Decode<kBFloat16>(*t.nf4, (from + d) * t.ldw + column, live, rows);
      Decode<kBFloat16>(*t.nf4, (from + d + 1) * t.ldw + column, live, rows + kPanel);
      PackPair(rows, rows + kPanel, live, b + d / 2 * kPanel);
    }
  }
}

struct Terms {
  const Term* terms;
  int count;
  int64_t depth;
};

// One panel of columns for rows [from, to).
template <class Finish>
void Panel(const Terms& sum, int64_t column, int64_t live, int64_t from, int64_t to, const Finish& finish) {
  const int64_t deepest = sum.depth < kMaxDepth ? sum.depth : kMaxDepth;
  scratch.Reserve(deepest / 2 * kPanel * 4 + 64 * (deepest < 2 * kPanel ? 2 * kPanel : deepest) * 2 / 4 +
                  (sum.depth > kMaxDepth ? (to - from) * kPanel * 4 : 0) + 4096);
  uint32_t* b = scratch.Take<uint32_t>(deepest / 2 * kPanel);
  uint16_t* rows = scratch.Take<uint16_t>(16 * (deepest < 2 * kPanel ? 2 * kPanel : deepest));
  float* part = scratch.Take<float>(sum.depth > kMaxDepth ? (to - from) * kPanel : 0);
  int term = 0;
  int64_t at = 0;  // where in the term
  for (bool first = true, last = false; !last; first = false) {
    Slice slices[kMaxTerms];
    int count = 0;
    int64_t room = kMaxDepth, packed = 0;
    while (term < sum.count && room > 0) {
      const Term& t = sum.terms[term];
      const int64_t end = t.depth - at < room ? t.depth : at + room;
      Pack(t, column, live, at, end, rows, b + packed / 2 * kPanel);
      slices[count++] = {reinterpret_cast<const uint32_t*>(t.a + at), t.lda / 2, (end - at) / 2};
      packed += end - at;
      room -= end - at;
      at = end;
      if (at == t.depth) ++term, at = 0;
    }
    last = term == sum.count;
    if (first && last) Down<true, true>(slices, count, from, to, b, part, live, finish);
    else if (first) Down<true, false>(slices, count, from, to, b, part, live, finish);
    else if (last) Down<false, true>(slices, count, from, to, b, part, live, finish);
    else Down<false, false>(slices, count, from, to, b, part, live, finish);
  }
}

}  // namespace

// y (m, n) bf16 = sum of the terms [+ bias (n)] [+ residual (m, n)]. Depths and lda are even.
EXPORT(product)
(const Term* terms, int count, int64_t m, int64_t n, const uint16_t* bias, const uint16_t* residual, int64_t ldr,
 uint16_t* y, int64_t ldy, int threads) {
  Terms sum{terms, count, 0};
  for (int i = 0; i < count; ++i) sum.depth += terms[i].depth;
  const int64_t panels = (n + kPanel - 1) / kPanel;
  int64_t parts = (m + kTaskRows - 1) / kTaskRows;  // of the rows: more where there are few panels for many threads
  while (panels * parts < 4 * threads && m / (parts + 1) >= 64) ++parts;
  const int64_t rows = ((m + parts - 1) / parts + kRows - 1) / kRows * kRows;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (panels * parts > 1)
  for (int64_t task = 0; task < panels * parts; ++task) {
    const int64_t column = task / parts * kPanel, from = task % parts * rows;
    const int64_t to = from + rows < m ? from + rows : m, live = n - column < kPanel ? n - column : kPanel;
    if (from < to)
      Panel(sum, column, live, from, to,
            Output{y + column, ldy, bias ? bias + column : nullptr, residual ? residual + column : nullptr, ldr, live});
  }
}

// out (r, n) fp32, element (i, j) at i * row + j * col = sum over tokens of left (tokens, r) and right (tokens, n), bf16.
EXPORT(outer_sum)
(const uint16_t* left, int64_t ldl, int64_t r, const uint16_t* right, int64_t ldright, int64_t n, int64_t tokens,
 float* out, int64_t row, int64_t col, int threads) {
  constexpr int64_t kPiece = 256;  // tokens whose packed columns stay in the first-level cache
  const int64_t pairs = (tokens + 1) / 2;
  uint32_t* turned = static_cast<uint32_t*>(std::malloc(r * pairs * 4));
  if (turned == nullptr) std::abort();
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t i = 0; i < r; ++i)
      turned[i * pairs + p] = left[2 * p * ldl + i] |
                              (2 * p + 1 < tokens ? static_cast<uint32_t>(left[(2 * p + 1) * ldl + i]) << 16 : 0);
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t column = panel * kPanel, live = n - column < kPanel ? n - column : kPanel;
    scratch.Reserve(kPiece / 2 * kPanel * 4 + r * kPanel * 4 + 4096);
    uint32_t* b = scratch.Take<uint32_t>(kPiece / 2 * kPanel);
    float* part = scratch.Take<float>(r * kPanel);
    std::memset(part, 0, r * kPanel * 4);
    const uint16_t none[kPanel] = {};
    const Output nowhere{nullptr, 0, nullptr, nullptr, 0, kPanel};
    for (int64_t from = 0; from < tokens; from += kPiece) {
      const int64_t to = from + kPiece < tokens ? from + kPiece : tokens;
      for (int64_t t = from; t < to; t += 2)
        PackPair(right + t * ldright + column, t + 1 < tokens ? right + (t + 1) * ldright + column : none, live,
                 b + (t - from) / 2 * kPanel);
      const Slice slice{turned + from / 2, pairs, (to - from + 1) / 2};
      Down<false, false>(&slice, 1, 0, r, b, part, kPanel, nowhere);
    }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < live; ++j) out[i * row + (column + j) * col] = part[i * kPanel + j];
  }
  std::free(turned);
}
