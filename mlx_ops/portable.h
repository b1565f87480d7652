// The ops in MLX's own primitives: for graphs that leave the process, which
// mx.export_function writes and any MLX can run. Slower and without a bound on
// memory. Each op has its own composition; this is the switch.

#pragma once

namespace mlx_deform {

// Whether the ops called on this thread are to be built so.
bool portable();
// Returns the earlier setting.
bool set_portable(bool value);

} // namespace mlx_deform
