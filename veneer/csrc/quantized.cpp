// NF4 and FP4: quantise, dequantise, and the scales of the scales. Contract and formulas: veneer/ops/reference.py;
// results equal it bit for bit. Blocks are independent, so they are split over threads.

#include "quantized.h"

namespace {

inline float FromFloat16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u)
    bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  else if (rest >= 0x400u)
    bits = sign | ((rest << 13) + 0x38000000u);
  else {
    const float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t Magnitude(float x) {  // |x| as bits: the order of non-negative floats, and NaN is above everything
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffffu;
}

template <int kType>
inline void LoadBlock(const void* w, int64_t first, int64_t count, float* x) {
  const uint16_t* half = static_cast<const uint16_t*>(w) + first;
  if (kType == kFloat32) {
    std::memcpy(x, static_cast<const float*>(w) + first, count * 4);
    return;
  }
  int64_t i = 0;
  if (kType == kBFloat16)
    for (; i + kWidth <= count; i += kWidth) Store(x + i, LoadBFloat16(half + i));
#if defined(__F16C__)
  else
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
#endif
  for (; i < count; ++i) x[i] = kType == kBFloat16 ? FromBFloat16(half[i]) : FromFloat16(half[i]);
}

// How to find a code: how many of the 15 midpoints lie below a value is its place among the sorted values of the
// code-book, and order[place] its code.
struct Book {
  const float* midpoints;
  const int32_t* order;
};

// A short last block: it divides, and keeps the clamped absmax, as bitsandbytes does. An odd end is padded with zero.
void QuantizeEnd(const float* x, int64_t count, const Book& book, uint8_t* packed, float* absmax) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = Magnitude(x[i]) > largest ? Magnitude(x[i]) : largest;
  float top;
  std::memcpy(&top, &largest, 4);
  *absmax = top < 1e-38f ? 1e-38f : top;
  for (int64_t i = 0; i < count; i += 2) {
    int32_t code[2];
    for (int64_t j = i; j < i + 2; ++j) {
      float scaled = j < count ? x[j] / *absmax : 0.f;
      scaled = scaled < -1.f ? -1.f : scaled > 1.f ? 1.f : scaled;
      int place = 0;
      for (int n = 0; n < 15; ++n) place += !(scaled <= book.midpoints[n]);  // NaN counts as larger than all
      code[j - i] = book.order[place];
    }
    packed[i / 2] = static_cast<uint8_t>(code[0] << 4 | code[1]);
  }
}

// The code of each lane; without AVX-512 its place among the sorted values.
inline Ints Codes(Vec scaled, const Book& book) {
#if defined(__AVX512F__)
  // four steps of a binary search, the table of midpoints in one register
  const __m512 table = _mm512_mask_loadu_ps(_mm512_setzero_ps(), 0x7fff, book.midpoints);
  __m512i code = _mm512_setzero_si512();
  for (int step = 8; step; step /= 2) {
    const __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(code, _mm512_set1_epi32(step - 1)), table);
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)scaled, middle, _CMP_NLE_UQ);
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
  }
  return (Ints)_mm512_permutexvar_epi32(code, _mm512_loadu_si512(book.order));
#else
  Ints code = Ints{};
  for (int n = 0; n < 15; ++n) code += (scaled <= Set(book.midpoints[n])) + 1;  // a true lane is -1
  return code;
#endif
}

