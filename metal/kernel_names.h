// The types of one library of kernels, and how its kernels are instantiated.
//
// A library holds the kernels of one data type and one index width, so that a
// process compiles the few that it may need, not all. The host writes the
// macros in front of the source; these are their values without a host.

#pragma once

#ifndef MLX_DEFORM_T
#define MLX_DEFORM_T float
#define MLX_DEFORM_T_NAME float32
#define MLX_DEFORM_T_BYTES 4
// The type of an element's position in an array: `int` where every array has
// fewer than 2^31 elements, else `long`, whose arithmetic GPUs emulate.
#define MLX_DEFORM_INDEX int
#define MLX_DEFORM_INDEX_NAME i32
#define MLX_DEFORM_INDEX_BITS 32
#endif

#define MLX_DEFORM_STRING_OF(text) #text
#define MLX_DEFORM_STRING(text) MLX_DEFORM_STRING_OF(text)
#define MLX_DEFORM_JOIN_OF(stem, index, type) stem##_##index##_##type
#define MLX_DEFORM_JOIN(stem, index, type) MLX_DEFORM_JOIN_OF(stem, index, type)

// MLX_DEFORM_INSTANTIATE(stem, kernel<arguments>)
// Host name: <stem>_<index width>_<data type>.
#define MLX_DEFORM_INSTANTIATE(stem, ...)                                 \
  template [[host_name(MLX_DEFORM_STRING(                                 \
      MLX_DEFORM_JOIN(stem, MLX_DEFORM_INDEX_NAME, MLX_DEFORM_T_NAME)))]] \
  [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
