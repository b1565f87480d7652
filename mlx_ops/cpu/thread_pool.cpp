#include "mlx_ops/cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace mlx_deform::cpu {

namespace {

constexpr size_t cache_line = 64;

// Operations that a core does in about 100 us: hardly more than waking others
// up takes.
constexpr int64_t little_work = 5'000'000;

// Batches of one call follow within microseconds, and workers finish at about
// the same time: looking for that a while, some 100 us, is cheaper than
// sleeping and waking. Not by yielding, which costs a thread its turn where
// other programs run too.
template <typename F>
void spin_until(const F& reached) {
  constexpr int spins = 10000;
  for (int i = 0; i < spins && !reached(); ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
}

int threads_wanted() {
  if (const char* text = std::getenv("MLX_DEFORM_NUM_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end != text && *end == '\0' && value >= 1) {
      return static_cast<int>(std::min(value, 1024L));
    }
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Keeps the workers off the CPU that the caller is on. The scheduler may wake a
// thread beside its waker, though other CPUs idle, and then takes milliseconds
// to part them: longer than a small convolution.
class Placement {
 public:
  void keep_off_this_cpu(std::vector<std::thread>& threads) {
#if defined(__linux__)
    const int cpu = sched_getcpu();
    if (cpu == avoided_ || cpu < 0 || cpu >= CPU_SETSIZE) {
      return;
    }
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof(others), &others) != 0) {
      return;
    }
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0) {
      return;
    }
    allow(threads, others);
    avoided_ = cpu;
#endif
  }

  // Before the caller sleeps: a worker that another program has put off its CPU
  // may take the one that falls free.
  void allow_this_cpu(std::vector<std::thread>& threads) {
#if defined(__linux__)
    cpu_set_t all;
    if (avoided_ >= 0 && sched_getaffinity(0, sizeof(all), &all) == 0) {
      allow(threads, all);
      avoided_ = -1;
    }
#endif
  }

 private:
#if defined(__linux__)
  static void allow(std::vector<std::thread>& threads, const cpu_set_t& cpus) {
    for (auto& thread : threads) {
      pthread_setaffinity_np(thread.native_handle(), sizeof(cpus), &cpus);
    }
  }
#endif

  int avoided_{-1};
};

} // namespace

Scratch::~Scratch() {
  std::free(data_);
}

void* Scratch::reserve(size_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const size_t rounded = (bytes + cache_line - 1) / cache_line * cache_line;
    data_ = std::aligned_alloc(cache_line, rounded);
    if (data_ == nullptr) {
      throw std::bad_alloc();
    }
    size_ = rounded;
  }
  return data_;
}

struct ThreadPool::State {
  std::mutex session; // held by the caller whose tasks run

  std::mutex mutex; // guards what follows
  std::condition_variable wake;
  std::condition_variable done;
  uint64_t batch{0};
  bool open{false}; // the batch takes workers
  std::atomic<int> busy{0}; // workers that it took
  bool stop{false};
  std::exception_ptr error;
  const std::function<void(int64_t, Worker&)>* task{nullptr};
  // Each worker begins with a share of its own, the neighbours of what it did
  // in the batch before, which is in its cache; then it helps the others.
  struct alignas(cache_line) Share {
    std::atomic<int64_t> next{0};
    int64_t end{0};
  };
  std::vector<Share> shares;
  // What the spinning workers look at before they go to sleep.
  std::atomic<uint64_t> announced{0};

  Scratch shared_columns;
  Scratch shared_samples;
  Scratch shared_sums;
  Scratch packed_weight;
  std::vector<std::unique_ptr<Worker>> workers; // [0] belongs to the caller
  std::vector<std::thread> threads;
  Placement placement;

  void work(size_t self) {
    try {
      for (size_t i = 0; i < shares.size(); ++i) {
        Share& share = shares[(self + i) % shares.size()];
        for (int64_t j; (j = share.next.fetch_add(1)) < share.end;) {
          (*task)(j, *workers[self]);
        }
      }
    } catch (...) {
      for (Share& share : shares) {
        share.next.store(share.end);
      }
      std::lock_guard lock(mutex);
      if (!error) {
        error = std::current_exception();
      }
    }
  }

  void loop(size_t self) {
    uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return announced.load() != seen; });
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return stop || batch != seen; });
        if (stop) {
          return;
        }
        seen = batch;
        if (!open) {
          continue;
        }
        ++busy;
      }
      work(self);
      std::lock_guard lock(mutex);
      if (--busy == 0) {
        done.notify_one();
      }
    }
  }
};

ThreadPool& ThreadPool::instance() {
  // Never destroyed: an MLX stream may still run when static objects die.
  static ThreadPool* pool = new ThreadPool();
  return *pool;
}

ThreadPool::ThreadPool() : state_(std::make_unique<State>()) {
  const int n = threads_wanted();
  state_->shares = std::vector<State::Share>(n);
  for (int i = 0; i < n; ++i) {
    state_->workers.push_back(std::make_unique<Worker>());
  }
  for (int i = 1; i < n; ++i) {
    state_->threads.emplace_back([state = state_.get(), i] { state->loop(i); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (auto& thread : state_->threads) {
    thread.join();
  }
}

int ThreadPool::size() const {
  return static_cast<int>(state_->workers.size());
}

ThreadPool::Session::Session(ThreadPool& pool, int64_t work)
    : pool_(pool), alone_(work <= little_work) {
  pool_.state_->session.lock();
}

ThreadPool::Session::~Session() {
  pool_.state_->session.unlock();
}

int ThreadPool::Session::size() const {
  return alone_ ? 1 : pool_.size();
}

Scratch& ThreadPool::Session::shared_columns() {
  return pool_.state_->shared_columns;
}

Scratch& ThreadPool::Session::shared_samples() {
  return pool_.state_->shared_samples;
}

Scratch& ThreadPool::Session::shared_sums() {
  return pool_.state_->shared_sums;
}

Scratch& ThreadPool::Session::packed_weight() {
  return pool_.state_->packed_weight;
}

void ThreadPool::Session::run(
    int64_t count,
    const std::function<void(int64_t, Worker&)>& task) {
  State& state = *pool_.state_;
  if (count <= 1 || alone_ || state.threads.empty()) {
    for (int64_t i = 0; i < count; ++i) {
      task(i, *state.workers[0]);
    }
    return;
  }
  state.placement.keep_off_this_cpu(state.threads);
  {
    std::lock_guard lock(state.mutex);
    state.task = &task;
    const auto n = static_cast<int64_t>(state.shares.size());
    for (int64_t i = 0; i < n; ++i) {
      state.shares[i].next.store(count * i / n);
      state.shares[i].end = count * (i + 1) / n;
    }
    state.open = true;
    state.error = nullptr;
    ++state.batch;
    state.announced.store(state.batch);
  }
  state.wake.notify_all();
  state.work(0);
  // All tasks are done or in somebody's hands. Whoever is still waking up isn't
  // waited for.
  {
    std::lock_guard lock(state.mutex);
    state.open = false;
  }
  const auto all_done = [&] { return state.busy.load() == 0; };
  spin_until(all_done);
  if (!all_done()) {
    state.placement.allow_this_cpu(state.threads);
  }
  std::unique_lock lock(state.mutex);
  state.done.wait(lock, all_done);
  if (state.error) {
    std::rethrow_exception(state.error);
  }
}

} // namespace mlx_deform::cpu
