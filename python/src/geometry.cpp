#include "python/src/geometry.h"

#include <sstream>
#include <stdexcept>

mlx_deform::Pair to_pair(
    const std::string& tag,
    const std::string& name,
    const IntOrPair& value) {
  if (const int* both = std::get_if<int>(&value)) {
    return {*both, *both};
  }
  const auto& list = std::get<std::vector<int>>(value);
  if (list.size() != 2) {
    std::ostringstream message;
    message << "[" << tag << "] " << name
            << " must be an int or a pair of ints, (rows, columns); got (";
    for (size_t i = 0; i < list.size(); ++i) {
      message << (i ? ", " : "") << list[i];
    }
    message << (list.size() == 1 ? ",)" : ")");
    throw std::invalid_argument(message.str());
  }
  return {list[0], list[1]};
}

mlx_deform::Geometry to_geometry(
    const std::string& tag,
    const IntOrPair& stride,
    const IntOrPair& padding,
    const IntOrPair& dilation) {
  return {
      to_pair(tag, "stride", stride),
      to_pair(tag, "padding", padding),
      to_pair(tag, "dilation", dilation)};
}
