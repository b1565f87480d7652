// Checks that every op makes before anything is scheduled. They throw
// std::invalid_argument (a ValueError in Python) that reads
// "[tag] rule; got value".

#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_deform {

namespace mx = mlx::core;

// Values print as Python's do.
template <typename List>
std::string tuple_text(const List& list) {
  std::ostringstream out;
  out << "(";
  for (size_t i = 0; i < list.size(); ++i) {
    out << (i ? ", " : "") << list[i];
  }
  out << (list.size() == 1 ? ",)" : ")");
  return out.str();
}
inline std::string text(const std::string& word) {
  return word;
}
inline std::string text(int64_t number) {
  return std::to_string(number);
}
inline std::string text(const std::vector<int>& numbers) {
  return tuple_text(numbers);
}
inline std::string text(const std::pair<int, int>& pair) {
  return text(std::vector<int>{pair.first, pair.second});
}
inline std::string text(const mx::Shape& shape) {
  return "shape " + tuple_text(shape);
}

template <typename Value>
void require(
    bool holds,
    const std::string& tag,
    const std::string& rule,
    const Value& value) {
  if (!holds) {
    throw std::invalid_argument(
        "[" + tag + "] " + rule + "; got " + text(value));
  }
}

// The argument must hold real floating-point numbers.
void check_floating(
    const std::string& tag,
    const std::string& name,
    const mx::array& x);

// The stream's device must have kernels, and float64 exists on the CPU only.
void check_device(
    const std::string& tag,
    const mx::Dtype& dtype,
    const mx::Stream& stream);

} // namespace mlx_deform
