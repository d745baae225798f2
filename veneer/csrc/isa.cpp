// Which of the compiled sets of kernels this CPU can run.

// The best path: 0 scalar, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16 dot products.
extern "C" __attribute__((visibility("default"))) int veneer_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return !avx2 ? 0 : !avx512 ? 1 : !__builtin_cpu_supports("avx512bf16") ? 2 : 3;
#else
  return 0;
#endif
}
