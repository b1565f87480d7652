// V consecutive channels read and written at once, as float32.
//
// The widest access of a thread is 16 bytes: 4 floats or 8 halves. Pointers
// must be aligned to the access; the host picks V accordingly. Half types
// travel as words of two, which needs neither 8-wide vectors nor vectors of
// bfloat.

#pragma once

#include <metal_stdlib>

namespace mlx_deform {

inline float not_a_number() {
  return as_type<float>(0x7fc00000u);
}

template <int V>
struct Channels {
  float at[V];
};

// The word's lower 16 bits come first in memory.
template <typename T>
inline metal::float2 unpack_pair(uint word);

template <>
inline metal::float2 unpack_pair<half>(uint word) {
  return metal::float2(as_type<metal::half2>(word));
}

template <>
inline metal::float2 unpack_pair<bfloat>(uint word) {
  // A bfloat is the upper half of a float.
  return metal::float2(
      as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
}

template <typename T>
inline uint pack_pair(float first, float second) {
  return uint(as_type<ushort>(static_cast<T>(first))) |
      (uint(as_type<ushort>(static_cast<T>(second))) << 16);
}

template <typename T, int V>
struct ChannelIO;

template <typename T>
struct ChannelIO<T, 1> {
  static Channels<1> load(const device T* from) {
    Channels<1> out;
    out.at[0] = static_cast<float>(from[0]);
    return out;
  }
  static void store(device T* to, Channels<1> value) {
    to[0] = static_cast<T>(value.at[0]);
  }
};

template <>
struct ChannelIO<float, 4> {
  static Channels<4> load(const device float* from) {
    const metal::float4 v = *(const device metal::float4*)(from);
    Channels<4> out;
    for (int i = 0; i < 4; ++i) {
      out.at[i] = v[i];
    }
    return out;
  }
  static void store(device float* to, Channels<4> value) {
    *(device metal::float4*)(to) =
        metal::float4(value.at[0], value.at[1], value.at[2], value.at[3]);
  }
};

template <typename T>
struct ChannelIO<T, 4> {
  static Channels<4> load(const device T* from) {
    const metal::uint2 words = *(const device metal::uint2*)(from);
    Channels<4> out;
    for (int i = 0; i < 2; ++i) {
      const metal::float2 pair = unpack_pair<T>(words[i]);
      out.at[2 * i] = pair.x;
      out.at[2 * i + 1] = pair.y;
    }
    return out;
  }
  static void store(device T* to, Channels<4> value) {
    metal::uint2 words;
    for (int i = 0; i < 2; ++i) {
      words[i] = pack_pair<T>(value.at[2 * i], value.at[2 * i + 1]);
    }
    *(device metal::uint2*)(to) = words;
  }
};

template <typename T>
struct ChannelIO<T, 8> {
  static Channels<8> load(const device T* from) {
    const metal::uint4 words = *(const device metal::uint4*)(from);
    Channels<8> out;
    for (int i = 0; i < 4; ++i) {
      const metal::float2 pair = unpack_pair<T>(words[i]);
      out.at[2 * i] = pair.x;
      out.at[2 * i + 1] = pair.y;
    }
    return out;
  }
  static void store(device T* to, Channels<8> value) {
    metal::uint4 words;
    for (int i = 0; i < 4; ++i) {
      words[i] = pack_pair<T>(value.at[2 * i], value.at[2 * i + 1]);
    }
    *(device metal::uint4*)(to) = words;
  }
};

} // namespace mlx_deform
