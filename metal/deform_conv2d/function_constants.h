// What is fixed when a pipeline is made, so that code and buffers of absent
// arrays vanish. The host's dispatch plan sets them by number.

#pragma once

#include <metal_stdlib>

constant bool has_mask [[function_constant(0)]];
constant bool wants_offset [[function_constant(1)]];
constant bool wants_mask [[function_constant(2)]];
constant int segment_lanes [[function_constant(3)]];
constant bool has_bias [[function_constant(5)]];
constant int depth_splits [[function_constant(6)]];
constant bool is_direct [[function_constant(7)]];
constant bool has_columns [[function_constant(8)]]; // not is_direct
constant int outputs_per_thread [[function_constant(9)]];
constant int pixels_per_thread [[function_constant(10)]];
