// eval_gpu: runs the plans of dispatch.h.

#include "mlx_ops/multi_scale_deformable_attention/op.h"

#include "mlx_ops/arrays.h"
#include "mlx_ops/gpu/plan_inputs.h"
#include "mlx_ops/gpu/run.h"
#include "mlx_ops/multi_scale_deformable_attention/dispatch.h"

namespace mlx_deform {

namespace {

MsdaParams piece_of(
    const MsdaSettings& settings,
    Piece piece,
    const mx::array& value,
    const mx::array& locations) {
  const MsdaParams p = msda_params(settings, value, locations);
  gpu::check_levels(p, settings.levels);
  return gpu::msda_piece(p, piece.index, piece.count);
}

} // namespace

// In place, a piece goes on with the memory of the piece before; elsewhere
// there is one piece, and gpu::run gives an output its memory.
void MultiScaleDeformableAttention::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const mx::array& value = inputs[0];
  mx::array& out = outputs[0];
  if (gpu::in_place(stream())) {
    gpu::continue_or_allocate(piece_, inputs, outputs);
  }
  const MsdaParams p = piece_of(settings_, piece_, value, inputs[1]);
  gpu::run(
      gpu::plan_msda_forward(
          p,
          gpu::dtype_name(value),
          gpu::options_for({gpu::place_of(value), gpu::place_of(out)})),
      {{{"value", &value},
        {"locations", &inputs[1]},
        {"weights", &inputs[2]},
        {"levels", &inputs[3]}},
       {{"out", &out}},
       gpu::bytes_of(p)},
      stream());
}

void MultiScaleDeformableAttentionVJP::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const mx::array& value = inputs[0];
  const mx::array& locations = inputs[1];
  const mx::array& weights = inputs[2];
  const mx::array& cotangent = inputs[3];
  const mx::array& levels = inputs[4];
  size_t next = 0;
  const auto take = [&](bool is_wanted) {
    return is_wanted ? &outputs[next++] : nullptr;
  };
  mx::array* grad_value = take(wanted_.value);
  mx::array* grad_locations = take(wanted_.locations);
  mx::array* grad_weights = take(wanted_.weights);

  if (gpu::in_place(stream())) {
    gpu::continue_or_allocate(piece_, inputs, outputs);
    if (grad_value && piece_.index == 0) {
      gpu::zero_fill(*grad_value, value.dtype(), stream());
    }
  }
  const MsdaParams p = piece_of(settings_, piece_, value, locations);
  if (grad_value) {
    gpu::run(
        gpu::plan_msda_grad_value(
            p,
            gpu::dtype_name(cotangent),
            gpu::deterministic(),
            gpu::msda_map_rows(settings_.levels)),
        {{{"cotangent", &cotangent},
          {"locations", &locations},
          {"weights", &weights},
          {"levels", &levels}},
         {{"grad_value", grad_value}},
         gpu::bytes_of(p)},
        stream(),
        /* sums */ true);
  }
  if (grad_locations || grad_weights) {
    gpu::run(
        gpu::plan_msda_grad_samples(
            p,
            gpu::dtype_name(value),
            grad_locations != nullptr,
            grad_weights != nullptr,
            gpu::options_for({gpu::place_of(value), gpu::place_of(cotangent)})),
        {{{"value", &value},
          {"cotangent", &cotangent},
          {"locations", &locations},
          {"weights", &weights},
          {"levels", &levels}},
         {{"grad_locations", grad_locations}, {"grad_weights", grad_weights}},
         gpu::bytes_of(p)},
        stream());
  }
}

} // namespace mlx_deform