void QuantizeBlock(const float* x, const Book& book, uint8_t* packed, float* absmax) {
  Bits most = Bits{};
  for (int i = 0; i < kBlock; i += kWidth) {
    const Bits size = (Bits)Load(x + i) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  uint32_t largest = 0;
  for (int i = 0; i < kWidth; ++i) largest = most[i] > largest ? most[i] : largest;
  std::memcpy(absmax, &largest, 4);
  const Vec inverse = Set(1.f / (*absmax < 1e-38f ? 1e-38f : *absmax)), one = Set(1.f);
#if !defined(__AVX512F__)
  alignas(64) int32_t codes[kBlock];
#endif
  for (int i = 0; i < kBlock; i += kWidth) {
    Vec scaled = Load(x + i) * inverse;
    scaled = scaled > one ? one : scaled;  // NaN stays
    scaled = scaled < -one ? -one : scaled;
    const Ints code = Codes(scaled, book);
#if defined(__AVX512F__)
    // as 64-bit lanes: the even weight in bits 0-3, the odd one in bits 32-35
    const __m512i pair = _mm512_or_si512(_mm512_slli_epi64((__m512i)code, 4), _mm512_srli_epi64((__m512i)code, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi64_epi8(pair));
#else
    std::memcpy(codes + i, &code, sizeof code);
#endif
  }
#if !defined(__AVX512F__)
  for (int i = 0; i < kBlock; i += 2)
    packed[i / 2] = static_cast<uint8_t>(book.order[codes[i]] << 4 | book.order[codes[i + 1]]);
#endif
}

template <int kType>
void Quantize(const void* w, int64_t n, const Book& book, uint8_t* packed, float* absmax, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1024)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kBlock, count = n - first < kBlock ? n - first : kBlock;
    alignas(64) float x[kBlock];
    LoadBlock<kType>(w, first, count, x);
    if (count == kBlock)
      QuantizeBlock(x, book, packed + first / 2, absmax + b);
    else
      QuantizeEnd(x, count, book, packed + first / 2, absmax + b);
  }
}

// What is written soon is fetched, a block at a time: without it the stores of fp32 wait for each other.
template <int kType>
void Dequantize(const FourBit& w, int64_t n, void* out, int threads) {
  typedef typename Stored<kType>::Type Type;
  constexpr int64_t kPiece = 32 * kBlock, kLine = 64 / sizeof(Type), kAhead = 2048 / sizeof(Type);
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 65536)
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = n - first < kPiece ? n - first : kPiece;
    Type* to = static_cast<Type*>(out) + first;
    for (int64_t at = 0; at < count; at += kBlock) {
      const int64_t some = count - at < kBlock ? count - at : kBlock;
      __builtin_prefetch(w.packed + (first + at + kAhead) / 2);
      for (int64_t i = 0; i < some; i += kLine) __builtin_prefetch(to + at + kAhead + i, 1);
      Decode<kType>(w, first + at, some, to + at);
    }
  }
}

}  // namespace

// w: n weights of `dtype`; midpoints: 15; order: 16; packed: ceil(n/2) bytes; absmax: ceil(n/64).
EXPORT(quantize_4bit)
(const void* w, int dtype, int64_t n, const float* midpoints, const int32_t* order, uint8_t* packed, float* absmax,
 int threads) {
  const Book book{midpoints, order};
  if (dtype == kFloat32) return Quantize<kFloat32>(w, n, book, packed, absmax, threads);
  if (dtype == kBFloat16) return Quantize<kBFloat16>(w, n, book, packed, absmax, threads);
  Quantize<kFloat16>(w, n, book, packed, absmax, threads);
}

// The reverse: out holds n weights of `dtype`.
EXPORT(dequantize_4bit)(const FourBit* w, int64_t n, void* out, int dtype, int threads) {
  if (dtype == kFloat32) return Dequantize<kFloat32>(*w, n, out, threads);
  if (dtype == kBFloat16) return Dequantize<kBFloat16>(*w, n, out, threads);
  Dequantize<kFloat16>(*w, n, out, threads);
}

// absmax: m scales; table: the code of each of 65,536 steps from -1 to 1; code: m; nested: ceil(m/256).
EXPORT(double_quantize)
(const float* absmax, int64_t m, float offset, const uint8_t* table, uint8_t* code, float* nested, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (m > 65536)
  for (int64_t first = 0; first < m; first += kNestedBlock) {
    const int64_t end = first + kNestedBlock < m ? first + kNestedBlock : m;
    uint32_t largest = 0;
    for (int64_t i = first; i < end; ++i) {
      const uint32_t size = Magnitude(absmax[i] - offset);
      largest = size > largest ? size : largest;
    }
    float top;
    std::memcpy(&top, &largest, 4);
    nested[first / kNestedBlock] = top;
    for (int64_t i = first; i < end; ++i) {
      const float scaled = (absmax[i] - offset) / top;
      // not a number: a block of equal scales; its code is 0
      code[i] = scaled != scaled ? 0 : table[static_cast<int32_t>((scaled + 1.f) / 2.f * 65535.f + 0.5f)];
    }
  }
}
