// Work that a GPU's watchdog might end comes as a chain of primitives, the
// pieces, between which MLX can commit and free. A piece's last inputs are the
// outputs of the piece before it, whose memory it goes on with. The last piece
// stands for the whole op, for its derivatives too: the others come in behind a
// stop_gradient, and no transform looks at them.

#pragma once

#include <cstdint>
#include <vector>

#include "mlx/array.h"
#include "mlx/ops.h"

namespace mlx_deform {

namespace mx = mlx::core;

struct Piece {
  int index{0};
  int count{1};

  bool operator==(const Piece&) const = default;
};

// The outputs of the last piece. `make_primitive` makes that of a Piece.
template <typename MakePrimitive>
std::vector<mx::array> chain_of_pieces(
    int count,
    const std::vector<mx::array>& inputs,
    const std::vector<mx::Shape>& shapes,
    mx::Dtype dtype,
    const MakePrimitive& make_primitive,
    mx::Stream stream) {
  std::vector<mx::array> outputs;
  for (int i = 0; i < count; ++i) {
    std::vector<mx::array> all = inputs;
    for (const mx::array& previous : outputs) {
      all.push_back(mx::stop_gradient(previous, stream));
    }
    outputs = mx::array::make_arrays(
        shapes,
        std::vector<mx::Dtype>(shapes.size(), dtype),
        make_primitive(Piece{i, count}),
        all);
  }
  return outputs;
}

namespace gpu {

// Whether the stream's ops come in pieces: where a GPU's kernels write in
// place.
bool takes_pieces(mx::Stream stream);

// As many pieces as keep each below MLX_DEFORM_PIECE_GFLOP of `operations`, at
// most `rows`.
int pieces_for(double operations, int64_t rows);

// Where piece `index` of `count` begins among `rows`, for any sizes.
int64_t piece_begin(int64_t rows, int index, int count);

// A positive number of the environment.
double number_from(const char* name, double otherwise);

// A piece continues what the pieces before it have begun, in the same memory:
// that of the last inputs. The first one has memory of its own. Nobody sees
// what is shared before the last piece is done.
void continue_or_allocate(
    Piece piece,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs);

} // namespace gpu

} // namespace mlx_deform
