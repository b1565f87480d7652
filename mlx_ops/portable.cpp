#include "mlx_ops/portable.h"

namespace mlx_deform {

namespace {

thread_local bool is_portable = false;

} // namespace

bool portable() {
  return is_portable;
}

bool set_portable(bool value) {
  const bool old = is_portable;
  is_portable = value;
  return old;
}

} // namespace mlx_deform
