// NF4 quantise and dequantise behind a C ABI: scalar first, then AVX2 and AVX-512.
// Contract, formulas and the meaning of every argument: veneer/ops/reference.py. Results equal it bit for bit.
// One block is 64 weights: 32 packed bytes and one fp32 absmax. Blocks are independent, so they are split over threads.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kBlock = 64;
enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// ---- number formats -------------------------------------------------------------------------------------------

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t ToBFloat16(float value) {  // round to nearest even, as torch does
  uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t ToFloat16(float value) {
  uint32_t bits = FloatToBits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (rest < 0x38800000u) {                                               // subnormal: let the FPU round
    float shifted = BitsToFloat(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (FloatToBits(shifted) - 0x3f000000u));
  }
  uint32_t odd = (rest >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + odd) >> 13));
}

inline float FromFloat16(uint16_t half) {
  uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return BitsToFloat(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return BitsToFloat(sign | ((rest << 13) + 0x38000000u));
  float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24
  return BitsToFloat(sign | FloatToBits(small));
}

inline float Load(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  uint16_t half = static_cast<const uint16_t*>(data)[i];
  return dtype == kBFloat16 ? BitsToFloat(static_cast<uint32_t>(half) << 16) : FromFloat16(half);
}

inline void Store(void* data, int dtype, int64_t i, float value) {
  if (dtype == kFloat32)
    static_cast<float*>(data)[i] = value;
  else
    static_cast<uint16_t*>(data)[i] = dtype == kBFloat16 ? ToBFloat16(value) : ToFloat16(value);
}

// ---- scalar: any length, and the short last block of every path -----------------------------------------------

inline int Code(float scaled, const float* midpoints) {  // NaN counts as larger than all, as in torch.bucketize
  int code = 0;
  for (int i = 0; i < 15; ++i) code += !(scaled <= midpoints[i]);
  return code;
}

inline float Clamp(float value) { return value < -1.f ? -1.f : value > 1.f ? 1.f : value; }

void QuantizeScalar(const void* w, int dtype, int64_t first, int count, const float* midpoints, uint8_t* packed,
                    float* absmax) {
  float x[kBlock];
  uint32_t largest = 0;  // of |x| as bits: the order of non-negative floats, and NaN is above everything
  for (int i = 0; i < count; ++i) {
    x[i] = Load(w, dtype, first + i);
    uint32_t bits = FloatToBits(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const float top = BitsToFloat(largest), safe = top < 1e-38f ? 1e-38f : top, inverse = 1.f / safe;
  const bool whole = count == kBlock;
  *absmax = whole ? top : safe;
  for (int i = 0; i < count; i += 2) {
    int high = Code(Clamp(whole ? x[i] * inverse : x[i] / safe), midpoints), low = 7;
    if (i + 1 < count) low = Code(Clamp(whole ? x[i + 1] * inverse : x[i + 1] / safe), midpoints);
    packed[i / 2] = static_cast<uint8_t>(high << 4 | low);
  }
}

void DequantizeScalar(const uint8_t* packed, float absmax, const float* code, int64_t first, int count, void* out,
                      int dtype) {
  for (int i = 0; i < count; ++i) {
    int nibble = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
    Store(out, dtype, first + i, code[nibble] * absmax);
  }
}

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")))

// ---- AVX2: 8 weights at a time --------------------------------------------------------------------------------

TARGET_AVX2 inline __m256 Load8(const void* w, int dtype, int64_t i) {
  if (dtype == kFloat32) return _mm256_loadu_ps(static_cast<const float*>(w) + i);
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(w) + i));
  if (dtype == kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

TARGET_AVX2 void QuantizeAvx2(const void* w, int dtype, int64_t first, const float* midpoints, uint8_t* packed,
                              float* absmax) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256 x[8];
  __m256i largest = _mm256_setzero_si256();
  for (int j = 0; j < 8; ++j) {
    x[j] = Load8(w, dtype, first + 8 * j);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(x[j]), mask));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  uint32_t top = 0;
  for (uint32_t lane : lanes) top = lane > top ? lane : top;
  *absmax = BitsToFloat(top);
  const float inverse = 1.f / (*absmax < 1e-38f ? 1e-38f : *absmax);
  for (int j = 0; j < 8; ++j) {
    // min(1, x) and max(-1, x) keep x when it is NaN
    __m256 scaled = _mm256_mul_ps(x[j], _mm256_set1_ps(inverse));
    scaled = _mm256_max_ps(_mm256_set1_ps(-1.f), _mm256_min_ps(_mm256_set1_ps(1.f), scaled));
    __m256i code = _mm256_setzero_si256();
    for (int i = 0; i < 15; ++i) {
      __m256 above = _mm256_cmp_ps(scaled, _mm256_set1_ps(midpoints[i]), _CMP_NLE_UQ);
      code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), code);
    for (int i = 0; i < 4; ++i) packed[4 * j + i] = static_cast<uint8_t>(lanes[2 * i] << 4 | lanes[2 * i + 1]);
  }
}

TARGET_AVX2 void DequantizeAvx2(const uint8_t* packed, float absmax, const float* code, int64_t first, void* out,
                                int dtype) {
  const __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8), scale = _mm256_set1_ps(absmax);
  for (int j = 0; j < 8; ++j) {
    uint32_t bytes;
    std::memcpy(&bytes, packed + 4 * j, 4);
    // weight 2i is the high nibble of byte i, weight 2i+1 the low one
    __m256i index =
        _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bytes)), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    index = _mm256_and_si256(index, _mm256_set1_epi32(15));
    __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    value = _mm256_mul_ps(value, scale);
    const int64_t at = first + 8 * j;
    if (dtype == kFloat32) {
      _mm256_storeu_ps(static_cast<float*>(out) + at, value);
      continue;
    }
    __m128i half;
    if (dtype == kFloat16) {
      half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      __m256i bits = _mm256_castps_si256(value);
      __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      __m256i round = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
      round = _mm256_blendv_epi8(round, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
      half = _mm_packus_epi32(_mm256_castsi256_si128(round), _mm256_extracti128_si256(round, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + at), half);
  }
}

