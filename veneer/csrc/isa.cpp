// Which of the compiled sets of kernels this CPU can run.

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// AMX: the CPU has tiles and bf16 products on them, and the system lets this process use their registers.
static bool HasTiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
static bool HasTiles() { return false; }
#endif

// The best path: 0 scalar, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16 dot products, 4 that and AMX.
extern "C" __attribute__((visibility("default"))) int veneer_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return !avx2 ? 0 : !avx512 ? 1 : !bf16 ? 2 : !HasTiles() ? 3 : 4;
#else
  return 0;
#endif
}
