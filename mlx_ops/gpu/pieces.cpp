#include "mlx_ops/gpu/pieces.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "mlx_ops/arrays.h"
#include "mlx_ops/gpu/plan_arithmetic.h"
#include "mlx_ops/gpu/run.h"

namespace mlx_deform::gpu {

namespace {

// A quarter of a second at an M1's 2.6 TFLOP/s, and so half of one where the
// kernels reach half of that; macOS ends what takes several seconds.
constexpr double kPieceGflop = 650;

} // namespace

bool takes_pieces(mx::Stream stream) {
  return (stream.device == mx::Device::gpu || stands_in_on_cpu()) &&
      in_place(stream);
}

// A positive number of the environment.
double number_from(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') {
    return otherwise;
  }
  char* end = nullptr;
  const double number = std::strtod(text, &end);
  if (end == text || *end != '\0' || !(number > 0 && number <= 1e12)) {
    refuse(name, " must be a positive number; got ", text);
  }
  return number;
}

int pieces_for(double operations, int64_t rows) {
  const double most = number_from("MLX_DEFORM_PIECE_GFLOP", kPieceGflop) * 1e9;
  const double wanted = std::ceil(operations / most);
  const double pieces = double(std::min<int64_t>(rows, 1 << 20));
  return std::max(1, int(std::min(wanted, pieces)));
}

int64_t piece_begin(int64_t rows, int index, int count) {
  // rows * index / count, which need not fit into 64 bits
  return rows / count * index + rows % count * index / count;
}

void continue_or_allocate(
    Piece piece,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const size_t first_previous = inputs.size() - outputs.size();
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (piece.index > 0) {
      outputs[i].copy_shared_buffer(inputs[first_previous + i]);
    } else {
      allocate(outputs[i]);
    }
  }
}

} // namespace mlx_deform::gpu
