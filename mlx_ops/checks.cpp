#include "mlx_ops/checks.h"

#include <sstream>
#include <stdexcept>

#include "mlx/dtype.h"
#include "mlx/utils.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform {

void check_floating(
    const std::string& tag,
    const std::string& name,
    const mx::array& x) {
  if (!mx::issubdtype(x.dtype(), mx::floating)) {
    std::ostringstream message;
    message << "[" << tag << "] " << name
            << " must be float16, bfloat16, float32 or float64; got "
            << x.dtype();
    throw std::invalid_argument(message.str());
  }
}

void check_device(
    const std::string& tag,
    const mx::Dtype& dtype,
    const mx::Stream& stream) {
  if (stream.device == mx::Device::cpu) {
    return;
  }
  if (!gpu::available()) {
    throw std::invalid_argument(
        "[" + tag +
        "] stream must be on the CPU, the only device that this build of "
        "mlx_deform has kernels for (pass stream=mx.cpu); got a GPU stream");
  }
  if (dtype == mx::float64) {
    throw std::invalid_argument(
        "[" + tag +
        "] float64 arrays need a CPU stream (pass stream=mx.cpu); got a GPU "
        "stream");
  }
}

} // namespace mlx_deform
