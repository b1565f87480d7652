// Loops along a row of channels: whole vectors of them, then the last ones. Of
// one instruction set, as vector.h is.

#pragma once

#include "mlx_ops/cpu/storage.h"
#include "mlx_ops/cpu/vector.h"

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

// Some neighbouring channels, in memory of any storage type: a whole vector,
template <typename R>
struct Whole {
  using Value = Vector<R>;
  static constexpr bool is_vector = true;
  static constexpr int count = VectorOf<R>::width;

  template <typename T>
  static Value load_from(const T* p) {
    return load(p);
  }
  template <typename T>
  static void store_to(T* p, Value v) {
    store(p, v);
  }
};

// the first lanes of one,
template <typename R>
struct First {
  using Value = Vector<R>;
  static constexpr bool is_vector = true;
  int count;

  template <typename T>
  Value load_from(const T* p) const {
    return load_first(p, count);
  }
  template <typename T>
  void store_to(T* p, Value v) const {
    store_first(p, count, v);
  }
};

// or a single one.
template <typename R>
struct One {
  using Value = R;
  static constexpr bool is_vector = false;
  static constexpr int count = 1;

  template <typename T>
  static Value load_from(const T* p) {
    return load_one(p);
  }
  template <typename T>
  static void store_to(T* p, Value v) {
    store_one(p, v);
  }
};

// Calls f(lanes, i) for what is left of [0, n) from i on, less than a vector.
template <typename R, typename F>
static inline void for_last_lanes(int i, int n, const F& f) {
  if constexpr (has_masks) {
    if (i < n) {
      f(First<R>{n - i}, i);
    }
  } else {
    for (; i < n; ++i) {
      f(One<R>{}, i);
      // Keeps the compiler from vectorising: whether rows overlap would have to
      // be tested, which takes longer than so few lanes.
      __asm__ volatile("");
    }
  }
}

// What is known of a row's length when code is compiled: a number of lanes, or
constexpr int any_length = 0;
constexpr int whole_vectors = -1; // any number of them
template <int n>
struct Length {
  static constexpr int value = n;
};

// Calls f(Length) for rows of n lanes: code of their own for the usual short
// rows, whose time would go by what a loop does besides, and for rows without
// last lanes, whose code takes registers.
template <typename R, typename F>
static inline void with_length(int n, const F& f) {
  constexpr int width = VectorOf<R>::width;
  switch (n) {
    case width:
      return f(Length<width>{});
    case 2 * width:
      return f(Length<2 * width>{});
    case 3 * width:
      return f(Length<3 * width>{});
    case 4 * width:
      return f(Length<4 * width>{});
    case 8 * width:
      return f(Length<8 * width>{});
  }
  if (n % width == 0) {
    return f(Length<whole_vectors>{});
  }
  if (n == 3) { // a coloured image
    return f(Length<3>{});
  }
  if constexpr (width > 4) {
    if (n == 4) {
      return f(Length<4>{});
    }
  }
  f(Length<any_length>{});
}

// The length of rows that have n lanes: a constant where it is known.
template <int length>
constexpr int length_of(int n) {
  return length > 0 ? length : n;
}

// Calls f(lanes, i) for neighbouring lanes from i on, which cover [0, n).
template <typename R, int length = any_length, typename F>
static inline void for_lanes(int n, const F& f) {
  constexpr int width = VectorOf<R>::width;
  if constexpr (length > 0) {
    constexpr int whole = length / width * width;
    MLX_DEFORM_UNROLL(8)
    for (int i = 0; i < whole; i += width) {
      f(Whole<R>{}, i);
    }
    MLX_DEFORM_UNROLL(4)
    for (int i = whole; i < length; ++i) {
      f(One<R>{}, i);
    }
  } else {
    int i = 0;
    MLX_DEFORM_UNROLL(2)
    for (; i + width <= n; i += width) {
      f(Whole<R>{}, i);
    }
    if constexpr (length == any_length) {
      for_last_lanes<R>(i, n, f);
    }
  }
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
