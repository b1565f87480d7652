#include "mlx_ops/gpu/run_now.h"

#include "mlx/primitives.h"
#include "mlx_ops/gpu/kernels.h"

namespace mlx_deform::gpu {

void run_now(const mx::array& x, mx::Stream stream) {
  if (x.status() != mx::array::Status::unscheduled) {
    return;
  }
  for (const mx::array& in : x.inputs()) {
    run_now(in, stream);
  }
  std::vector<mx::array> outputs = x.outputs();
  if (stream.device == mx::Device::gpu) {
    x.primitive().eval_gpu(x.inputs(), outputs);
  } else {
    x.primitive().eval_cpu(x.inputs(), outputs);
  }
  for (const mx::array& in : x.inputs()) {
    keep(in, stream);
  }
  for (mx::array& out : outputs) {
    keep(out, stream);
    out.set_status(mx::array::Status::evaluated);
  }
}

} // namespace mlx_deform::gpu
