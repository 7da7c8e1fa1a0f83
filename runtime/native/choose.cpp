// Which kernels this processor gets.
#include <cstdlib>
#include <string>

#include "host.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace moiie {
namespace {

#if defined(__x86_64__)
// Below, turning the weights into bfloat16 costs more than the tile unit gains.
constexpr int64_t kAmxRows = 48;

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  __builtin_cpu_init();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBfloat16) == 0 || (d & kTile) == 0) return false;
  constexpr unsigned kVectorBfloat16 = 1u << 5;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & kVectorBfloat16) == 0) return false;
  static const bool enabled = enable_amx();
  return enabled;
}
#endif

}  // namespace

Choice choose_kernels() {
  const char* wish = std::getenv("MOIIE_CPU_ISA");
  const std::string name = wish == nullptr ? "" : wish;
  const auto takes = [&name](const char* candidate, bool available) {
    if (name == candidate && !available) throw Error("MOIIE_CPU_ISA: this processor or system has no " + name);
    return available && (name.empty() || name == candidate);
  };
#if defined(__x86_64__)
  if (takes("amx", has_amx())) return {&kAvx512, &kAmx, kAmxRows};
  if (takes("avx512", has_avx512())) return {&kAvx512, &kAvx512, 1};
  if (takes("avx2", has_avx2())) return {&kAvx2, &kAvx2, 1};
#endif
  if (takes("portable", true)) return {&kPortable, &kPortable, 1};
  throw Error("MOIIE_CPU_ISA: unknown instruction set \"" + name + "\" (known: portable, avx2, avx512, amx)");
}

}  // namespace moiie
