#include "python/src/geometry.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx_ops/deform_conv2d/op.h"

namespace mx = mlx::core;
using namespace nb::literals;

void init_deform_conv2d(nb::module_& m) {
  m.def(
      "deform_conv2d",
      [](const mx::array& input,
         const mx::array& offset,
         const mx::array& weight,
         const std::optional<mx::array>& bias,
         const IntOrPair& stride,
         const IntOrPair& padding,
         const IntOrPair& dilation,
         const std::optional<mx::array>& mask,
         mx::StreamOrDevice s) {
        return mlx_deform::deform_conv2d(
            input,
            offset,
            weight,
            bias,
            to_geometry("deform_conv2d", stride, padding, dilation),
            mask,
            s);
      },
      "input"_a,
      "offset"_a,
      "weight"_a,
      "bias"_a = nb::none(),
      "stride"_a = 1,
      "padding"_a = 0,
      "dilation"_a = 1,
      "mask"_a = nb::none(),
      nb::kw_only(),
      "stream"_a = nb::none(),
      nb::sig(
          "def deform_conv2d(input: mlx.core.array, offset: mlx.core.array, "
          "weight: mlx.core.array, bias: mlx.core.array | None = None, stride: "
          "int | typing.Sequence[int] = 1, padding: int | typing.Sequence[int] "
          "= 0, dilation: int | typing.Sequence[int] = 1, mask: mlx.core.array "
          "| None = None, *, stream: mlx.core.Stream | mlx.core.Device | "
          "mlx.core.DeviceType | None = None) -> mlx.core.array"),
      R"pbdoc(
        Deformable convolution over an image with channels last.

        Each tap of the kernel samples the image, bilinearly and extended by
        zeros, at its place on the grid plus an offset of its own. Without
        ``mask`` this is DCNv1, with ``mask`` DCNv2. All arguments but the
        geometry are differentiable.

        Args:
          input (array): Image of shape ``(N, H, W, C_in)``.
          offset (array): Offsets in pixels, of shape
            ``(N, H_out, W_out, 2 * DG * kH * kW)``, the last axis ordered
            ``[DG][kH][kW][(dy, dx)]``. ``DG`` offset groups split the input
            channels; the number is read off the shape.
          weight (array): Kernel of shape ``(C_out, kH, kW, C_in / G)``. ``G``
            groups split the channels; the number is read off the shape.
          bias (array, optional): Bias of shape ``(C_out,)``.
          stride (int or pair): Step between output positions, (rows, columns).
            Default: ``1``.
          padding (int or pair): Zeros around the image. Default: ``0``.
          dilation (int or pair): Step between the taps. Default: ``1``.
          mask (array, optional): Modulation of each sample, of shape
            ``(N, H_out, W_out, DG * kH * kW)``, the last axis ordered
            ``[DG][kH][kW]``.
          stream (Stream or Device, optional): Where to compute.

        Returns:
          array: The output of shape ``(N, H_out, W_out, C_out)``, with
          ``H_out = (H + 2 * padding - dilation * (kH - 1) - 1) // stride + 1``,
          in the type that ``input``, ``weight`` and ``bias`` promote to.

        Raises:
          ValueError: If a shape, a type (float16, bfloat16, float32, and on
            the CPU float64) or a size doesn't fit; the message names the
            argument, the rule and the value.

        Coordinates and sums are held in float32 at least, also for half types,
        so ``offset`` and ``mask`` may stay float32 beside a half ``input``. A
        sample beyond the image, at infinity too, is 0 with gradient 0; a NaN
        offset makes its output NaN. At an integer coordinate the gradient of
        ``offset`` is the right-hand derivative.

        Example:
          >>> import mlx.core as mx
          >>> from mlx_deform import deform_conv2d
          >>> image = mx.random.normal((1, 32, 32, 16))
          >>> weight = mx.random.normal((8, 3, 3, 16))
          >>> offset = mx.zeros((1, 32, 32, 2 * 3 * 3))
          >>> deform_conv2d(image, offset, weight, padding=1).shape
          (1, 32, 32, 8)

        References:
          Dai et al., "Deformable Convolutional Networks", arXiv:1703.06211;
          Zhu et al., "Deformable ConvNets v2", arXiv:1811.11168.
      )pbdoc");
}
