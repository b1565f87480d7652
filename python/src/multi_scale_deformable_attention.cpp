#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx_ops/multi_scale_deformable_attention/op.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

void init_multi_scale_deformable_attention(nb::module_& m) {
  m.def(
      "multi_scale_deformable_attention",
      [](const mx::array& value,
         const std::vector<std::vector<int>>& spatial_shapes,
         const mx::array& sampling_locations,
         const mx::array& attention_weights,
         const std::optional<std::vector<int>>& points,
         const std::string& method,
         mx::StreamOrDevice s) {
        return mlx_deform::multi_scale_deformable_attention(
            value,
            spatial_shapes,
            sampling_locations,
            attention_weights,
            points,
            method,
            s);
      },
      "value"_a,
      "spatial_shapes"_a,
      "sampling_locations"_a,
      "attention_weights"_a,
      nb::kw_only(),
      "points"_a = nb::none(),
      "method"_a = "bilinear",
      "stream"_a = nb::none(),
      nb::sig(
          "def multi_scale_deformable_attention(value: mlx.core.array, "
          "spatial_shapes: typing.Sequence[typing.Sequence[int]], "
          "sampling_locations: mlx.core.array, attention_weights: "
          "mlx.core.array, *, points: typing.Sequence[int] | None = None, "
          "method: str = 'bilinear', stream: mlx.core.Stream | "
          "mlx.core.Device | mlx.core.DeviceType | None = None) -> "
          "mlx.core.array"),
      R"pbdoc(
        Multi-scale deformable attention: the sampling of the DETR family.

        Each query and head gathers a few samples from every level of a
        pyramid of maps, and adds them up by its attention weights. The softmax
        over the weights, and the projections around the op, are the caller's.
        All arrays are differentiable.

        Args:
          value (array): The maps of all levels, flattened row by row and
            joined, of shape ``(N, S, M, D)``: ``S`` pixels in all, ``M`` heads
            of ``D`` channels.
          spatial_shapes (sequence of pairs): ``(H, W)`` of each of the ``L``
            levels, as ints; ``S`` is the sum of ``H * W``.
          sampling_locations (array): Where to sample, as ``(x, y)`` in units
            of the map: (0, 0) is its upper left corner, (1, 1) its lower
            right one. Of shape ``(N, Q, M, L, P, 2)`` with ``P`` samples on
            every level; with ``points`` of shape
            ``(N, Q, M, sum(points), 2)``, level by level.
          attention_weights (array): The weight of each sample, of the shape of
            ``sampling_locations`` without the last axis.
          points (sequence of ints, optional): How many samples each level has,
            where these are not equally many.
          method (str): ``"bilinear"`` interpolates between the four pixels
            around ``location * size - 0.5``. ``"discrete"`` takes the pixel
            ``trunc(location * size + 0.5)``, clamped to the map, as RT-DETRv2
            does on request; locations have gradient 0 then. Default:
            ``"bilinear"``.
          stream (Stream or Device, optional): Where to compute.

        Returns:
          array: The output of shape ``(N, Q, M * D)``, in the type of
          ``value``.

        Raises:
          ValueError: If a shape, a type (float16, bfloat16, float32, and on
            the CPU float64) or a setting doesn't fit; the message names the
            argument, the rule and the value.

        Coordinates and sums are held in float32 at least, also for half types,
        so locations and weights may stay float32 beside a half ``value``. Maps
        are extended by zeros: a bilinear sample beyond one, at infinity too,
        is 0 with gradient 0. A NaN location makes its output NaN. At the
        centre of a pixel the gradient of a location is the right-hand
        derivative.

        Example:
          >>> import mlx.core as mx
          >>> from mlx_deform import multi_scale_deformable_attention
          >>> shapes = [(20, 30), (10, 15)]
          >>> value = mx.random.normal((1, 20 * 30 + 10 * 15, 8, 32))
          >>> locations = mx.random.uniform(shape=(1, 100, 8, 2, 4, 2))
          >>> weights = mx.softmax(mx.random.normal((1, 100, 8, 8)), axis=-1)
          >>> weights = weights.reshape(1, 100, 8, 2, 4)
          >>> multi_scale_deformable_attention(
          ...     value, shapes, locations, weights
          ... ).shape
          (1, 100, 256)

        References:
          Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End
          Object Detection", arXiv:2010.04159; Lv et al., "RT-DETRv2",
          arXiv:2407.17140 (``points`` and ``"discrete"``).
      )pbdoc");
}
