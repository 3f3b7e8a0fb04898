// Threads that walk through a plan side by side. They wait by looking, because the next piece of work is
// microseconds away; when nothing comes for a while they sleep.

#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lexmill::engine {

inline void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
        for (int number = 1; number < threads_; ++number) workers_.emplace_back([this, number] { wait(number); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stop_ = true;
            turn_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    // `work(number)` in every thread; back when all are done.
    template <class Work>
    void run(Work& work) {
        call_ = [](void* data, int number) { (*static_cast<Work*>(data))(number); };
        data_ = &work;
        {
            std::lock_guard<std::mutex> hold(mutex_);
            turn_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load()) wake_.notify_all();
        work(0);
        meet();
    }

    // All threads come here before any goes on.
    void meet() {
        if (threads_ == 1) return;
        const unsigned round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) {
            breathe();
            if (looks > kLooks) std::this_thread::yield();  // more threads than processors
        }
    }

  private:
    static constexpr int kLooks = 4000;

    void wait(int number) {
        unsigned seen = 0;
        for (;;) {
            for (int looks = 0; turn_.load(std::memory_order_acquire) == seen; ++looks) {
                breathe();
                if (looks < kLooks) continue;
                std::unique_lock<std::mutex> hold(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(hold, [&] { return turn_.load(std::memory_order_acquire) != seen; });
                sleeping_.fetch_sub(1);
            }
            ++seen;
            if (stop_) return;
            call_(data_, number);
            meet();
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stop_ = false;
    void (*call_)(void*, int) = nullptr;
    void* data_ = nullptr;
    alignas(64) std::atomic<unsigned> turn_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace lexmill::engine
