// The op's GPU kernels as plain functions: the loops of stand_in.h.

#include "mlx_ops/multi_scale_deformable_attention/stand_in.h"

#include <vector>

#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/types.h"
#include "mlx_ops/stand_in/numbers.h"
#include "mlx_ops/stand_in/registry.h"

namespace mlx_deform::stand_in {

namespace {

void forward(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  const MsdaParams p = params_from<MsdaParams>(params);
  cpu::dispatch_types(in.at("value").dtype(), [&]<typename T, typename R>() {
    std::vector<R> sums(out.at("out").size());
    msda_forward<R>(
        p,
        numbers<T, R>(in.at("value")).data(),
        in.at("locations").data<R>(),
        in.at("weights").data<R>(),
        in.at("levels").data<int>(),
        sums.data());
    const int64_t first = p.query_begin * p.M * p.D;
    const int64_t last = p.query_end * p.M * p.D;
    cpu::tile_kernels<T, R>().from_compute(
        sums.data() + first, out.at("out").data<T>() + first, last - first);
  });
}

void grad_value(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  cpu::dispatch_types(
      in.at("cotangent").dtype(), [&]<typename T, typename R>() {
        msda_grad_value<R>(
            params_from<MsdaParams>(params),
            numbers<T, R>(in.at("cotangent")).data(),
            in.at("locations").data<R>(),
            in.at("weights").data<R>(),
            in.at("levels").data<int>(),
            out.at("grad_value").data<R>());
      });
}

void grad_samples(
    const gpu::Launch&,
    const Arrays& in,
    Arrays& out,
    const std::vector<char>& params) {
  cpu::dispatch_types(in.at("value").dtype(), [&]<typename T, typename R>() {
    const auto written = [&](const char* role) {
      const auto found = out.find(role);
      return found == out.end() ? nullptr : found->second.data<R>();
    };
    const mx::array* weights = find(in, "weights"); // null: not needed
    msda_grad_samples<R>(
        params_from<MsdaParams>(params),
        numbers<T, R>(in.at("value")).data(),
        numbers<T, R>(in.at("cotangent")).data(),
        in.at("locations").data<R>(),
        weights ? weights->data<R>() : nullptr,
        in.at("levels").data<int>(),
        written("grad_locations"),
        written("grad_weights"));
  });
}

const Registration registrations[] = {
    {"msda_forward", forward},
    {"msda_grad_value", grad_value},
    {"msda_grad_value_ordered", grad_value},
    {"msda_grad_samples", grad_samples},
};

} // namespace

} // namespace mlx_deform::stand_in
