// A few threads that wait for work, and the team of them that does one piece of it.
//
// A decoder's operations are short, 5 us to a millisecond, and end with everybody waiting for
// everybody. OpenMP deals each loop out in equal shares beforehand and then spins; where another
// process holds a core, the share on it stops everything for a time slice. Here shares are in small
// pieces, which threads that come free take from others, a whole decoder is one piece of work, and
// who waits spins for microseconds only and then sleeps: an idle process takes no time at all. On two
// cores of Zen 4 with other work on them, one token by 9728 x 896 in 4 bits took 7.9 ms in the median
// under OpenMP, a time slice, and takes 0.4 so (0.15 to 0.19 at best, either way).
//
// The threads belong to the process and are started by the first call that needs them. One team
// works at a time; a call that finds them at work does its own alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// What the members of a team share. One cache line for each word that is written often.
struct Meeting {
  static constexpr int kLoops = 4;
  // Pieces of one member's share of a loop that are taken: by itself in the low half, by others in
  // the high half.
  struct alignas(64) Taken {
    std::atomic<uint64_t> pieces{0};
  };
  alignas(64) std::atomic<int32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  std::atomic<int32_t> sleepers{0};
  Taken* taken = nullptr;  // [kLoops][members]
};

// What a member reads soon, in order. Asking for it while memory has nothing else to do, in the steps
// between linears and while waiting, is what keeps decoding at memory's pace.
class Ahead {
 public:
  // Lines that the second-level cache waits for at once, or a few fewer.
  static constexpr int64_t kBurst = 32;

  void add(const void* from, int64_t bytes) {
    if (bytes <= 0 || end_ - next_ == kStretches) return;
    const char* const begin = static_cast<const char*>(from);
    stretches_[end_++ % kStretches] = {begin, begin + bytes};
  }
  // What has been added until now ends here; `skip` leaves out what is before and not asked for yet.
  int64_t end() const { return end_; }
  void skip(int64_t end) { next_ = std::max(next_, end); }

  void ask(int64_t lines = kBurst) {
    for (; lines > 0 && next_ < end_; --lines) {
      Stretch& stretch = stretches_[next_ % kStretches];
      __builtin_prefetch(stretch.from, 0, 2);
      stretch.from += kLineBytes;
      if (stretch.from >= stretch.end) ++next_;
    }
  }

 private:
  static constexpr int64_t kStretches = 16;
  static constexpr int64_t kLineBytes = 64;
  struct Stretch {
    const char *from, *end;
  };
  Stretch stretches_[kStretches];
  int64_t next_ = 0, end_ = 0;
};

// One member's view of its team. All members make the same calls in the same order.
class Team {
 public:
  Team(Meeting& meeting, int index, int size) : meeting_(meeting), index_(index), size_(size) {}

  int index() const { return index_; }
  int size() const { return size_; }

  // Returns when all members are here; asks ahead while it waits.
  void barrier();
  Ahead& ahead() { return ahead_; }

  // f(begin, end) on pieces of 0 .. count - 1, each once, of `grain` or fewer; a barrier at the end.
  // Each member goes through its own share in order, so that what it reads of a matrix is one
  // stretch of memory, and then takes pieces from the ends of the shares of those that are late.
  // Where pieces of 64 KB are dealt out in turn, each begins with a wait for memory: 9728 x 896 in
  // 4 bits was read at 22 GB/s with four tokens and 26 with one so, and is at 26 and 31 in shares
  // (two cores of a Xeon with AMX).
  template <class F>
  void each_piece(int64_t count, int64_t grain, F f) {
    if (count <= 0) return;
    if (size_ == 1) {
      f(static_cast<int64_t>(0), count);
      return;
    }
    const int loop = loop_++;
    // All have left the loop before last, whose words the loop after next will use.
    taken(loop + 2, index_).store(0, std::memory_order_relaxed);
    const int64_t step = std::max<int64_t>(grain, 1);
    for (int turn = 0; turn < size_; ++turn) {
      const int member = (index_ + turn) % size_;
      const int64_t first = share_begin(count, member), stop = share_begin(count, member + 1);
      const int64_t pieces = (stop - first + step - 1) / step;
      std::atomic<uint64_t>& word = taken(loop, member);
      const bool own = turn == 0;
      for (;;) {
        const uint64_t before = word.fetch_add(own ? 1 : kOther, std::memory_order_relaxed);
        const int64_t front = static_cast<int64_t>(before % kOther);
        const int64_t back = static_cast<int64_t>(before / kOther);
        if (front + back >= pieces) break;
        const int64_t begin = first + (own ? front : pieces - 1 - back) * step;
        f(begin, std::min(stop, begin + step));
      }
    }
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

  // Where the share of a member begins, of a loop over `count`.
  int64_t share_begin(int64_t count, int member) const { return count * member / size_; }

 private:
  static constexpr uint64_t kOther = 1ull << 32;

  std::atomic<uint64_t>& taken(int loop, int member) {
    return meeting_.taken[loop % Meeting::kLoops * size_ + member].pieces;
  }

  Meeting& meeting_;
  const int index_;
  const int size_;
  int loop_ = 0;
  Ahead ahead_;
};

using TeamWork = void (*)(void* context, Team& team);
void run_team(int threads, TeamWork work, void* context);

// f(team) by `threads` threads, of which the caller is one.
template <class F>
void with_team(int threads, F f) {
  run_team(threads, [](void* context, Team& team) { (*static_cast<F*>(context))(team); }, &f);
}
