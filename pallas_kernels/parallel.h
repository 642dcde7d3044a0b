// A parallel loop on XLA's own thread pool, for the native CPU kernels.
//
// The caller works too, and waits only for items, never for a task to start: a pool that is busy
// with other programs delays nobody. Results must not depend on who does which item.
//
// A decode step is hundreds of loops of some tens of microseconds, and waking a sleeping thread
// takes as long as half of one. So a task that finds no more items lingers for kLinger, watching
// for the next loop, before it goes back to the pool.
//
// A program may start in a thread outside of the pool. The task that it wakes can then be put behind
// it on the same core, for the 3 ms of a scheduler's slice, while the other core sleeps. So a caller
// that is still alone after kAlone asks for another task, which the idle core takes.

#ifndef PALLAS_KERNELS_PARALLEL_H_
#define PALLAS_KERNELS_PARALLEL_H_

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::nanoseconds kLinger{50'000};
constexpr std::chrono::nanoseconds kAlone{100'000};

// One loop. Whoever claims an item below num_items may touch `work`: the caller waits for it.
struct Loop {
  void (*run)(const void* work, int64_t item);
  const void* work;
  int64_t num_items;
  int64_t max_tasks;  // beside the caller
  std::atomic<int64_t> next{0};
  std::atomic<bool> alone{true};  // no task has come yet
  alignas(64) std::atomic<int64_t> done{0};

  Loop(void (*run)(const void*, int64_t), const void* work, int64_t num_items, int64_t max_tasks)
      : run(run), work(work), num_items(num_items), max_tasks(max_tasks) {}

  // Does one item; false if none is left.
  bool advance() {
    const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    if (i >= num_items) return false;
    run(work, i);
    done.fetch_add(1, std::memory_order_release);
    return true;
  }
};

// Where a loop is shown to the tasks that linger; the latest is enough.
class Board {
 public:
  static Board& of_process() {
    static Board* board = new Board;  // tasks may outlive static destruction
    return *board;
  }

  // Shows a loop; returns how many tasks linger, some of which may be about to leave.
  int64_t show(const std::shared_ptr<Loop>& loop) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = loop;
    }
    version_.fetch_add(1, std::memory_order_release);
    return lingering_.load(std::memory_order_acquire);
  }

  // Works on `loop` and those shown after it, until none has come for kLinger.
  void serve(std::shared_ptr<Loop> loop) {
    while (loop != nullptr) {
      const uint64_t seen = version_.load(std::memory_order_acquire);
      loop->alone.store(false, std::memory_order_relaxed);
      while (loop->advance()) {
      }
      loop = await_next(seen, loop->max_tasks);
    }
  }

 private:
  // The next loop, if one comes soon and no more tasks wait for it than such a loop wants.
  std::shared_ptr<Loop> await_next(uint64_t seen, int64_t max_tasks) {
    std::shared_ptr<Loop> next;
    if (lingering_.fetch_add(1, std::memory_order_acq_rel) >= max_tasks) {
      lingering_.fetch_sub(1, std::memory_order_acq_rel);
      return next;
    }
    const auto limit = Clock::now() + kLinger;
    do {
      for (int spins = 0; spins < 32 && next == nullptr; ++spins) {
        if (version_.load(std::memory_order_acquire) != seen) {
          std::lock_guard<std::mutex> lock(mutex_);
          next = loop_;
        }
        _mm_pause();
      }
    } while (next == nullptr && Clock::now() < limit);
    lingering_.fetch_sub(1, std::memory_order_acq_rel);
    return next;
  }

  std::mutex mutex_;
  std::shared_ptr<Loop> loop_;
  std::atomic<uint64_t> version_{0};
  std::atomic<int64_t> lingering_{0};
};

// Calls work(i) once for each i in [0, num_items), by at most max_workers threads.
template <typename Work>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t num_items, int64_t max_workers,
                  const Work& work) {
  const int64_t workers = std::min({pool.num_threads(), num_items, max_workers});
  if (workers <= 1) {
    for (int64_t i = 0; i < num_items; ++i) work(i);
    return;
  }
  // Shared, since a task may start after the loop has ended; it then claims nothing.
  auto loop = std::make_shared<Loop>(
      [](const void* work, int64_t item) { (*static_cast<const Work*>(work))(item); }, &work,
      num_items, workers - 1);
  const auto add_task = [&] { pool.Schedule([loop] { Board::of_process().serve(loop); }); };
  const auto begun = Clock::now();
  const int64_t lingering = Board::of_process().show(loop);
  for (int64_t i = 1 + lingering; i < workers; ++i) add_task();
  for (bool asked = false; loop->advance();) {
    if (!asked && loop->alone.load(std::memory_order_relaxed) && Clock::now() > begun + kAlone) {
      asked = true;
      add_task();
    }
  }
  for (int spins = 0; loop->done.load(std::memory_order_acquire) < num_items; ++spins) {
    if (spins < 4096) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace jaxserve

#endif  // PALLAS_KERNELS_PARALLEL_H_
