// The waiting threads of threads.h, on Linux's futex.

#include "threads.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

// About 30 us of looking before sleeping. Longer than a decoder's operations are apart, shorter
// than what falling asleep and waking costs twice.
constexpr int kLooks = 2000;
constexpr int64_t kLinesALook = 4;

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr,
          nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr,
          nullptr, 0);
}

// Returns the word's value once it is not `value` any more.
uint32_t wait_for_change(std::atomic<uint32_t>& word, uint32_t value,
                         std::atomic<int32_t>& sleepers, Ahead* ahead = nullptr) {
  for (int i = 0; i < kLooks; ++i) {
    const uint32_t now = word.load(std::memory_order_acquire);
    if (now != value) return now;
    if (ahead != nullptr) ahead->ask(kLinesALook);
    _mm_pause();
  }
  // Sequentially consistent against `announce`: either it sees the sleeper, or we see its value.
  sleepers.fetch_add(1);
  uint32_t now = word.load();
  while (now == value) {
    sleep_while(word, value);
    now = word.load();
  }
  sleepers.fetch_sub(1);
  return now;
}

void announce(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int32_t>& sleepers) {
  word.store(value);
  if (sleepers.load() > 0) wake_all(word);
}

// A job is one word: a number that changes with every job, and how many threads do it. A thread
// that is not among them may miss jobs; those that are cannot, the job waits for them.
struct Pool {
  static constexpr uint32_t kSizeMask = 0xff;

  std::mutex busy;
  int threads = 0;  // beside the caller's
  alignas(64) std::atomic<uint32_t> job{0};
  std::atomic<int32_t> sleepers{0};
  TeamWork work = nullptr;
  void* context = nullptr;
  Meeting* meeting = nullptr;
  alignas(64) std::atomic<uint32_t> unfinished{0};
  std::atomic<int32_t> waiting{0};
  Meeting::Taken taken[Meeting::kLoops * kSizeMask];

  // False where the system gives no more threads; the pool has those that it got.
  bool grow(int wanted) {
    while (threads < wanted) {
      try {
        std::thread(&Pool::serve, this, threads + 1, job.load()).detach();
      } catch (const std::system_error&) {
        return false;
      }
      ++threads;
    }
    return true;
  }

  void serve(int index, uint32_t seen) {
    for (;;) {
      seen = wait_for_change(job, seen, sleepers);
      const int size = static_cast<int>(seen & kSizeMask);
      if (index >= size) continue;
      Team team(*meeting, index, size);
      work(context, team);
      const uint32_t before = unfinished.fetch_sub(1);
      if (before == 1 && waiting.load() > 0) wake_all(unfinished);
    }
  }

  void run(int size, TeamWork given, void* with) {
    Meeting here;
    here.taken = taken;
    for (int i = 0; i < Meeting::kLoops * size; ++i)
      taken[i].pieces.store(0, std::memory_order_relaxed);
    work = given;
    context = with;
    meeting = &here;
    unfinished.store(static_cast<uint32_t>(size - 1));
    const uint32_t number = (job.load(std::memory_order_relaxed) & ~kSizeMask) + kSizeMask + 1;
    announce(job, number | static_cast<uint32_t>(size), sleepers);
    Team team(here, 0, size);
    given(with, team);
    for (uint32_t left = unfinished.load(); left != 0;)
      left = wait_for_change(unfinished, left, waiting);
  }
};

// Never destroyed: its threads wait in it until the process ends. A forked child has none of them,
// and gets a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  Pool* found = pool.load();
  if (found != nullptr) return found;
  Pool* const made = new (std::nothrow) Pool;
  if (made == nullptr || pool.compare_exchange_strong(found, made)) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
    return made;
  }
  delete made;
  return found;
}

}  // namespace

void Team::barrier() {
  if (size_ == 1) return;
  const uint32_t generation = meeting_.generation.load(std::memory_order_relaxed);
  if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    meeting_.arrived.store(0, std::memory_order_relaxed);
    announce(meeting_.generation, generation + 1, meeting_.sleepers);
  } else {
    wait_for_change(meeting_.generation, generation, meeting_.sleepers, &ahead_);
  }
}

void run_team(int threads, TeamWork work, void* context) {
  threads = std::min<int>(threads, Pool::kSizeMask);
  Pool* const found = threads > 1 ? the_pool() : nullptr;
  if (found != nullptr && found->busy.try_lock()) {
    const std::lock_guard<std::mutex> held(found->busy, std::adopt_lock);
    found->grow(threads - 1);
    const int size = std::min(threads, found->threads + 1);
    if (size > 1) {
      found->run(size, work, context);
      return;
    }
  }
  Meeting alone;
  Team team(alone, 0, 1);
  work(context, team);
}
