#include "mlx_ops/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace mlx_deform::cpu {

namespace {

#if defined(__x86_64__)
// These ask for the operating system's support of the registers too.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
}

bool has_avx512() {
#if defined(MLX_DEFORM_AVX512_ON_AVX2) // a build for tests: see CMakeLists.txt
  return has_avx2();
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
}
#endif

Isa choose() {
  const std::vector<Isa> all = isas();
  const char* wish = std::getenv("MLX_DEFORM_ISA");
  if (!wish || !*wish) {
    return all.front();
  }
  std::string names;
  for (const Isa isa : all) {
    if (isa_name(isa) == wish) {
      return isa;
    }
    names += names.empty() ? "" : ", ";
    names += isa_name(isa);
  }
  throw std::invalid_argument(
      "[mlx_deform] MLX_DEFORM_ISA must be an instruction set of this "
      "machine, one of " +
      names + "; got " + wish);
}

} // namespace

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> isas() {
  std::vector<Isa> out{Isa::baseline};
#if defined(__x86_64__)
  if (has_avx2()) {
    out.push_back(Isa::avx2);
  }
  if (has_avx512()) {
    out.push_back(Isa::avx512);
  }
  std::reverse(out.begin(), out.end());
#endif
  return out;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

Isa isa_for_rows(int64_t bytes) {
  constexpr int64_t vector = 64, short_row = 4 * vector;
  const bool half_empty = bytes % vector == vector / 2 && bytes < short_row;
  return isa() == Isa::avx512 && half_empty ? Isa::avx2 : isa();
}

} // namespace mlx_deform::cpu
