// The instruction sets that the vector loops are compiled for, one source file
// each, and the choice between them at run time.

#pragma once

#include <string>
#include <vector>

namespace mlx_deform::cpu {

// From what every machine has to the widest vectors.
enum class Isa { baseline, avx2, avx512 };

// The best of this machine, or what MLX_DEFORM_ISA names. Throws
// std::invalid_argument where that is none of this machine's.
Isa isa();

// As MLX_DEFORM_ISA names them.
std::string isa_name(Isa isa);

// Those that this machine has, the best first.
std::vector<Isa> isas();

} // namespace mlx_deform::cpu

// `table` of the namespace of the chosen instruction set.
#if defined(__x86_64__)
#define MLX_DEFORM_CHOOSE(table)                               \
  (isa() == ::mlx_deform::cpu::Isa::avx512     ? avx512::table \
       : isa() == ::mlx_deform::cpu::Isa::avx2 ? avx2::table   \
                                               : baseline::table)
#else
#define MLX_DEFORM_CHOOSE(table) (baseline::table)
#endif
