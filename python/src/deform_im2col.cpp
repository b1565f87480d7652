#include "python/src/geometry.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx_ops/deform_conv2d/im2col.h"

namespace mx = mlx::core;
using namespace nb::literals;

void init_deform_im2col(nb::module_& m) {
  m.def(
      "deform_im2col",
      [](const mx::array& input,
         const mx::array& offset,
         const IntOrPair& kernel_size,
         const IntOrPair& stride,
         const IntOrPair& padding,
         const IntOrPair& dilation,
         const std::optional<mx::array>& mask,
         mx::StreamOrDevice s) {
        return mlx_deform::deform_im2col(
            input,
            offset,
            to_pair("deform_im2col", "kernel_size", kernel_size),
            to_geometry("deform_im2col", stride, padding, dilation),
            mask,
            s);
      },
      "input"_a,
      "offset"_a,
      "kernel_size"_a,
      "stride"_a = 1,
      "padding"_a = 0,
      "dilation"_a = 1,
      "mask"_a = nb::none(),
      nb::kw_only(),
      "stream"_a = nb::none(),
      nb::sig(
          "def deform_im2col(input: mlx.core.array, offset: mlx.core.array, "
          "kernel_size: int | typing.Sequence[int], stride: int | "
          "typing.Sequence[int] = 1, padding: int | typing.Sequence[int] = 0, "
          "dilation: int | typing.Sequence[int] = 1, mask: mlx.core.array | "
          "None = None, *, stream: mlx.core.Stream | mlx.core.Device | "
          "mlx.core.DeviceType | None = None) -> mlx.core.array"),
      R"pbdoc(
        The sampled columns of a deformable convolution.

        ``deform_im2col(x, offset, (kH, kW), mask=mask) @ w.reshape(C_out, -1).T``
        equals ``deform_conv2d(x, offset, w, mask=mask)`` for an ungrouped
        weight ``w``, which holds far less memory.

        Args:
          input (array): Image of shape ``(N, H, W, C_in)``.
          offset (array): Offsets in pixels, of shape
            ``(N, H_out, W_out, 2 * DG * kH * kW)``, the last axis ordered
            ``[DG][kH][kW][(dy, dx)]``.
          kernel_size (int or pair): ``(kH, kW)``.
          stride (int or pair): Step between output positions, (rows, columns).
            Default: ``1``.
          padding (int or pair): Zeros around the image. Default: ``0``.
          dilation (int or pair): Step between the taps. Default: ``1``.
          mask (array, optional): Modulation of each sample, of shape
            ``(N, H_out, W_out, DG * kH * kW)``.
          stream (Stream or Device, optional): Where to compute.

        Returns:
          array: Columns of shape ``(N, H_out, W_out, kH * kW * C_in)``, the
          last axis ordered ``[kH][kW][C_in]``, in the type of ``input``.

        Raises:
          ValueError: If a shape, a type or a size doesn't fit; the message
            names the argument, the rule and the value.

        Example:
          >>> import mlx.core as mx
          >>> from mlx_deform import deform_im2col
          >>> image = mx.random.normal((1, 32, 32, 16))
          >>> offset = mx.zeros((1, 32, 32, 2 * 3 * 3))
          >>> deform_im2col(image, offset, 3, padding=1).shape
          (1, 32, 32, 144)

        References:
          Dai et al., "Deformable Convolutional Networks", arXiv:1703.06211.
      )pbdoc");
}
