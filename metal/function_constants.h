// What is fixed when a pipeline is made, so that code and buffers of absent
// arrays vanish. The host's dispatch plan sets them by number.

#pragma once

#include <metal_stdlib>

constant bool has_mask [[function_constant(0)]];
constant bool wants_offset [[function_constant(1)]];
constant bool wants_mask [[function_constant(2)]];
constant int segment_lanes [[function_constant(3)]];
