// Stands in where this build has no GPU backend.

#include "mlx_ops/deform_conv2d.h"
#include "mlx_ops/deform_im2col.h"

#include <stdexcept>

namespace mlx_deform {

namespace {

[[noreturn]] void no_gpu(const char* op) {
  throw std::runtime_error(
      std::string("[") + op +
      "] this build of mlx_deform has no GPU backend; pass stream=mx.cpu");
}

} // namespace

void DeformConv2d::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  no_gpu("deform_conv2d");
}
void DeformConv2dVJP::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  no_gpu("deform_conv2d");
}
void DeformIm2col::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  no_gpu("deform_im2col");
}
void DeformIm2colVJP::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  no_gpu("deform_im2col");
}

} // namespace mlx_deform
