// Runs a launch on one system thread: threadgroups one after the other, the
// threads of each as fibers. The seed shuffles the order of both, so that a
// result that depends on the order differs between seeds; seed 0 is the plain
// order.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "context_switch.h"
#include "msl_types.h"

#include "msl_runtime.h"

#ifdef MSL_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
}
#endif

#if __has_feature(thread_sanitizer)
// The scheduler's own accesses would look like races between the fibers.
#define MSL_UNSEEN __attribute__((disable_sanitizer_instrumentation))
#else
#define MSL_UNSEEN
#endif

// clang calls this to round to bfloat; older runtime libraries lack it.
extern "C" __attribute__((weak)) bfloat __truncsfbf2(float x) {
  uint bits = as_type<uint>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    bits |= 0x400000; // a NaN stays one
  } else {
    bits += 0x7fff + (bits >> 16 & 1); // to nearest, ties to even
  }
  return as_type<bfloat>(ushort(bits >> 16));
}

// Made by the translator: the kernels' launchers in the order of their names.
extern "C" void (*const msl_launchers[])();

namespace msl {

namespace {

constexpr unsigned long kStackBytes = 64 * 1024;
constexpr uint kMaxVariables = 64; // in threadgroup memory

enum class State { ready, in_simd_operation, at_barrier, done };

struct Thread {
  void* stack = nullptr; // the memory
  void* stack_at = nullptr; // where it was left
  State state = State::done;
  const char* operation = nullptr; // that it waits in
  uint index = 0; // in the threadgroup
  Uint3 position{}; // in the grid
  uint meetings = 0; // SIMD operations so far
  uint lanes = 0; // that took part in the last one
  uint barriers = 0; // so far
  uint simd_barriers = 0; // so far
#ifdef MSL_TSAN
  void* fiber = nullptr;
#endif
};

struct Scheduler {
  void (*launcher)() = nullptr;
  void** buffers = nullptr;
  Uint3 grid{}, group{}, groups{}, group_at{};
  Uint3 extent{}; // threads of this group; less than `group` at the grid's end
  uint count = 0;
  Thread threads[kMaxThreads];
  Thread* running = nullptr;
  void* main_stack = nullptr;
#ifdef MSL_TSAN
  void* main_fiber = nullptr;
#endif
  // Two slots a thread: one lane may publish its next value before another has
  // read the last one.
  alignas(16) unsigned char values[2][kMaxThreads * Peers::kSlotBytes];
  // The threadgroup's memory, and where its variables begin.
  unsigned char* memory = nullptr;
  uint memory_used = 0;
  uint variables = 0;
  struct {
    uint number, begin;
  } variable[kMaxVariables];
#ifdef MSL_TSAN
  // Stand for what a barrier makes visible, of this threadgroup alone: one that
  // an earlier threadgroup released would order the two.
  struct Orders {
    long group[2];
    long simd[kMaxThreads / kSimdLanes][2];
  };
  Orders orders_of[4096];
  uint groups_begun = 0;
  MSL_UNSEEN Orders& orders() {
    return orders_of[groups_begun % 4096];
  }
#endif
  unsigned long random = 1;
  char* error = nullptr;
  bool failed = false;
};

Scheduler scheduler;

MSL_UNSEEN unsigned long random_below(unsigned long n) {
  unsigned long& x = scheduler.random; // xorshift
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x % n;
}

MSL_UNSEEN void switch_to_scheduler() {
#ifdef MSL_TSAN
  __tsan_switch_to_fiber(scheduler.main_fiber, 1);
#endif
  msl_switch(&scheduler.running->stack_at, scheduler.main_stack);
}

MSL_UNSEEN void switch_to(Thread& thread) {
  scheduler.running = &thread;
#ifdef MSL_TSAN
  // Without synchronisation, as threads of a GPU.
  __tsan_switch_to_fiber(thread.fiber, 1);
#endif
  msl_switch(&scheduler.main_stack, thread.stack_at);
}

MSL_UNSEEN void run_thread() {
  scheduler.launcher();
#ifdef MSL_TSAN
  __tsan_release(&scheduler); // seen at the end of the launch
#endif
  scheduler.running->state = State::done;
  switch_to_scheduler();
  abort();
}

MSL_UNSEEN void* fresh_memory(unsigned long bytes) {
  void* memory = mmap(
      nullptr,
      bytes,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS,
      -1,
      0);
  if (memory == MAP_FAILED) {
    abort();
  }
  return memory;
}

MSL_UNSEEN void start(Thread& thread, uint index) {
  const Uint3 extent = scheduler.extent;
  thread.state = State::ready;
  thread.index = index;
  thread.meetings = 0;
  thread.barriers = 0;
  thread.simd_barriers = 0;
  thread.position = {
      scheduler.group_at.x * scheduler.group.x + index % extent.x,
      scheduler.group_at.y * scheduler.group.y + index / extent.x % extent.y,
      scheduler.group_at.z * scheduler.group.z + index / extent.x / extent.y};
#ifdef MSL_TSAN
  // A stack used before would look shared between two threads.
  thread.stack = nullptr;
#endif
  if (thread.stack == nullptr) {
    thread.stack = fresh_memory(kStackBytes);
  }
  thread.stack_at =
      msl_new_stack(static_cast<char*>(thread.stack) + kStackBytes, run_thread);
#ifdef MSL_TSAN
  // Last, for what comes before is ordered before all that the fiber does.
  // Never destroyed: a later fiber would take over its identity, and races with
  // it.
  thread.fiber = __tsan_create_fiber(0);
#endif
}

MSL_UNSEEN void report(uint thread, const char* message) {
  const Uint3 at = scheduler.group_at;
  snprintf(
      scheduler.error,
      512,
      "threadgroup (%u, %u, %u), thread %u: %s",
      at.x,
      at.y,
      at.z,
      thread,
      message);
  scheduler.failed = true;
}

// Lets the SIMD group go on whose lanes all wait in the same operation.
MSL_UNSEEN void release(uint first) {
  const uint end = first + kSimdLanes < scheduler.count ? first + kSimdLanes
                                                        : scheduler.count;
  uint lanes = 0;
  const char* operation = nullptr;
  bool at_barrier = false;
  for (uint i = first; i < end; ++i) {
    const Thread& thread = scheduler.threads[i];
    if (thread.state != State::in_simd_operation) {
      at_barrier |= thread.state == State::at_barrier;
      continue;
    }
    if (operation != nullptr && strcmp(operation, thread.operation) != 0) {
      char message[256];
      snprintf(
          message,
          sizeof(message),
          "is in %s while its SIMD group is in %s",
          thread.operation,
          operation);
      report(i, message);
      return;
    }
    operation = thread.operation;
    lanes |= 1u << (i - first);
  }
  if (operation != nullptr && at_barrier) {
    report(
        first,
        "of its SIMD group, some are at a barrier, others in an operation");
    return;
  }
  for (uint i = first; i < end; ++i) {
    if (lanes >> (i - first) & 1) {
      scheduler.threads[i].state = State::ready;
      scheduler.threads[i].lanes = lanes;
    }
  }
}

// Lets the threadgroup go on once all its threads are at a barrier.
MSL_UNSEEN void release_barrier() {
  uint waiting = 0;
  uint ready = 0;
  for (uint i = 0; i < scheduler.count; ++i) {
    waiting += scheduler.threads[i].state == State::at_barrier;
    ready += scheduler.threads[i].state == State::ready;
  }
  if (waiting == 0 || ready != 0) {
    return;
  }
  if (waiting != scheduler.count) {
    report(0, "waits at a barrier that other threads of its group never reach");
    return;
  }
  for (uint i = 0; i < scheduler.count; ++i) {
    scheduler.threads[i].state = State::ready;
  }
}

MSL_UNSEEN void run_group(bool shuffle) {
#ifdef MSL_TSAN
  ++scheduler.groups_begun;
#endif
  uint order[kMaxThreads];
#ifdef MSL_TSAN
  scheduler.memory = nullptr; // as for stacks
#endif
  if (scheduler.memory == nullptr) {
    scheduler.memory =
        static_cast<unsigned char*>(fresh_memory(kThreadgroupBytes));
  }
  scheduler.variables = scheduler.memory_used = 0;
  for (uint i = 0; i < scheduler.count; ++i) {
    start(scheduler.threads[i], i);
    order[i] = i;
  }
  for (uint i = scheduler.count; shuffle && i > 1; --i) {
    const uint j = uint(random_below(i));
    const uint swapped = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swapped;
  }
  uint done = 0;
  while (done < scheduler.count && !scheduler.failed) {
    for (uint i = 0; i < scheduler.count && !scheduler.failed; ++i) {
      Thread& thread = scheduler.threads[order[i]];
      if (thread.state == State::ready) {
        switch_to(thread);
        done += thread.state == State::done;
      }
    }
    for (uint i = 0; i < scheduler.count && !scheduler.failed;
         i += kSimdLanes) {
      release(i);
    }
    if (!scheduler.failed) {
      release_barrier();
    }
  }
}

uint extent_of(uint grid, uint group, uint at) {
  const uint rest = grid - at * group;
  return rest < group ? rest : group;
}

unsigned long common_divisor(unsigned long a, unsigned long b) {
  return b == 0 ? a : common_divisor(b, a % b);
}

} // namespace

MSL_UNSEEN Peers meet(const char* operation, const void* value, uint bytes) {
  if (bytes > Peers::kSlotBytes) {
    fail("calls a SIMD operation with a value of more than 16 bytes");
  }
  Thread& self = *scheduler.running;
  unsigned char* values = scheduler.values[self.meetings++ % 2];
  unsigned char* slot = values + self.index * Peers::kSlotBytes;
  for (uint i = 0; i < bytes; ++i) {
    slot[i] = static_cast<const unsigned char*>(value)[i];
  }
  self.operation = operation;
  self.state = State::in_simd_operation;
  switch_to_scheduler();
  const uint first = self.index / kSimdLanes * kSimdLanes;
  return {values + first * Peers::kSlotBytes, self.lanes};
}

MSL_UNSEEN void barrier(bool orders_memory) {
  Thread& self = *scheduler.running;
#ifdef MSL_TSAN
  long* order = &scheduler.orders().group[self.barriers++ % 2];
  if (orders_memory) {
    __tsan_release(order);
  }
#endif
  self.state = State::at_barrier;
  switch_to_scheduler();
#ifdef MSL_TSAN
  if (orders_memory) {
    __tsan_acquire(order);
  }
#else
  (void)orders_memory;
#endif
}

MSL_UNSEEN void simd_barrier(bool orders_memory) {
#ifdef MSL_TSAN
  Thread& self = *scheduler.running;
  // Of the SIMD group alone, and of this barrier or the one after the next.
  long* order = &scheduler.orders()
                     .simd[self.index / kSimdLanes][self.simd_barriers++ % 2];
  if (orders_memory) {
    __tsan_release(order);
  }
#endif
  const char nothing = 0;
  meet("simdgroup_barrier", &nothing, 1);
#ifdef MSL_TSAN
  if (orders_memory) {
    __tsan_acquire(order);
  }
#else
  (void)orders_memory;
#endif
}

MSL_UNSEEN void* threadgroup_memory(uint variable, uint bytes) {
  Scheduler& s = scheduler;
  for (uint i = 0; i < s.variables; ++i) {
    if (s.variable[i].number == variable) {
      return s.memory + s.variable[i].begin;
    }
  }
  const uint begin = (s.memory_used + 15) / 16 * 16;
  if (s.variables == kMaxVariables || begin + bytes > kThreadgroupBytes) {
    fail("needs more threadgroup memory than there is");
  }
  s.variable[s.variables++] = {variable, begin};
  s.memory_used = begin + bytes;
  for (uint i = 0; i < bytes; ++i) {
    s.memory[begin + i] = 0xff;
  }
  return s.memory + begin;
}

void fail(const char* message) {
  report(scheduler.running->index, message);
  scheduler.running->state = State::done;
  switch_to_scheduler();
  abort();
}

MSL_UNSEEN uint lane() {
  return scheduler.running->index % kSimdLanes;
}
MSL_UNSEEN void* buffer(int index) {
  return scheduler.buffers[index];
}
MSL_UNSEEN Position thread_position_in_grid() {
  return {scheduler.running->position};
}
MSL_UNSEEN Position threads_per_grid() {
  return {scheduler.grid};
}
MSL_UNSEEN Position threadgroup_position_in_grid() {
  return {scheduler.group_at};
}
MSL_UNSEEN Position threadgroups_per_grid() {
  return {scheduler.groups};
}
MSL_UNSEEN Position threads_per_threadgroup() {
  return {scheduler.extent};
}
MSL_UNSEEN uint thread_index_in_threadgroup() {
  return scheduler.running->index;
}
MSL_UNSEEN uint thread_index_in_simdgroup() {
  return lane();
}
MSL_UNSEEN uint simdgroup_index_in_threadgroup() {
  return scheduler.running->index / kSimdLanes;
}

} // namespace msl

