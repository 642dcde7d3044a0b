// A parallel loop on XLA's own thread pool, for the native CPU kernels.
//
// The caller works too, and waits only for items, never for a task to start: a pool that is busy
// with other programs delays nobody. Results must not depend on who does which item.

#ifndef PALLAS_KERNELS_PARALLEL_H_
#define PALLAS_KERNELS_PARALLEL_H_

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Calls work(i) once for each i in [0, num_items), by at most max_workers threads.
template <typename Work>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t num_items, int64_t max_workers,
                  const Work& work) {
  const int64_t workers = std::min({pool.num_threads(), num_items, max_workers});
  if (workers <= 1) {
    for (int64_t i = 0; i < num_items; ++i) work(i);
    return;
  }
  struct Progress {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  // Shared, since a task may start after the loop has ended; it then claims nothing, and so never
  // touches `work`, which is gone by then.
  auto progress = std::make_shared<Progress>();
  auto drain = [progress, &work, num_items] {
    for (;;) {
      const int64_t i = progress->next.fetch_add(1, std::memory_order_relaxed);
      if (i >= num_items) return;
      work(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < workers; ++i) {
    auto task = drain;
    pool.Schedule(std::move(task));
  }
  drain();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < num_items; ++spins) {
    if (spins < 4096) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace jaxserve

#endif  // PALLAS_KERNELS_PARALLEL_H_
