// One vector of fp32, as wide as the instruction set this file is compiled for, and what the kernels do with it.
// Every kernel source is compiled once for each instruction set (CMakeLists.txt) with VENEER_ISA set to its name.
// Everything is in an anonymous namespace and nothing of the standard library is inlined: two sets of the same
// function must never be mistaken for one another by the linker.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define VENEER_JOIN2(a, b) a##_##b
#define VENEER_JOIN(a, b) VENEER_JOIN2(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void VENEER_JOIN(veneer_##name, VENEER_ISA)

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class V, class T>
inline V LoadAs(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec Load(const float* p) { return LoadAs<Vec>(p); }
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec Set(float x) { return Vec{} + x; }

inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// ---- bf16 -----------------------------------------------------------------------------------------------------

inline float FromBFloat16(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t ToBFloat16(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline Vec LoadBFloat16(const uint16_t* p) { return (Vec)(__builtin_convertvector(LoadAs<Halves>(p), Bits) << 16); }

// The bf16 of each lane, in the low half of each 32-bit lane; exactly torch's, subnormal numbers too.
inline Bits ExactBFloat16(Vec v) {
  Bits bits = (Bits)v;
  Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? Bits{} + 0x7fc0u : rounded;
}

// The same, but a subnormal number may become zero.
inline Bits RoundBFloat16(Vec v) {
#if defined(__AVX512BF16__)
  return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)v), Bits);
#else
  return ExactBFloat16(v);
#endif
}

inline void StoreBFloat16(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  Halves half = __builtin_convertvector(RoundBFloat16(v), Halves);
  std::memcpy(p, &half, sizeof half);
#endif
}

// The same past the caches, where that can be: for what is not read soon.
inline void StoreForLater(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  if (reinterpret_cast<uintptr_t>(p) % 32 == 0)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
  StoreBFloat16(p, v);
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// a * b + c, in one instruction where there is one. Contraction is off everywhere else: NF4 must be exact.
inline Vec Fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// e^x for x below 88: exactly 0 far below -87, NaN for NaN. Relative error below 3e-7.
inline Vec Exp(Vec x) {
#if defined(__AVX512F__)
  const Vec t = (Vec)_mm512_max_ps(_mm512_set1_ps(-1e30f), (__m512)(x * Set(1.44269504f)));  // keeps NaN
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)t, 0);
  const Vec f = t - whole;  // in [-0.5, 0.5]
#else
  const Vec t = x * Set(1.44269504f), low = Set(-126.f);
  const Ints dead = t < low;
  const Vec near = dead ? low : t, shifted = near + Set(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec f = near - (shifted - Set(12582912.f));
#endif
  Vec p = Set(1.3218673e-3f);  // fitted to 2^f on [-0.5, 0.5]
  p = Fma(p, f, Set(9.6716979e-3f));
  p = Fma(p, f, Set(5.5508930e-2f));
  p = Fma(p, f, Set(2.4022238e-1f));
  p = Fma(p, f, Set(6.9314686e-1f));
  p = Fma(p, f, Set(1.f));
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const Ints whole = (Ints)shifted - (Ints)Set(12582912.f);
  return dead ? Vec{} : (Vec)((Ints)p + (whole << 23));
#endif
}

inline float Sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

inline float Largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kWidth; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// A hash of 32 bits, each bit of the result depending on every bit of h; T is a number or a vector of them.
template <class T>
inline T Mix(T h) {
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}
constexpr uint32_t kGolden = 0x9e3779b9u;  // times a row's or a pair of columns' number: what is hashed

// A thread's working memory: grown when needed, kept between calls.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0, used = 0;
  ~Scratch() { std::free(memory); }
  void Reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    std::free(memory);
    if (posix_memalign(&memory, 64, bytes)) std::abort();
    size = bytes;
  }
  template <class T>
  T* Take(size_t count) {
    T* place = reinterpret_cast<T*>(static_cast<char*>(memory) + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return place;
  }
};
thread_local Scratch scratch;

// ---- layouts: pairs of bf16 along the depth, 64 columns side by side ------------------------------------------------

constexpr int64_t kPanel = 64;

// A 16 x 16 block of 32-bit values, turned: to[d][i] = from[i][d].
inline void Turn(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
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
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int d = 0; d < 16; ++d) std::memcpy(to + d * to_stride + i, from + i * stride + d, 4);
#endif
}

// (rows, columns) of 32-bit values, turned.
inline void TurnAll(const uint32_t* from, int64_t stride, int64_t rows, int64_t columns, uint32_t* to,
                    int64_t to_stride) {
  const int64_t whole = rows / 16 * 16, even = columns / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16)
    for (int64_t d = 0; d < even; d += 16) Turn(from + i * stride + d, stride, to + d * to_stride + i, to_stride);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = i < whole ? even : 0; d < columns; ++d)
      std::memcpy(to + d * to_stride + i, from + i * stride + d, 4);
}

// Where packed columns lie: 16 side by side, a pair of the depth every `ld`, the next 16 `across` further on.
struct Place {
  int64_t ld, across;
};
constexpr Place kSideBySide{kPanel, 16};  // [depth / 2][64]

// rows (count <= 64, depth) -> 64 columns; those that are not there are zero.
inline void PackByRow(const uint16_t* rows, int64_t stride, int64_t count, int64_t depth, uint32_t* to,
                      Place place = kSideBySide) {
  int64_t i = 0;
  for (; i + 16 <= count && stride % 2 == 0; i += 16)
    TurnAll(reinterpret_cast<const uint32_t*>(rows + i * stride), stride / 2, 16, depth / 2, to + i / 16 * place.across,
            place.ld);
  for (; i < kPanel; ++i) {
    uint32_t* column = to + i / 16 * place.across + i % 16;
    for (int64_t d = 0; d < depth / 2; ++d) {
      column[d * place.ld] = 0;
      if (i < count) std::memcpy(column + d * place.ld, rows + i * stride + 2 * d, 4);
    }
  }
}

// What is done to two rows while they are packed: nothing, or each is multiplied with a number.
struct AsTheyAre {
  Bits Pair(const uint16_t* low, const uint16_t* high) const {
    return __builtin_convertvector(LoadAs<Halves>(low), Bits) | __builtin_convertvector(LoadAs<Halves>(high), Bits)
                                                                    << 16;
  }
  uint16_t Low(uint16_t value) const { return value; }
  uint16_t High(uint16_t value) const { return value; }
};
struct Scaled {
  float low, high;
  Bits Pair(const uint16_t* l, const uint16_t* h) const {
    const Vec first = LoadBFloat16(l) * Set(low), second = LoadBFloat16(h) * Set(high);
#if defined(__AVX512BF16__)
    const __m512i order = (__m512i)(Bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001u + 0x100000u);
    return (Bits)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    return RoundBFloat16(first) | RoundBFloat16(second) << 16;
#endif
  }
  uint16_t Low(uint16_t value) const { return ToBFloat16(FromBFloat16(value) * low); }
  uint16_t High(uint16_t value) const { return ToBFloat16(FromBFloat16(value) * high); }
};

// Two rows of `count` <= 64 -> 64 pairs.
template <class How = AsTheyAre>
inline void PackPair(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* to, Place place = kSideBySide,
                     const How& how = {}) {
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) {
    const Bits pair = how.Pair(low + j, high + j);
    std::memcpy(to + j / 16 * place.across + j % 16, &pair, sizeof pair);
  }
  for (; j < kPanel; ++j)
    to[j / 16 * place.across + j % 16] =
        j < count ? how.Low(low[j]) | static_cast<uint32_t>(how.High(high[j])) << 16 : 0;
}

}  // namespace