// Runs kernel number `kernel`. Returns 0, or 1 with a message in `error` (512
// bytes). `grid` and `group` are in threads, as in Metal's dispatchThreads.
extern "C" int msl_run(
    int kernel,
    void** buffers,
    const uint* grid,
    const uint* group,
    unsigned long seed,
    char* error) {
  using namespace msl;
  Scheduler& s = scheduler;
  s.launcher = msl_launchers[kernel];
  s.buffers = buffers;
  s.grid = {grid[0], grid[1], grid[2]};
  s.group = {group[0], group[1], group[2]};
  s.error = error;
  s.failed = false;
  s.random = seed * 0x9e3779b97f4a7c15ul + 88172645463325252ul;
#ifdef MSL_TSAN
  s.main_fiber = __tsan_get_current_fiber();
#endif
  if (group[0] * group[1] * group[2] > kMaxThreads) {
    snprintf(error, 512, "a threadgroup has at most %u threads", kMaxThreads);
    return 1;
  }
  s.groups = {
      (grid[0] + group[0] - 1) / group[0],
      (grid[1] + group[1] - 1) / group[1],
      (grid[2] + group[2] - 1) / group[2]};
  const unsigned long count =
      (unsigned long)s.groups.x * s.groups.y * s.groups.z;
  // A step without common divisor visits every threadgroup once.
  unsigned long at = 0;
  unsigned long step = 1;
  if (seed != 0 && count > 1) {
    at = random_below(count);
    do {
      step = 1 + random_below(count);
    } while (common_divisor(step, count) != 1);
  }
  for (unsigned long i = 0; i < count; ++i, at = (at + step) % count) {
    s.group_at = {
        uint(at % s.groups.x),
        uint(at / s.groups.x % s.groups.y),
        uint(at / s.groups.x / s.groups.y)};
    s.extent = {
        extent_of(s.grid.x, s.group.x, s.group_at.x),
        extent_of(s.grid.y, s.group.y, s.group_at.y),
        extent_of(s.grid.z, s.group.z, s.group_at.z)};
    s.count = s.extent.x * s.extent.y * s.extent.z;
    run_group(seed != 0);
    if (s.failed) {
      return 1;
    }
  }
#ifdef MSL_TSAN
  __tsan_acquire(&scheduler);
#endif
  return 0;
}
