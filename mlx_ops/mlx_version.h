#pragma once

// What the supported versions of MLX (tools/mlx_releases.py) spell differently;
// the only source file that knows versions.

#include <cstdint>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx/version.h"

#ifdef _METAL_
#include <functional>
#include <string>

#include "mlx/backend/metal/device.h"
#endif

namespace mlx_deform {

namespace mx = mlx::core;

// Whether the array's memory was allocated by MLX. Before 0.32.4 it always is,
// where nobody but `borrow` below makes it otherwise.
inline bool owns_memory(const mx::array& x) {
#if MLX_VERSION_NUMERIC >= 32004
  return x.data_shared_ptr()->is_owned();
#else
  (void)x;
  return true;
#endif
}

// Gives a row-contiguous array memory that MLX's CPU allocator did not
// allocate. A buffer of that allocator has a header before the data, so the
// buffer is one of its own, of a byte, and the array's offset leads from there
// to the address. From 0.32.4 on MLX never writes to such memory; before, it
// may hand it on to a result unless someone else holds the array.
inline void borrow(mx::array& out, uintptr_t address) {
  mx::allocator::Buffer anchor = mx::allocator::allocator().malloc(1);
  const int64_t offset = static_cast<int64_t>(address) -
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(anchor.raw_ptr()));
  const mx::array::Flags flags{true, true, false};
#if MLX_VERSION_NUMERIC >= 32004
  mx::allocator::Data data(anchor, [](mx::allocator::Buffer buffer) {
    mx::allocator::allocator().free(buffer);
  });
  out.set_data(std::move(data), out.size(), out.strides(), flags, offset);
#else
  // Offsets are in elements, here of a byte.
  mx::array bytes({1}, mx::uint8, nullptr, {});
  bytes.set_data(anchor);
  bytes.copy_shared_buffer(bytes, bytes.strides(), flags, 1, offset);
  out.copy_shared_buffer(bytes, out.strides(), flags, out.size());
#endif
}

inline mx::array slice_update_add(
    const mx::array& x,
    const mx::array& update,
    const mx::Shape& from,
    const mx::Shape& to,
    mx::Stream stream) {
#if MLX_VERSION_NUMERIC >= 31002
  return mx::slice_update_add(x, update, from, to, stream);
#else
  const mx::array sum = mx::add(mx::slice(x, from, to, stream), update, stream);
  return mx::slice_update(x, sum, from, to, stream);
#endif
}

// Whether MLX's CUDA library exports its command encoder.
inline constexpr bool kHasCudaEncoder = MLX_VERSION_NUMERIC >= 32004;

#ifdef _METAL_
namespace metal {

inline mx::metal::CommandEncoder& command_encoder(mx::Stream stream) {
#if MLX_VERSION_NUMERIC >= 31002
  return mx::metal::get_command_encoder(stream);
#else
  return mx::metal::device(stream.device).get_command_encoder(stream.index);
#endif
}

inline MTL::CommandBuffer* command_buffer(mx::Stream stream) {
#if MLX_VERSION_NUMERIC >= 31002
  return command_encoder(stream).get_command_buffer();
#else
  return mx::metal::device(stream.device).get_command_buffer(stream.index);
#endif
}

// The library of the source that `text` returns, compiled without fast math,
// which would break the defined results of NaN and infinite coordinates.
inline MTL::Library* safe_math_library(
    mx::metal::Device& device,
    const std::string& name,
    const std::function<std::string()>& text) {
#if MLX_VERSION_NUMERIC >= 32000
  mx::CompileOptions options;
  options.math_mode = mx::MathMode::Safe;
  return device.get_library(name, options, text);
#else
  return device.get_library(name, text); // knows no other mode
#endif
}

} // namespace metal
#endif

} // namespace mlx_deform
