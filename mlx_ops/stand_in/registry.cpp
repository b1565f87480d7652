#include "mlx_ops/stand_in/registry.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"

namespace mlx_deform::stand_in {

namespace {

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

// A task's own array over the same memory. A node of the graph would be
// destroyed on the stream's thread while others still change it.
mx::array memory_of(const mx::array& x) {
  mx::array out(x.shape(), x.dtype(), nullptr, {});
  out.copy_shared_buffer(x);
  out.set_status(mx::array::Status::available);
  return out;
}

} // namespace

Registration::Registration(const char* stem, Kernel kernel) {
  kernels()[stem] = kernel;
}

bool in_place() {
  const char* text = std::getenv("MLX_DEFORM_STAND_IN");
  return text == nullptr || std::string(text) != "own";
}

void run(
    const gpu::Launch& launch,
    const gpu::Arguments& arguments,
    mx::Stream stream,
    bool sums) {
  if (!in_place()) {
    for (const auto& [role, out] : arguments.outputs) {
      if (out && (sums || launch.empty())) {
        zero_fill(*out, stream);
      } else if (out) {
        allocate(*out);
      }
    }
  }
  if (launch.empty()) {
    return;
  }
  const auto kernel = kernels().find(launch.stem);
  if (kernel == kernels().end()) {
    throw std::logic_error("[mlx_deform] no stand-in for " + launch.stem);
  }
  Arrays inputs;
  Arrays outputs;
  for (const gpu::Binding& binding : launch.buffers) {
    if (binding.role == "params") {
      continue;
    }
    if (binding.is_output) {
      outputs.emplace(
          binding.role, memory_of(*arguments.outputs.at(binding.role)));
    } else {
      inputs.emplace(
          binding.role, memory_of(*arguments.inputs.at(binding.role)));
    }
  }
  mx::cpu::get_command_encoder(stream).dispatch(
      [launch,
       inputs = std::move(inputs),
       outputs = std::move(outputs),
       params = arguments.params,
       run = kernel->second]() mutable {
        run(launch, inputs, outputs, params);
      });
}

void zero_fill(mx::array& out, mx::Stream stream) {
  if (!in_place()) {
    allocate(out);
  }
  mx::cpu::get_command_encoder(stream).dispatch(
      [out = memory_of(out)]() mutable {
        std::fill_n(out.data<char>(), out.nbytes(), char(0));
      });
}

void keep(const mx::array& x, mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [data = x.data_shared_ptr()]() {});
}

void drain(mx::Stream stream) {
  mx::synchronize(stream);
  // MLX would let go of them at the end of the whole primitive.
  mx::cpu::get_command_encoder(stream).temporaries().clear();
}

} // namespace mlx_deform::stand_in
