// Reading quantised weights, as veneer/ops/reference.py says: a value times a scale in fp32, rounded once.
//
// 4 bits (NF4, FP4): a block of 64 weights is 32 bytes and one scale. Its 16 possible values are made once, already in
// the wanted type, and every weight is one lookup. 8 bits: a row has one scale.
#pragma once

#include "simd.h"

namespace {

constexpr int64_t kBlock = 64, kNestedBlock = 256;
enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A weight in 4 bits. code: its 16 values; whole: what makes them whole numbers, nearly (few_rows.h). The scales are
// fp32, or 8-bit codes when `nested` is there (double quantisation).
struct FourBit {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* absmax_code;
  const float* nested;
  const float* dynamic_map;
  const float* code;
  const float* offset;
  float whole;

  float Scale(int64_t block) const {
    return nested ? dynamic_map[absmax_code[block]] * nested[block / kNestedBlock] + *offset : absmax[block];
  }
};

// A weight in 8 bits, (rows, ld): codes times the scale of their row.
struct Int8 {
  const int8_t* codes;
  const float* scale;
};

inline uint16_t ToFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (rest < 0x38800000u) {                                               // subnormal: let the FPU round
    float shifted;
    std::memcpy(&shifted, &rest, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

// The 16 values of a block in 16 bits each.
template <int kType>
inline void Table16(const float* code, float scale, uint16_t* table) {
  if (kType == kFloat16) {
    for (int i = 0; i < 16; ++i) table[i] = ToFloat16(code[i] * scale);
    return;
  }
  for (int i = 0; i < 16; i += kWidth) {
    const Halves half = __builtin_convertvector(ExactBFloat16(Load(code + i) * Set(scale)), Halves);
    std::memcpy(table + i, &half, sizeof half);
  }
}

// A whole block; kType: bf16 or fp16.
template <int kType>
inline void DecodeBlock16(const uint8_t* packed, const float* code, float scale, uint16_t* out) {
  alignas(64) uint16_t table[16];
  Table16<kType>(code, scale, table);
#if defined(__AVX512BW__)
  const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
  for (int half = 0; half < 2; ++half) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed) + half));
    // 16-bit lane 2i wants the high nibble of byte i, lane 2i + 1 the low one; of an index 5 bits count, and the
    // table stands twice in the register, so that bit 4 does not matter
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    _mm512_storeu_si512(out + 32 * half, _mm512_permutexvar_epi16(index, values));
  }
#elif defined(__AVX2__)
  // two tables of bytes, the low and the high halves of the 16 values
  const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
  const __m256i sorted = _mm256_permute4x64_epi64(
      _mm256_shuffle_epi8(both, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8,
                                                 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)),
      0xd8);
  const __m256i low = _mm256_permute2x128_si256(sorted, sorted, 0x00);
  const __m256i high = _mm256_permute2x128_si256(sorted, sorted, 0x11);
  for (int half = 0; half < 2; ++half) {
    const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed) + half));
    __m256i index = _mm256_or_si256(_mm256_srli_epi16(byte, 4), _mm256_slli_epi16(byte, 8));
    index = _mm256_and_si256(index, _mm256_set1_epi8(15));
    const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
    const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
    __m256i* to = reinterpret_cast<__m256i*>(out + 32 * half);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }
#else
  for (int i = 0; i < 32; ++i) {
    out[2 * i] = table[packed[i] >> 4];
    out[2 * i + 1] = table[packed[i] & 15];
  }
#endif
}

inline void DecodeBlock32(const uint8_t* packed, const float* code, float scale, float* out) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
  for (int j = 0; j < 4; ++j) {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * j)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
    _mm512_storeu_ps(out + 16 * j, _mm512_permutexvar_ps(index, values));  // uses 4 bits of each index
  }
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(code), factor);
  const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(code + 8), factor);
  for (int j = 0; j < 8; ++j) {
    uint32_t bytes;
    std::memcpy(&bytes, packed + 4 * j, 4);
    const __m256i index =
        _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bytes)), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3: the upper half of the table
    _mm256_storeu_ps(out + 8 * j, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                   _mm256_permutevar8x32_ps(high, index), above));
  }
#else
  float table[16];
  for (int i = 0; i < 16; ++i) table[i] = code[i] * scale;
  for (int i = 0; i < 32; ++i) {
    out[2 * i] = table[packed[i] >> 4];
    out[2 * i + 1] = table[packed[i] & 15];
  }
#endif
}

template <int kType>
struct Stored {
  typedef uint16_t Type;
};
template <>
struct Stored<kFloat32> {
  typedef float Type;
};

// `count` weights from flat position `first` on.
template <int kType>
inline void Decode(const FourBit& w, int64_t first, int64_t count, typename Stored<kType>::Type* out) {
  const int64_t end = first + count;
  while (first < end) {
    const int64_t block = first / kBlock, stop = (block + 1) * kBlock < end ? (block + 1) * kBlock : end;
    const float scale = w.Scale(block);
    if (stop - first == kBlock) {
      if constexpr (kType == kFloat32)
        DecodeBlock32(w.packed + first / 2, w.code, scale, out);
      else
        DecodeBlock16<kType>(w.packed + first / 2, w.code, scale, out);
      out += kBlock;
      first = stop;
      continue;
    }
    for (; first < stop; ++first) {
      const float value = w.code[first % 2 ? w.packed[first / 2] & 15 : w.packed[first / 2] >> 4] * scale;
      if constexpr (kType == kFloat32)
        *out++ = value;
      else
        *out++ = kType == kBFloat16 ? ToBFloat16(value) : ToFloat16(value);
    }
  }
}

inline Vec LoadInt8(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = p[i];
  return v;
#endif
}

// `count` codes of one row as bf16.
inline void DecodeInt8(const int8_t* codes, float scale, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) StoreBFloat16(out + i, LoadInt8(codes + i) * Set(scale));
  for (; i < count; ++i) out[i] = ToBFloat16(codes[i] * scale);
}

}  // namespace
