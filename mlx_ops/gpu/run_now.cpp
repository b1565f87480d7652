#include "mlx_ops/gpu/run_now.h"

#include "mlx/primitives.h"
#include "mlx_ops/gpu/run.h"

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
  // As MLX's own evaluation: an output lives as long as whoever wants it, and
  // an input whose memory it took over is none any more.
  for (const mx::array& in : x.inputs()) {
    bool taken_over = false;
    for (const mx::array& out : outputs) {
      taken_over = taken_over || out.data_shared_ptr() == in.data_shared_ptr();
    }
    if (!taken_over) {
      keep(in, stream);
    }
  }
  // And an evaluated array is no node any more: it would hold its inputs, and
  // they theirs.
  for (mx::array& out : outputs) {
    out.set_status(mx::array::Status::evaluated);
    out.detach();
  }
}

} // namespace mlx_deform::gpu
