# The source files, listed once.

set(MLX_DEFORM_CORE_SOURCES
    mlx_ops/checks.cpp
    mlx_ops/deform_conv2d.cpp
    mlx_ops/deform_conv2d_transforms.cpp
    mlx_ops/deform_im2col.cpp
    mlx_ops/deform_im2col_transforms.cpp
    mlx_ops/offset_tangent.cpp
    mlx_ops/portable.cpp
    mlx_ops/cpu/deform_conv2d.cpp
    mlx_ops/cpu/deform_im2col.cpp
    mlx_ops/cpu/gemm.cpp
    mlx_ops/cpu/thread_pool.cpp
    mlx_ops/cpu/tile_kernels.cpp
    mlx_ops/cpu/transpose.cpp
    mlx_ops/gpu/chunks.cpp
    mlx_ops/gpu/deform_conv2d.cpp
    mlx_ops/gpu/deform_im2col.cpp
    mlx_ops/gpu/dispatch.cpp
    mlx_ops/gpu/dispatch_direct.cpp
    mlx_ops/gpu/dispatch_products.cpp
    mlx_ops/gpu/in_place_route.cpp
    mlx_ops/gpu/own_outputs_route.cpp
    mlx_ops/gpu/plan_arithmetic.cpp
    mlx_ops/gpu/run_now.cpp
    mlx_ops/cuda/launch.cpp)

# Compiled once per instruction set.
set(MLX_DEFORM_KERNEL_SOURCES
    mlx_ops/cpu/tile_kernels_baseline.cpp)
set(MLX_DEFORM_X86_KERNEL_SOURCES
    mlx_ops/cpu/products_avx2.cpp
    mlx_ops/cpu/tile_kernels_avx2.cpp)

# One GPU backend a build: Metal where MLX has it, else CUDA with its stand-in.
set(MLX_DEFORM_METAL_SOURCES
    mlx_ops/metal/kernels.cpp)
set(MLX_DEFORM_CUDA_SOURCES
    mlx_ops/cuda/kernels.cpp
    mlx_ops/stand_in/kernels.cpp)

# Embedded as text in every build; their includes come along.
set(MLX_DEFORM_METAL_KERNELS
    metal/deform_im2col.metal
    metal/deform_col2im.metal
    metal/deform_offset_grad.metal
    metal/deform_product.metal
    metal/deform_direct.metal
    metal/zero_fill.metal)

# Likewise, each file as a text of its own: cuda/deform_<name>.cu.
set(MLX_DEFORM_CUDA_KERNELS
    im2col
    col2im
    offset_grad)

set(MLX_DEFORM_BINDING_SOURCES
    python/src/module.cpp
    python/src/deform_conv2d.cpp
    python/src/deform_im2col.cpp
    python/src/dispatch.cpp
    python/src/memory.cpp)
