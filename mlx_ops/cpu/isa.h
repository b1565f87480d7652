// The instruction sets that the vector loops are compiled for, one source file
// each, and the choice between them at run time.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mlx_deform::cpu {

// From what every machine has to the widest vectors.
enum class Isa { baseline, avx2, avx512 };

// The best of this machine, or what MLX_DEFORM_ISA names. Throws
// std::invalid_argument where that is none of this machine's.
Isa isa();

// The one for rows of so many bytes. Where AVX-512 would leave half a vector
// empty, short rows are AVX2's, which fill its vectors: on Zen 4 the gradients
// of 8 channels then take three quarters of the time, of 72 as much.
Isa isa_for_rows(int64_t bytes);

// As MLX_DEFORM_ISA names them.
std::string isa_name(Isa isa);

// Those that this machine has, the best first.
std::vector<Isa> isas();

} // namespace mlx_deform::cpu

// `table` of an instruction set's namespace.
#if defined(__x86_64__)
#define MLX_DEFORM_TABLE(isa, table)                           \
  ((isa) == ::mlx_deform::cpu::Isa::avx512     ? avx512::table \
       : (isa) == ::mlx_deform::cpu::Isa::avx2 ? avx2::table   \
                                               : baseline::table)
#else
#define MLX_DEFORM_TABLE(isa, table) (baseline::table)
#endif
// That of the chosen one.
#define MLX_DEFORM_CHOOSE(table) \
  MLX_DEFORM_TABLE(::mlx_deform::cpu::isa(), table)
