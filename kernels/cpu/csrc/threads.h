// A few threads that wait for work, and the team of them that does one piece of it.
//
// A decoder's operations are short, 5 us to a millisecond, and end with everybody waiting for
// everybody. OpenMP deals each loop out in equal shares beforehand and then spins; where another
// process holds a core, the share on it stops everything for a time slice. Here shares are small
// and taken as threads come free, a whole decoder is one piece of work, and who waits spins for
// microseconds only and then sleeps: an idle process takes no time at all. On two cores of Zen 4
// with other work on them, one token by 9728 x 896 in 4 bits took 7.9 ms in the median under OpenMP,
// a time slice, and takes 0.4 so (0.15 to 0.19 at best, either way).
//
// The threads belong to the process and are started by the first call that needs them. One team
// works at a time; a call that finds them at work does its own alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// What the members of a team share. One cache line for each word that is written often.
struct Meeting {
  static constexpr int kCounters = 4;
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  alignas(64) std::atomic<int32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  std::atomic<int32_t> sleepers{0};
  Counter counters[kCounters];
};

// One member's view of its team. All members make the same calls in the same order.
class Team {
 public:
  Team(Meeting& meeting, int index, int size) : meeting_(meeting), index_(index), size_(size) {}

  int index() const { return index_; }
  int size() const { return size_; }

  // Returns when all members are here.
  void barrier();

  // f(begin, end) on pieces of 0 .. count - 1, each once, of `grain` or more; a barrier at the end.
  template <class F>
  void each_piece(int64_t count, int64_t grain, F f) {
    if (count <= 0) return;
    if (size_ == 1) {
      f(static_cast<int64_t>(0), count);
      return;
    }
    const int slot = loop_++ % Meeting::kCounters;
    // All have left the loop before last, whose counter the loop after next will use.
    if (index_ == 0)
      meeting_.counters[(slot + 2) % Meeting::kCounters].next.store(0, std::memory_order_relaxed);
    std::atomic<int64_t>& next = meeting_.counters[slot].next;
    const int64_t step = std::max<int64_t>(grain, 1);
    for (int64_t begin = next.fetch_add(step, std::memory_order_relaxed); begin < count;
         begin = next.fetch_add(step, std::memory_order_relaxed))
      f(begin, std::min(count, begin + step));
    barrier();
  }

  // f(i) for i = 0 .. count - 1.
  template <class F>
  void each(int64_t count, int64_t grain, F f) {
    each_piece(count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  // A grain that gives every member `shares` pieces.
  int64_t share(int64_t count, int64_t shares) const {
    return std::max<int64_t>(1, count / (shares * size_));
  }

 private:
  Meeting& meeting_;
  const int index_;
  const int size_;
  int loop_ = 0;
};

using TeamWork = void (*)(void* context, Team& team);
void run_team(int threads, TeamWork work, void* context);

// f(team) by `threads` threads, of which the caller is one.
template <class F>
void with_team(int threads, F f) {
  run_team(threads, [](void* context, Team& team) { (*static_cast<F*>(context))(team); }, &f);
}
