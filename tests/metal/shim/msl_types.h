// Scalars, vectors and their constructors.

#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

static_assert(sizeof(long) == 8, "Metal's long has 64 bits");

namespace metal {

// The translator turns the constructor metal::float4(...), which is no C++ for
// these vectors, into metal::make<metal::float4>(...).
#define MSL_VECTORS(T)                                \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(float)
#undef MSL_VECTORS

template <class V>
struct VectorOf {
  typedef V Element;
  static constexpr int size = 1;
};
template <class T, int N>
using Ext = T __attribute__((ext_vector_type(N)));
template <class T>
struct VectorOf<Ext<T, 2>> {
  typedef T Element;
  static constexpr int size = 2;
};
template <class T>
struct VectorOf<Ext<T, 3>> {
  typedef T Element;
  static constexpr int size = 3;
};
template <class T>
struct VectorOf<Ext<T, 4>> {
  typedef T Element;
  static constexpr int size = 4;
};

template <class V, class A>
inline void append(V& out, int& at, A value) {
  typedef typename VectorOf<V>::Element Element;
  if constexpr (VectorOf<A>::size == 1) {
    out[at++] = static_cast<Element>(value);
  } else {
    for (int i = 0; i < VectorOf<A>::size; ++i) {
      out[at++] = static_cast<Element>(value[i]);
    }
  }
}

template <class V, class... A>
inline V make(A... values) {
  constexpr int given = (VectorOf<A>::size + ... + 0);
  if constexpr (sizeof...(A) == 1 && given == 1) {
    return V(static_cast<typename VectorOf<V>::Element>((values, ...)));
  } else {
    static_assert(
        given == VectorOf<V>::size,
        "wrong number of elements in a vector's constructor");
    V out;
    int at = 0;
    (append(out, at, values), ...);
    return out;
  }
}

} // namespace metal

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
