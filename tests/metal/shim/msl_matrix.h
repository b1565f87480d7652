// 8 by 8 matrices that the lanes of a SIMD group hold together, two elements a
// lane. Which lane holds which is Metal's secret, and no kernel may rely on it.

#pragma once

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8 by 8 matrices only");

  // Of the lane's elements: (row, column) and (row, column + 1).
  T at[2];

  // A matrix that nobody has filled is NaN.
  simdgroup_matrix() {
    __builtin_memset((void*)at, 0xff, sizeof(at));
  }
  static uint row(uint lane) {
    return lane / 4;
  }
  static uint column(uint lane) {
    return lane % 4 * 2;
  }
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(
    T value) {
  simdgroup_matrix<T, Columns, Rows> out;
  out.at[0] = out.at[1] = value;
  return out;
}

// Element (row, column) lies at (origin.y + row) * stride + origin.x + column,
// or transposed.
inline ulong simdgroup_place(
    uint row,
    uint column,
    ulong stride,
    ulong2 origin,
    bool transpose) {
  return transpose ? (origin.y + column) * stride + origin.x + row
                   : (origin.y + row) * stride + origin.x + column;
}

#define MSL_LOAD_AND_STORE(space)                                            \
  template <class T>                                                         \
  inline void simdgroup_load(                                                \
      thread simdgroup_matrix<T, 8, 8>& to,                                  \
      const space T* from,                                                   \
      ulong stride,                                                          \
      ulong2 origin,                                                         \
      bool transpose) {                                                      \
    msl::meet("simdgroup_load", &stride, sizeof(stride));                    \
    const uint row = to.row(msl::lane());                                    \
    const uint column = to.column(msl::lane());                              \
    for (uint i = 0; i < 2; ++i) {                                           \
      to.at[i] =                                                             \
          from[simdgroup_place(row, column + i, stride, origin, transpose)]; \
    }                                                                        \
  }                                                                          \
  template <class T>                                                         \
  inline void simdgroup_store(                                               \
      thread simdgroup_matrix<T, 8, 8> from,                                 \
      space T* to,                                                           \
      ulong stride,                                                          \
      ulong2 origin,                                                         \
      bool transpose) {                                                      \
    msl::meet("simdgroup_store", &stride, sizeof(stride));                   \
    const uint row = from.row(msl::lane());                                  \
    const uint column = from.column(msl::lane());                            \
    for (uint i = 0; i < 2; ++i) {                                           \
      to[simdgroup_place(row, column + i, stride, origin, transpose)] =      \
          from.at[i];                                                        \
    }                                                                        \
  }
#ifdef MSL_STRICT
MSL_LOAD_AND_STORE(device)
MSL_LOAD_AND_STORE(threadgroup)
#else
MSL_LOAD_AND_STORE()
#endif
#undef MSL_LOAD_AND_STORE

// to = left * right + sum
template <class T>
inline void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<T, 8, 8>& to,
    thread simdgroup_matrix<T, 8, 8> left,
    thread simdgroup_matrix<T, 8, 8> right,
    thread simdgroup_matrix<T, 8, 8> sum) {
  const T mine[4] = {left.at[0], left.at[1], right.at[0], right.at[1]};
  const msl::Peers peers =
      msl::meet("simdgroup_multiply_accumulate", mine, sizeof(mine));
  if (peers.lanes != 0xffffffffu) {
    msl::fail("multiplies matrices of which a lane takes no part");
  }
  const uint row = to.row(msl::lane());
  const uint column = to.column(msl::lane());
  for (uint k = 0; k < 8; ++k) {
    // Of the lanes that hold (row, k), (k, column) and (k, column + 1).
    const T* from_left = static_cast<const T*>(peers.value(row * 4 + k / 2));
    const T* from_right =
        static_cast<const T*>(peers.value(k * 4 + column / 2));
    for (uint i = 0; i < 2; ++i) {
      sum.at[i] += from_left[k % 2] * from_right[2 + i];
    }
  }
  to.at[0] = sum.at[0];
  to.at[1] = sum.at[1];
}

} // namespace metal
