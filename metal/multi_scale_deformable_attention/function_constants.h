// What multi-scale deformable attention fixes when a pipeline is made, beside
// metal/deform_conv2d/function_constants.h. Numbers from 20 on.

#pragma once

#include <metal_stdlib>

constant bool is_discrete [[function_constant(20)]];
constant bool wants_locations [[function_constant(21)]];
constant bool wants_weights [[function_constant(22)]];
constant int rows_per_thread [[function_constant(23)]];
