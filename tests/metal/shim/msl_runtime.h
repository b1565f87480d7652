// The interface between the kernels and the scheduler that runs them: threads
// of a threadgroup are fibers of one system thread, switched at SIMD operations
// and at barriers.

#pragma once

#if __has_feature(thread_sanitizer)
#define MSL_TSAN 1
#endif

namespace msl {

constexpr uint kSimdLanes = 32;
constexpr uint kMaxThreads = 1024; // of a threadgroup
constexpr uint kThreadgroupBytes = 32768;

struct Uint3 {
  uint x, y, z;
};

// The values of a SIMD group's lanes at an operation that they all reached.
struct Peers {
  const unsigned char* values; // one slot of kSlotBytes a lane
  uint lanes; // which take part, one bit each

  static constexpr uint kSlotBytes = 16;
  bool has(uint lane) const {
    return lane < kSimdLanes && (lanes >> lane & 1) != 0;
  }
  const void* value(uint lane) const {
    return values + lane * kSlotBytes;
  }
};

// Publishes a value and waits until every lane of the SIMD group that has not
// returned is here. It is an error if another of them waits in another
// operation.
Peers meet(const char* operation, const void* value, uint bytes);

// Waits until every thread of the threadgroup is here. Only a barrier that
// orders memory makes writes before it visible after it.
void barrier(bool orders_memory);

// Waits until every lane of the SIMD group is here; orders memory likewise.
void simd_barrier(bool orders_memory);

// The threadgroup's memory for the variable with this number; bytes that nobody
// has written yet are 0xff, in every float type a NaN.
void* threadgroup_memory(uint variable, uint bytes);

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const char* message);

// ---- of the running thread
uint lane();
void* buffer(int index);

struct Position { // of three components, narrowed to what a kernel asks for
  Uint3 at;
  operator uint() const {
    return at.x;
  }
  operator metal::uint2() const {
    return metal::uint2{at.x, at.y};
  }
  operator metal::uint3() const {
    return metal::uint3{at.x, at.y, at.z};
  }
};
Position thread_position_in_grid();
Position threads_per_grid();
Position threadgroup_position_in_grid();
Position threadgroups_per_grid();
Position threads_per_threadgroup();
uint thread_index_in_threadgroup();
uint thread_index_in_simdgroup();
uint simdgroup_index_in_threadgroup();

// ---- arguments, converted to whatever type the kernel declares
struct BufferPointer {
  void* at;
  template <class T>
  operator T*() const {
    return (T*)at; // into whatever address space T is in
  }
};
struct BufferReference {
  void* at;
  template <class T>
  operator T&() const {
    return *(T*)at;
  }
};
inline BufferPointer pointer(int index) {
  return {buffer(index)};
}
inline BufferReference reference(int index) {
  return {buffer(index)};
}

} // namespace msl
