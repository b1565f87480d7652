// What a GPU backend provides: it runs the launches of the dispatch plans on a
// stream. Arrays are row-contiguous, and the caller keeps them alive until the
// stream has run.
//
// Implemented once a build: by metal/ on macOS, and by cuda/ elsewhere, which
// hands CPU streams to stand_in/.

#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_ops/gpu/launch.h"

namespace mlx_deform::gpu {

namespace mx = mlx::core;

// What the roles of a launch's buffers stand for. A role that the launch does
// not bind is not looked at, and may be null.
struct Arguments {
  std::map<std::string, const mx::array*> inputs;
  std::map<std::string, mx::array*> outputs;
  std::vector<char> params; // the bytes of the op's struct of sizes
};

template <typename Params>
std::vector<char> bytes_of(const Params& params) {
  const char* bytes = reinterpret_cast<const char*>(&params);
  return {bytes, bytes + sizeof(params)};
}

// Where a launch's outputs go. In place: the caller allocates them, and several
// launches may write to one, or add to what it holds. Else every launch gives
// its outputs memory of their own: their shapes are then those of its part
// alone.
bool in_place(mx::Stream stream);

// With `sums`, outputs that are no one's yet start as zeros: the launch adds.
void run(
    const Launch& launch,
    const Arguments& arguments,
    mx::Stream stream,
    bool sums = false);

// Fills a float32 array with zeros, by a kernel of that type's library.
void zero_fill(mx::array& out, mx::Dtype library, mx::Stream stream);

// Where an array starts, in bytes from an address that is aligned.
int64_t place_of(const mx::array& x);

// Holds an array until the stream has run what is encoded so far.
void keep(const mx::array& x, mx::Stream stream);

// Waits until the stream has run everything, and lets go of what it held.
void drain(mx::Stream stream);

// Whether there are kernels for a GPU of MLX's here.
bool available();

// Whether the CPU takes the GPU's route too, for tests where there is no GPU.
bool stands_in_on_cpu();

// Whether MLX_DEFORM_DETERMINISTIC asks for sums in a fixed order.
inline bool deterministic() {
  return environment_flag("MLX_DEFORM_DETERMINISTIC");
}

} // namespace mlx_deform::gpu