// ---- AVX-512: 16 weights at a time; the whole code-book is one register ------------------------------------------

TARGET_AVX512 inline __m512 Load16(const void* w, int dtype, int64_t i) {
  if (dtype == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(w) + i);
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(w) + i));
  if (dtype == kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TARGET_AVX512 void QuantizeAvx512(const void* w, int dtype, int64_t first, const float* midpoints, uint8_t* packed,
                                  float* absmax) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
  __m512 x[4];
  __m512i largest = _mm512_setzero_si512();
  for (int j = 0; j < 4; ++j) {
    x[j] = Load16(w, dtype, first + 16 * j);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x[j]), mask));
  }
  *absmax = BitsToFloat(_mm512_reduce_max_epu32(largest));
  const float inverse = 1.f / (*absmax < 1e-38f ? 1e-38f : *absmax);
  __m512i code[4];
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm512_mul_ps(x[j], _mm512_set1_ps(inverse));
    x[j] = _mm512_max_ps(_mm512_set1_ps(-1.f), _mm512_min_ps(_mm512_set1_ps(1.f), x[j]));
    code[j] = _mm512_setzero_si512();
  }
  for (int i = 0; i < 15; ++i) {
    const __m512 middle = _mm512_set1_ps(midpoints[i]);
    for (int j = 0; j < 4; ++j) {
      code[j] = _mm512_mask_add_epi32(code[j], _mm512_cmp_ps_mask(x[j], middle, _CMP_NLE_UQ), code[j], one);
    }
  }
  for (int j = 0; j < 4; ++j) {
    // as 64-bit lanes: the even weight in bits 0-3, the odd one in bits 32-35
    __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code[j], 4), _mm512_srli_epi64(code[j], 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + 8 * j), _mm512_cvtepi64_epi8(pair));
  }
}

TARGET_AVX512 void DequantizeAvx512(const uint8_t* packed, float absmax, const float* code, int64_t first, void* out,
                                    int dtype) {
  const __m512 table = _mm512_loadu_ps(code), scale = _mm512_set1_ps(absmax);
  const __m512i shift = _mm512_set1_epi64(4);
  for (int j = 0; j < 4; ++j) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * j));
    __m512i wide = _mm512_cvtepu8_epi64(bytes);  // byte i in 64-bit lane i: even weight is its high nibble
    __m512i index = _mm512_or_si512(_mm512_srlv_epi64(wide, shift), _mm512_slli_epi64(wide, 32));
    __m512 value = _mm512_mul_ps(_mm512_permutexvar_ps(index, table), scale);  // uses the low 4 bits of each index
    const int64_t at = first + 16 * j;
    if (dtype == kFloat32) {
      _mm512_storeu_ps(static_cast<float*>(out) + at, value);
      continue;
    }
    __m256i half;
    if (dtype == kFloat16) {
      half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      __m512i bits = _mm512_castps_si512(value);
      __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i round = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
      round = _mm512_mask_mov_epi32(round, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
      half = _mm512_cvtepi32_epi16(round);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + at), half);
  }
}
#endif

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The best path this CPU can run: 0 scalar, 1 AVX2, 2 AVX-512.
EXPORT int veneer_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 ? (avx512 ? kAvx512 : kAvx2) : kScalar;
#else
  return kScalar;
#endif
}

// w: n weights of `dtype`; midpoints: 15; packed: ceil(n/2) bytes; absmax: ceil(n/64).
EXPORT void veneer_nf4_quantize(const void* w, int dtype, int64_t n, const float* midpoints, uint8_t* packed,
                                float* absmax, int isa, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1024)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kBlock;
    const int count = static_cast<int>(n - first < kBlock ? n - first : kBlock);
#if defined(__x86_64__)
    if (isa == kAvx512 && count == kBlock) {
      QuantizeAvx512(w, dtype, first, midpoints, packed + first / 2, absmax + b);
      continue;
    }
    if (isa == kAvx2 && count == kBlock) {
      QuantizeAvx2(w, dtype, first, midpoints, packed + first / 2, absmax + b);
      continue;
    }
#endif
    QuantizeScalar(w, dtype, first, count, midpoints, packed + first / 2, absmax + b);
  }
}

// The reverse: out holds n weights of `dtype`; code: the 16 NF4 values.
EXPORT void veneer_nf4_dequantize(const uint8_t* packed, const float* absmax, int64_t n, const float* code, void* out,
                                  int dtype, int isa, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1024)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kBlock;
    const int count = static_cast<int>(n - first < kBlock ? n - first : kBlock);
#if defined(__x86_64__)
    if (isa == kAvx512 && count == kBlock) {
      DequantizeAvx512(packed + first / 2, absmax[b], code, first, out, dtype);
      continue;
    }
    if (isa == kAvx2 && count == kBlock) {
      DequantizeAvx2(packed + first / 2, absmax[b], code, first, out, dtype);
      continue;
    }
#endif
    DequantizeScalar(packed + first / 2, absmax[b], code, first, count, out, dtype);
  }
}
