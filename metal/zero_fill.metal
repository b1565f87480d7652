// Zeros for the float32 buffers that other kernels add to. Every library has
// it, so that a call in half precision needs no second library.

#include <metal_stdlib>

#include "metal/kernel_names.h"

// The host caps the grid, so a thread may write more than once. Neighbouring
// threads write neighbouring words.
template <typename Index>
[[kernel]] void zero_fill(
    device float* out [[buffer(0)]], // (size)
    constant long& size [[buffer(1)]],
    uint at [[thread_position_in_grid]],
    uint threads [[threads_per_grid]]) {
  for (long i = long(at); i < size; i += long(threads)) {
    out[i] = 0.0f;
  }
}

MLX_DEFORM_INSTANTIATE(zero_fill, zero_fill<MLX_DEFORM_INDEX>)
