// One pool of worker threads for every call, with scratch memory per thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace mlx_deform::cpu {

// A buffer that only grows and is aligned to cache lines. Kept from call to
// call: fresh pages would cost more than a small convolution.
class Scratch {
 public:
  ~Scratch();
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Uninitialised room for `count` elements, valid until the next call.
  template <typename T>
  T* get(int64_t count) {
    return static_cast<T*>(reserve(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* reserve(size_t bytes);
  void* data_{nullptr};
  size_t size_{0};
};

// What a worker may use while it runs a task.
struct Worker {
  Scratch columns;
  Scratch rows;
  Scratch packed_rows;
  Scratch samples;
  Scratch groups;
};

// Runs batches of independent tasks on all cores: as many as
// MLX_DEFORM_NUM_THREADS says, by default as many as the machine has. Callers
// from several streams take turns.
class ThreadPool {
 public:
  static ThreadPool& instance();

  int size() const;

  // Holds the pool for a sequence of `run` calls and the shared scratch memory.
  class Session {
   public:
    // A call of little work, in floating-point operations, stays on the
    // caller's thread: with others, it would wait for them to wake up, and
    // where another program has their CPU, for its turn to end.
    explicit Session(ThreadPool& pool, int64_t work = much_work);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    int size() const;

    // Calls task(i, worker) for every i in [0, count), in any order, and
    // returns when all are done. The first exception is thrown again here.
    void run(int64_t count, const std::function<void(int64_t, Worker&)>& task);

    // Scratch memory that all tasks of this session see.
    Scratch& shared_columns();
    Scratch& shared_samples();
    Scratch& shared_sums();
    Scratch& packed_weight();

   private:
    static constexpr int64_t much_work = INT64_MAX;
    ThreadPool& pool_;
    bool alone_;
  };

 private:
  ThreadPool();
  ~ThreadPool();
  struct State;
  std::unique_ptr<State> state_;
};

} // namespace mlx_deform::cpu
