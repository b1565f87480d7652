// Launches of the dispatch plans on CPU streams, by plain functions and without
// haste. With MLX_DEFORM_STAND_IN=1 the ops take the GPU's route over them, so
// that it is tested on any machine; with MLX_DEFORM_STAND_IN=own each launch
// has outputs of its own, as on CUDA.

#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "mlx_ops/gpu/run.h"

namespace mlx_deform::stand_in {

namespace mx = mlx::core;

// By role; all have memory.
using Arrays = std::map<std::string, mx::array>;

// Does what a launch's kernel does. `params` is the op's struct of sizes.
using Kernel = void (*)(
    const gpu::Launch& launch,
    const Arrays& inputs,
    Arrays& outputs,
    const std::vector<char>& params);

// An op's file has one for each of its kernels, by the launch's stem.
struct Registration {
  Registration(const char* stem, Kernel kernel);
};

template <typename Params>
Params params_from(const std::vector<char>& bytes) {
  Params out;
  std::memcpy(&out, bytes.data(), sizeof(out));
  return out;
}

// Null where the launch does not bind the role.
inline const mx::array* find(const Arrays& arrays, const char* role) {
  const auto found = arrays.find(role);
  return found == arrays.end() ? nullptr : &found->second;
}

bool in_place();

void run(
    const gpu::Launch& launch,
    const gpu::Arguments& arguments,
    mx::Stream stream,
    bool sums);

void zero_fill(mx::array& out, mx::Stream stream);

void keep(const mx::array& x, mx::Stream stream);

void drain(mx::Stream stream);

} // namespace mlx_deform::stand_in
