// Loads and stores of every storage type, for the vectors of the instruction
// set that a source file is compiled for (see vector.h): storage type T,
// arithmetic type R.

#pragma once

#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mlx_deform::cpu::MLX_DEFORM_ISA {

namespace {

template <typename To, typename From>
static inline To bit_cast_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

static inline float load_one(const float* p) {
  return *p;
}
static inline double load_one(const double* p) {
  return *p;
}
static inline float load_one(const BFloat16* p) {
  return bit_cast_of<float>(uint32_t(p->bits) << 16);
}
static inline float load_one(const Float16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#elif defined(__aarch64__)
  return float(bit_cast_of<__fp16>(p->bits));
#else
  // Exponent and mantissa moved in place, then rescaled from half's exponent
  // bias to float's; infinities and NaNs get float's full exponent.
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(p->bits & 0x7fff) << 13;
  const uint32_t special = rest >= 0x0f800000 ? 0x7f800000 : 0;
  const float scaled = bit_cast_of<float>(rest) * 0x1p112f;
  return bit_cast_of<float>(bit_cast_of<uint32_t>(scaled) | special | sign);
#endif
}

static inline void store_one(float* p, float x) {
  *p = x;
}
static inline void store_one(double* p, double x) {
  *p = x;
}
static inline void store_one(BFloat16* p, float x) {
  // Round to nearest, ties to even; NaNs stay NaNs.
  const uint32_t u = bit_cast_of<uint32_t>(x);
  p->bits = x != x ? uint16_t((u >> 16) | 0x0040)
                   : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void store_one(Float16* p, float x) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  p->bits = bit_cast_of<uint16_t>(__fp16(x));
#else
  const uint32_t u = bit_cast_of<uint32_t>(x);
  const uint16_t sign = uint16_t(u >> 16) & 0x8000;
  const uint32_t rest = u & 0x7fffffff;
  uint16_t bits;
  if (rest > 0x7f800000) {
    bits = 0x7e00;
  } else if (rest >= 0x477ff000) { // rounds beyond half's largest number
    bits = 0x7c00;
  } else if (rest < 0x38800000) { // subnormal: let the addition round
    bits = uint16_t(bit_cast_of<uint32_t>(bit_cast_of<float>(rest) + 0.5f));
  } else {
    bits = uint16_t((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13);
  }
  p->bits = bits | sign;
#endif
}

static inline Vector<float> load(const BFloat16* p) {
  typedef uint16_t Bits
      __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES)));
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast_of<Vector<float>>(
      Wide(__builtin_convertvector(bits, Wide) << 16));
}
static inline Vector<float> load(const Float16* p) {
#if defined(__F16C__) && MLX_DEFORM_VECTOR_BYTES == 32
  __m128i bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast_of<Vector<float>>(_mm256_cvtph_ps(bits));
#else
  Vector<float> v;
  for (int i = 0; i < VectorOf<float>::width; ++i) {
    v[i] = load_one(p + i);
  }
  return v;
#endif
}

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
