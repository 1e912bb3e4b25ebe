// Threads that run one function together, with barriers inside: the caller is one of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace weft {

// How long a thread that has nothing to do looks for work before it sleeps: neighbours need the core too.
inline constexpr std::chrono::microseconds SPIN{50};

inline void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `word` is no longer `old`: first by looking, then asleep.
inline void wait_while(const std::atomic<uint32_t>& word, uint32_t old) {
    const auto until = std::chrono::steady_clock::now() + SPIN;
    for (int turn = 1; word.load(std::memory_order_acquire) == old; turn++) {
        if (turn % 64 == 0 && std::chrono::steady_clock::now() > until) {
            word.wait(old, std::memory_order_acquire);
            return;
        }
        pause_core();
    }
}

// Scratch begins with a line of the cache: vectors that lie across two of them are read at half the speed, which is 8 % of a step of
// 32 rows.
struct alignas(LINE_BYTES) Line {
    static constexpr int64_t WORDS = LINE_BYTES / 4;
    float words[WORDS];
};
static_assert(SCRATCH % Line::WORDS == 0 && INPUTS_SCRATCH % Line::WORDS == 0 && SUMS_SCRATCH % Line::WORDS == 0);

class Pool {
  public:
    explicit Pool(int threads)
        : count_(threads < 1 ? 1 : threads), scratch_(static_cast<size_t>(SCRATCH / Line::WORDS * count_)),
          shared_(new Line[SHARED / Line::WORDS]) {
        for (int i = 1; i < count_; i++) helpers_.emplace_back([this, i] { help(i); });
    }
    ~Pool() {
        ending_ = true;
        begin();
        for (auto& helper : helpers_) helper.join();
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int count() const { return count_; }

    // Every thread calls `job` with its share; returns when all have.  One caller at a time.
    template <class Job>
    void run(const Job& job) {
        if (count_ == 1) {
            job(share(0));
            return;
        }
        context_ = &job;
        call_ = [](const void* context, Share share) { (*static_cast<const Job*>(context))(share); };
        begin();
        job(share(0));
        meet();
    }

    // Gives each thread SHARED words of its own, which `alone` needs; while no job runs.
    void part() {
        if (!own_) own_.reset(new Line[static_cast<size_t>(SHARED / Line::WORDS * count_)]);
    }
    // Inside a job: the share of a thread that does something by itself, between two meetings.
    Share alone(int index) {
        Share mine = share(index);
        mine.index = 0, mine.count = 1, mine.shared = reinterpret_cast<int32_t*>(own_.get() + SHARED / Line::WORDS * index);
        return mine;
    }

    // Inside a job: nobody goes on before everybody has come.
    void meet() {
        if (count_ == 1) return;
        const uint32_t turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(count_)) {
            arrived_.store(0, std::memory_order_relaxed);
            taken_.store(0, std::memory_order_relaxed);
            // Not merely released: the library asks next whether anybody sleeps, and a processor that did so before others saw the
            // new turn would leave one asleep for good.
            turn_.store(turn + 1, std::memory_order_seq_cst);
            turn_.notify_all();
        } else {
            wait_while(turn_, turn);
        }
    }

  private:
    Share share(int index) {
        return Share{index, count_, scratch_[static_cast<size_t>(SCRATCH / Line::WORDS * index)].words,
                     reinterpret_cast<int32_t*>(shared_.get()), this,
                     [](void* pool) { static_cast<Pool*>(pool)->meet(); },
                     [](void* pool, int64_t units, int64_t& first, int64_t& stop) {
                         return static_cast<Pool*>(pool)->take(units, first, stop);
                     }};
    }
    // The next of `units` that nobody has taken since the last meeting, if any: a share of what is left.
    bool take(int64_t units, int64_t& first, int64_t& stop) {
        first = taken_.load(std::memory_order_relaxed);
        do {
            if (first >= units) return false;
            stop = first + std::max<int64_t>((units - first) / (2 * count_), 1);
        } while (!taken_.compare_exchange_weak(first, stop, std::memory_order_relaxed));
        return true;
    }
    void begin() {
        begun_.fetch_add(1, std::memory_order_seq_cst);  // as in `meet`
        begun_.notify_all();
    }
    void help(int index) {
        for (uint32_t seen = 0;; seen++) {
            wait_while(begun_, seen);
            if (ending_) return;
            call_(context_, share(index));
            meet();
        }
    }

    int count_;
    std::vector<Line> scratch_;
    std::unique_ptr<Line[]> shared_, own_;  // memory that nobody writes to is no memory yet
    const void* context_ = nullptr;
    void (*call_)(const void*, Share) = nullptr;
    std::atomic<uint32_t> begun_{0}, arrived_{0}, turn_{0};
    std::atomic<bool> ending_{false};
    std::atomic<int64_t> taken_{0};  // units of what is computed since the last meeting
    std::vector<std::thread> helpers_;
};

}  // namespace weft
