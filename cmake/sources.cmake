# The source files, listed once.

# An op has a folder of its own in mlx_ops/, metal/ and cuda/.
set(MLX_DEFORM_CORE_SOURCES
    mlx_ops/checks.cpp
    mlx_ops/portable.cpp
    mlx_ops/cpu/gemm.cpp
    mlx_ops/cpu/isa.cpp
    mlx_ops/cpu/thread_pool.cpp
    mlx_ops/cpu/tile_kernels.cpp
    mlx_ops/cpu/transpose.cpp
    mlx_ops/cuda/launch.cpp
    mlx_ops/gpu/launch.cpp
    mlx_ops/gpu/pieces.cpp
    mlx_ops/gpu/plan_arithmetic.cpp
    mlx_ops/gpu/run_now.cpp
    mlx_ops/deform_conv2d/chunks.cpp
    mlx_ops/deform_conv2d/cpu.cpp
    mlx_ops/deform_conv2d/dispatch.cpp
    mlx_ops/deform_conv2d/dispatch_direct.cpp
    mlx_ops/deform_conv2d/dispatch_products.cpp
    mlx_ops/deform_conv2d/gpu.cpp
    mlx_ops/deform_conv2d/gpu_kernels.cpp
    mlx_ops/deform_conv2d/im2col.cpp
    mlx_ops/deform_conv2d/im2col_cpu.cpp
    mlx_ops/deform_conv2d/im2col_gpu.cpp
    mlx_ops/deform_conv2d/im2col_transforms.cpp
    mlx_ops/deform_conv2d/in_place_route.cpp
    mlx_ops/deform_conv2d/offset_tangent.cpp
    mlx_ops/deform_conv2d/op.cpp
    mlx_ops/deform_conv2d/own_outputs_route.cpp
    mlx_ops/deform_conv2d/plan_checks.cpp
    mlx_ops/deform_conv2d/portable.cpp
    mlx_ops/deform_conv2d/shapes.cpp
    mlx_ops/deform_conv2d/transforms.cpp
    mlx_ops/multi_scale_deformable_attention/cpu.cpp
    mlx_ops/multi_scale_deformable_attention/dispatch.cpp
    mlx_ops/multi_scale_deformable_attention/gpu.cpp
    mlx_ops/multi_scale_deformable_attention/op.cpp
    mlx_ops/multi_scale_deformable_attention/portable.cpp
    mlx_ops/multi_scale_deformable_attention/transforms.cpp)

# Compiled once per instruction set.
set(MLX_DEFORM_KERNEL_SOURCES
    mlx_ops/cpu/tile_kernels_baseline.cpp
    mlx_ops/multi_scale_deformable_attention/cpu_kernels_baseline.cpp)
set(MLX_DEFORM_AVX2_KERNEL_SOURCES
    mlx_ops/cpu/tile_kernels_avx2.cpp
    mlx_ops/multi_scale_deformable_attention/cpu_kernels_avx2.cpp)
set(MLX_DEFORM_AVX512_KERNEL_SOURCES
    mlx_ops/cpu/tile_kernels_avx512.cpp
    mlx_ops/multi_scale_deformable_attention/cpu_kernels_avx512.cpp)

# One GPU backend a build: Metal where MLX has it, else CUDA with its stand-in.
set(MLX_DEFORM_METAL_SOURCES
    mlx_ops/metal/run.cpp)
set(MLX_DEFORM_CUDA_SOURCES
    mlx_ops/cuda/run.cpp
    mlx_ops/stand_in/registry.cpp
    mlx_ops/deform_conv2d/stand_in.cpp
    mlx_ops/multi_scale_deformable_attention/stand_in.cpp)

# Embedded as text in every build; their includes come along.
set(MLX_DEFORM_METAL_KERNELS
    metal/zero_fill.metal
    metal/deform_conv2d/im2col.metal
    metal/deform_conv2d/col2im.metal
    metal/deform_conv2d/offset_grad.metal
    metal/deform_conv2d/product.metal
    metal/deform_conv2d/direct.metal
    metal/multi_scale_deformable_attention/forward.metal
    metal/multi_scale_deformable_attention/grad_value.metal
    metal/multi_scale_deformable_attention/grad_samples.metal)

# Likewise, each file as a text of its own.
set(MLX_DEFORM_CUDA_KERNELS
    cuda/deform_conv2d/im2col.cu
    cuda/deform_conv2d/col2im.cu
    cuda/deform_conv2d/offset_grad.cu
    cuda/multi_scale_deformable_attention/forward.cu
    cuda/multi_scale_deformable_attention/grad_value.cu
    cuda/multi_scale_deformable_attention/grad_samples.cu)

set(MLX_DEFORM_BINDING_SOURCES
    python/src/module.cpp
    python/src/deform_conv2d.cpp
    python/src/deform_im2col.cpp
    python/src/geometry.cpp
    python/src/deform_conv2d_dispatch.cpp
    python/src/memory.cpp
    python/src/multi_scale_deformable_attention.cpp
    python/src/multi_scale_deformable_attention_dispatch.cpp)
