// threads: a team that stays together for a whole pass through the layers, and scratch memory.
//
// Opening and closing an OpenMP region costs a few microseconds. A layer has five parallel stages, each of which takes
// only a few tens. So one region is opened per op. Its first thread (the leader) runs the op's program; wherever the
// program has independent tasks, the other threads (the helpers) take some. A stage is over when its tasks are done,
// whoever did them, so nobody waits for a thread to arrive. A helper that the system has suspended costs its share, not
// a deadlock.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>

#include "amx.h"
#include "vec.h"

namespace skipfast {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Wait for a condition: look for some tens of microseconds, then let others use the core between looks.
template <typename F>
inline void wait_until(const F& condition) {
  for (int looks = 0; !condition(); looks++)
    if (looks < 1000) relax();
    else std::this_thread::yield();
}

class Team {
 public:
  explicit Team(int64_t size) : size(size) {}
  const int64_t size;
  static inline thread_local Team* current = nullptr;  // set on the leader only

  // For the leader: have task(i) called once for every i in [0, count); return when all are done.
  template <typename F>
  void run(int64_t count, const F& task) {
    task_ = &task, count_ = count;
    call_ = [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); };
    done_.store(0, std::memory_order_relaxed);
    stage_++;
    open_.store(stage_ << 32 | uint64_t(count), std::memory_order_release);
    while (work()) {}
    wait_until([&] { return done_.load(std::memory_order_acquire) == count; });
  }
  void help() {
    TileScope scope;
    auto over = [&] { return over_.load(std::memory_order_acquire); };
    while (!over()) wait_until([&] { return work() || over(); });
  }
  void end() { over_.store(true, std::memory_order_release); }

 private:
  // Take one task, if any is left. Stage and tasks left are one word, so a late helper cannot take a task of another
  // stage. Once it has a task, the leader waits for it, so the fields of the stage stay as they are.
  bool work() {
    uint64_t seen = open_.load(std::memory_order_acquire);
    do {
      if (!uint32_t(seen)) return false;
    } while (!open_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    call_(task_, count_ - int64_t(uint32_t(seen)));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void (*call_)(const void*, int64_t) = nullptr;
  const void* task_ = nullptr;
  int64_t count_ = 0;
  uint64_t stage_ = 0;
  alignas(64) std::atomic<uint64_t> open_{0};  // stage << 32 | tasks left
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> over_{false};
};

// Run `program` with a team of `size` threads from torch's pool (torch.set_num_threads governs their number).
template <typename F>
inline void with_team(int64_t size, const F& program) {
  if (size <= 1 || Team::current) return program();
  Team team(size);
  torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t) {
    if (begin) return team.help();
    struct Leader {  // its destructor sends the helpers home even if the program throws
      Team& team;
      explicit Leader(Team& team) : team(team) { Team::current = &team; }
      ~Leader() { Team::current = nullptr, team.end(); }
    } leader(team);
    TileScope scope;
    program();
  });
}

// Return how many threads are worth using for an amount of work. A team is awake already; otherwise waking one costs.
// The number never changes a bit of the result.
inline int64_t threads_for(int64_t work, int64_t work_per_thread) {
  if (Team::current) return work < work_per_thread / 8 ? 1 : Team::current->size;
  if (work < 2 * work_per_thread) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / work_per_thread);
}

// Call task(i) for i in [0, tasks) on up to `threads` threads. Tasks are handed out one by one, so that other threads
// take over the share of a thread that the system suspends for a moment.
template <typename F>
inline void for_each_task(int64_t tasks, int64_t threads, const F& task) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
  } else {
    with_team(threads, [&] { Team::current->run(tasks, task); });
  }
}

// Scratch memory that only grows, one for each thread and use; 64-byte aligned, contents undefined.
struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;
  float* get(int64_t floats) {
    if (size < floats + LANES) {
      memory.reset();
      memory.reset(new float[floats + LANES]);
      size = floats + LANES;
    }
    return (float*)((uintptr_t(memory.get()) + 63) & ~uintptr_t(63));
  }
};

}  // namespace skipfast
