// V consecutive channels read and written at once, as float32.
//
// The widest access of a thread is 16 bytes: 4 floats or 8 halves. Pointers
// must be aligned to the access; the host picks V accordingly.

#pragma once

namespace mlx_deform {

template <int V>
struct Channels {
  float at[V];
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Packed {
  T at[V];
};

template <typename T, int V>
struct ChannelIO {
  static __device__ Channels<V> load(const T* from) {
    const Packed<T, V> packed = *reinterpret_cast<const Packed<T, V>*>(from);
    Channels<V> out;
    for (int i = 0; i < V; ++i) {
      out.at[i] = static_cast<float>(packed.at[i]);
    }
    return out;
  }
  static __device__ void store(T* to, Channels<V> value) {
    Packed<T, V> packed;
    for (int i = 0; i < V; ++i) {
      packed.at[i] = static_cast<T>(value.at[i]);
    }
    *reinterpret_cast<Packed<T, V>*>(to) = packed;
  }
};

} // namespace mlx_deform
