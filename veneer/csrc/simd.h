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

inline Vec LoadBFloat16(const uint16_t* p) {
  return (Vec)(__builtin_convertvector(LoadAs<Halves>(p), Bits) << 16);
}

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

// e^x for x <= 0 (and small positive x): below -87 it is 0. Relative error below 3e-7.
inline Vec Exp(Vec x) {
  const Vec low = Set(-87.f);
  const Ints dead = x < low;
  Vec t = (dead ? low : x) * Set(1.44269504f);
  Vec shifted = t + Set(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  Ints whole = (Ints)shifted - (Ints)Set(12582912.f);
  Vec f = t - (shifted - Set(12582912.f));  // in [-0.5, 0.5]
  Vec p = Set(1.5403530e-4f);
  p = Fma(p, f, Set(1.3333558e-3f));
  p = Fma(p, f, Set(9.6181291e-3f));
  p = Fma(p, f, Set(5.5504109e-2f));
  p = Fma(p, f, Set(2.4022651e-1f));
  p = Fma(p, f, Set(6.9314718e-1f));
  p = Fma(p, f, Set(1.f));
  p = (Vec)((Ints)p + (whole << 23));
  return dead ? Vec{} : p;
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

// acc + lo(a) * lo(b) + hi(a) * hi(b): a and b hold two bf16 in each 32-bit lane.
struct Pair {
#if defined(__AVX512BF16__)
  Bits both;
#else
  Vec lo, hi;
#endif
};

inline Pair Split(Bits b) {
#if defined(__AVX512BF16__)
  return {b};
#else
  return {(Vec)(b << 16), (Vec)(b & 0xffff0000u)};
#endif
}

inline Vec Dot2(Vec acc, Pair a, Pair b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a.both, (__m512bh)b.both);
#else
  return Fma(a.hi, b.hi, Fma(a.lo, b.lo, acc));
#endif
}

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

}  // namespace
