#include "mlx_ops/multi_scale_deformable_attention/op.h"

#include <algorithm>

#include "mlx/backend/cpu/encoder.h"
#include "mlx_ops/arrays.h"
#include "mlx_ops/cpu/isa.h"
#include "mlx_ops/cpu/memory.h"
#include "mlx_ops/cpu/tiles.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/multi_scale_deformable_attention/cpu_kernels.h"

namespace mlx_deform {

namespace cpu {

#define DECLARE(isa)                                       \
  namespace isa {                                          \
  extern const MsdaKernels<float, float> msda_float32;     \
  extern const MsdaKernels<double, double> msda_float64;   \
  extern const MsdaKernels<Float16, float> msda_float16;   \
  extern const MsdaKernels<BFloat16, float> msda_bfloat16; \
  }

DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#endif

template <>
const MsdaKernels<float, float>& msda_kernels() {
  return MLX_DEFORM_CHOOSE(msda_float32);
}
template <>
const MsdaKernels<double, double>& msda_kernels() {
  return MLX_DEFORM_CHOOSE(msda_float64);
}
template <>
const MsdaKernels<Float16, float>& msda_kernels() {
  return MLX_DEFORM_CHOOSE(msda_float16);
}
template <>
const MsdaKernels<BFloat16, float>& msda_kernels() {
  return MLX_DEFORM_CHOOSE(msda_bfloat16);
}

namespace {

template <typename T, typename R>
void msda_forward(
    const MsdaParams& p,
    const std::vector<MsdaLevel>& levels,
    const T* value,
    const R* locations,
    const R* weights,
    T* out) {
  const auto& kernels = msda_kernels<T, R>();
  const int64_t blocks = ceil_div(p.Q, msda_queries); // of an image
  ThreadPool::Session session(ThreadPool::instance());
  session.run(p.N * blocks, [&](int64_t i, Worker& worker) {
    const int begin = static_cast<int>(i % blocks) * msda_queries;
    kernels.forward(
        p,
        levels.data(),
        static_cast<int>(i / blocks),
        begin,
        std::min(begin + msda_queries, p.Q),
        value,
        locations,
        weights,
        worker.rows.get<R>(int64_t(msda_queries) * p.D),
        out);
  });
}

// A level's pixels, as one head sees them, are touched by that level's samples
// for that head alone, so some heads on one level are a task that meets no
// other: nothing is stored in between, and every sum has an order that no
// number of threads changes. Where no gradient of value is wanted, queries can
// be told apart too. Tasks are as few as keep the threads busy: heads of a
// pixel lie side by side, and one by one they would use a part of the cache
// alone.
template <typename T, typename R>
void msda_backward(
    const MsdaParams& p,
    const std::vector<MsdaLevel>& levels,
    const T* value,
    const R* locations,
    const R* weights,
    const T* cotangent,
    R* grad_value,
    R* grad_locations,
    R* grad_weights) {
  constexpr int queries_apart = 1024;
  constexpr int tasks_per_thread = 4;
  const auto& kernels = msda_kernels<T, R>();
  ThreadPool::Session session(ThreadPool::instance());
  if (grad_value) {
    fill_zero(session, grad_value, int64_t(p.N) * p.S * p.M * p.D);
  }
  const int64_t parts = grad_value ? 1 : ceil_div(p.Q, queries_apart);
  const int64_t wanted = tasks_per_thread * session.size();
  const int64_t groups = std::clamp<int64_t>(
      ceil_div(wanted, std::max<int64_t>(1, parts * p.N * p.L)), 1, p.M);
  session.run(parts * p.N * groups * p.L, [&](int64_t i, Worker&) {
    const auto take = [&](int64_t size) {
      const int64_t index = i % size;
      i /= size;
      return index;
    };
    const auto cut = [](int64_t size, int64_t part, int64_t parts) {
      return static_cast<int>(size * part / parts);
    };
    const int level = static_cast<int>(take(p.L));
    const int64_t group = take(groups);
    const int64_t part = take(parts);
    kernels.backward(
        p,
        levels.data(),
        static_cast<int>(i),
        cut(p.M, group, groups),
        cut(p.M, group + 1, groups),
        level,
        cut(p.Q, part, parts),
        cut(p.Q, part + 1, parts),
        value,
        locations,
        weights,
        cotangent,
        grad_value,
        grad_locations,
        grad_weights);
  });
}

} // namespace

} // namespace cpu

void MultiScaleDeformableAttention::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (gpu::stands_in_on_cpu()) {
    return eval_gpu(inputs, outputs);
  }
  cpu::allocate(outputs);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [p = msda_params(settings_, inputs[0], inputs[1]),
       levels = settings_.levels,
       in = weak_copies(inputs),
       out = mx::array::unsafe_weak_copy(outputs[0])]() mutable {
        cpu::dispatch_types(out.dtype(), [&]<typename T, typename R>() {
          cpu::msda_forward<T, R>(
              p,
              levels,
              in[0].data<T>(),
              in[1].data<R>(),
              in[2].data<R>(),
              out.data<T>());
        });
      });
}

void MultiScaleDeformableAttentionVJP::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (gpu::stands_in_on_cpu()) {
    return eval_gpu(inputs, outputs);
  }
  cpu::allocate(outputs);
  mx::cpu::get_command_encoder(stream()).dispatch(
      [p = msda_params(settings_, inputs[0], inputs[1]),
       levels = settings_.levels,
       in = weak_copies(inputs),
       out = weak_copies(outputs),
       wanted = wanted_]() mutable {
        cpu::dispatch_types(in[0].dtype(), [&]<typename T, typename R>() {
          size_t next = 0;
          const auto take = [&](bool is_wanted) {
            return is_wanted ? out[next++].data<R>() : nullptr;
          };
          R* grad_value = take(wanted.value);
          R* grad_locations = take(wanted.locations);
          R* grad_weights = take(wanted.weights);
          cpu::msda_backward<T, R>(
              p,
              levels,
              in[0].data<T>(),
              in[1].data<R>(),
              in[2].data<R>(),
              in[3].data<T>(),
              grad_value,
              grad_locations,
              grad_weights);
        });
      });
}

} // namespace mlx_deform
