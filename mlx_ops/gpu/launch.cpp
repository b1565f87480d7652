#include "mlx_ops/gpu/launch.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "mlx_ops/gpu/plan_arithmetic.h"

namespace mlx_deform::gpu {

Launch plan_zero_fill(
    int64_t size,
    const std::string& dtype,
    const PlanOptions& options) {
  if (size < 0) {
    refuse("size must not be negative; got ", size);
  }
  Launch out;
  itemsize_of(dtype);
  out.library = {dtype, index_bits_for(0, options)};
  name_kernel(out, "zero_fill");
  out.buffers = {{"out", 0, true}, {"params", 1, false}};
  out.group = {kGroupThreads, 1, 1};
  // Four words a thread hide the cost of starting it.
  const int64_t threads = size == 0 ? 0 : size / 4 + 1;
  out.grid = {std::min(threads, int64_t(1) << 24), 1, 1};
  return out;
}

std::array<int64_t, 3> fit_group(const Launch& launch, int64_t max_threads) {
  std::array<int64_t, 3> out = launch.group;
  while (out[0] * out[1] * out[2] > max_threads) {
    // A row of threads stays whole, but for whole SIMD groups.
    int64_t& axis = out[2] > 1 ? out[2] : out[1] > 1 ? out[1] : out[0];
    if (&axis == &out[0] && (axis <= kSimdLanes || axis % 2 != 0)) {
      break;
    }
    axis /= 2;
  }
  return out;
}

std::string library_header(const Library& library) {
  const int64_t itemsize = itemsize_of(library.dtype);
  if (library.index_bits != 32 && library.index_bits != 64) {
    refuse("index_bits must be 32 or 64; got ", library.index_bits);
  }
  const std::string& dtype = library.dtype;
  const bool wide = library.index_bits == 64;
  std::ostringstream out;
  out << "#define MLX_DEFORM_T "
      << (dtype == "float32"       ? "float"
              : dtype == "float16" ? "half"
                                   : "bfloat")
      << "\n#define MLX_DEFORM_T_NAME " << dtype
      << "\n#define MLX_DEFORM_T_BYTES " << itemsize
      << "\n#define MLX_DEFORM_INDEX " << (wide ? "long" : "int")
      << "\n#define MLX_DEFORM_INDEX_NAME " << (wide ? "i64" : "i32")
      << "\n#define MLX_DEFORM_INDEX_BITS " << library.index_bits << "\n";
  return out.str();
}

std::string library_name(
    const Library& library,
    const std::string& source_hash) {
  return "mlx_deform_i" + std::to_string(library.index_bits) + "_" +
      library.dtype + "_" + source_hash;
}

std::string hash_of(const std::string& source) {
  uint64_t hash = 0xcbf29ce484222325; // FNV-1a
  for (unsigned char c : source) {
    hash = (hash ^ c) * 0x100000001b3;
  }
  std::ostringstream out;
  out << std::hex << hash;
  return out.str();
}

bool environment_flag(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' && std::string(text) != "0";
}

} // namespace mlx_deform::gpu
