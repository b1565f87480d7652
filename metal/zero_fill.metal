// Zeros for the float32 buffers that other kernels add to.

#include <metal_stdlib>

// The host caps the grid, so a thread may write more than once. Neighbouring
// threads write neighbouring words.
[[kernel]] void zero_fill_float32(
    device float* out [[buffer(0)]], // (size)
    constant long& size [[buffer(1)]],
    uint at [[thread_position_in_grid]],
    uint threads [[threads_per_grid]]) {
  for (long i = long(at); i < size; i += long(threads)) {
    out[i] = 0.0f;
  }
}
