// Loads and stores of every storage type, for the vectors of the instruction
// set that a source file is compiled for (see vector.h): storage type T,
// arithmetic type R.

#pragma once

#include "mlx_ops/cpu/tile_kernels.h"
#include "mlx_ops/cpu/vector.h"

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

// The raw bits of as many halves as a vector has floats.
typedef uint16_t Halves
    __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(MLX_DEFORM_VECTOR_BYTES)));

static inline Halves load_halves(const void* p) {
  Halves bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits;
}
static inline Halves load_first_halves(const void* p, int count) {
#if defined(__AVX512F__)
  return bit_cast_of<Halves>(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
#else
  Halves bits{};
  __builtin_memcpy(&bits, p, count * sizeof(uint16_t));
  return bits;
#endif
}
static inline void store_first_halves(void* p, int count, Halves bits) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, bit_cast_of<__m256i>(bits));
#else
  __builtin_memcpy(p, &bits, count * sizeof(uint16_t));
#endif
}

#if defined(__AVX512F__)
// The forms without a mask make GCC 12 warn of what its own header does.
constexpr __mmask16 all_lanes = 0xffff;
#endif

static inline Vector<float> expand(Halves bits, const BFloat16*) {
  return bit_cast_of<Vector<float>>(
      Words(__builtin_convertvector(bits, Words) << 16));
}
static inline Vector<float> expand(Halves bits, const Float16*) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(all_lanes, bit_cast_of<__m256i>(bits));
#elif defined(__F16C__) && MLX_DEFORM_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(bit_cast_of<__m128i>(bits));
#elif defined(__aarch64__)
  typedef __fp16 Numbers __attribute__((vector_size(sizeof(Halves))));
  return __builtin_convertvector(bit_cast_of<Numbers>(bits), Vector<float>);
#else
  Vector<float> v;
  for (int i = 0; i < VectorOf<float>::width; ++i) {
    const Float16 x{bits[i]};
    v[i] = load_one(&x);
  }
  return v;
#endif
}

static inline Halves round_to(const BFloat16*, Vector<float> v) {
  const Words u = bit_cast_of<Words>(v);
  const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Words nan = (u >> 16) | 0x40;
  return __builtin_convertvector(Words(v != v ? nan : rounded), Halves);
}
static inline Halves round_to(const Float16*, Vector<float> v) {
#if defined(__AVX512F__)
  return bit_cast_of<Halves>(
      _mm512_maskz_cvtps_ph(all_lanes, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && MLX_DEFORM_VECTOR_BYTES == 32
  return bit_cast_of<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  typedef __fp16 Numbers __attribute__((vector_size(sizeof(Halves))));
  return bit_cast_of<Halves>(__builtin_convertvector(v, Numbers));
#else
  Halves bits;
  for (int i = 0; i < VectorOf<float>::width; ++i) {
    Float16 x;
    store_one(&x, v[i]);
    bits[i] = x.bits;
  }
  return bits;
#endif
}

#define HALF_TYPE(T)                                                 \
  static inline Vector<float> load(const T* p) {                     \
    return expand(load_halves(p), p);                                \
  }                                                                  \
  static inline Vector<float> load_first(const T* p, int count) {    \
    return expand(load_first_halves(p, count), p);                   \
  }                                                                  \
  static inline void store(T* p, Vector<float> v) {                  \
    const Halves bits = round_to(p, v);                              \
    __builtin_memcpy(p, &bits, sizeof(bits));                        \
  }                                                                  \
  static inline void store_first(T* p, int count, Vector<float> v) { \
    store_first_halves(p, count, round_to(p, v));                    \
  }

HALF_TYPE(Float16)
HALF_TYPE(BFloat16)
#undef HALF_TYPE

} // namespace

} // namespace mlx_deform::cpu::MLX_DEFORM_ISA
