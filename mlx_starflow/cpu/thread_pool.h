// A thread pool whose workers take the pieces of one task after another.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace starflow {

// What a thread does between two looks at a variable that it waits for.
inline void yield() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The caller works too, and never waits for a worker that has not begun: where there is no CPU for a worker, the caller
// does everything itself.
class ThreadPool {
  public:
    void grow(int threads) {
        for (; workers < threads - 1; workers++) std::thread([this] { work(); }).detach();
    }

    // One caller at a time claims the workers; another does without.
    class Claim {
      public:
        explicit Claim(ThreadPool& pool) : pool(pool), granted(pool.claimed.try_lock()) {}
        ~Claim() {
            if (granted) pool.claimed.unlock();
        }

        // function(i) for each i below `pieces`, in no order.
        template <typename Function>
        void parallel_for(int pieces, Function&& function) {
            if (!granted || !pool.workers || pieces < 2)
                for (int i = 0; i < pieces; i++) function(i);
            else
                pool.run(pieces, function);
        }

      private:
        ThreadPool& pool;
        const bool granted;
    };

  private:
    static constexpr uint64_t COUNT = 1 << 20;
    static constexpr int SPIN_COUNT = 4000;  // looks for more work before a worker sleeps: some 200 microseconds

    // A task's number, how many pieces it has, and the next of them, in one word: who takes a piece knows whose it is.
    static uint64_t task(uint64_t word) { return word / (COUNT * COUNT); }
    static int pieces(uint64_t word) { return word / COUNT % COUNT; }
    static int next(uint64_t word) { return word % COUNT; }

    template <typename Function>
    void run(int count, Function& function) {
        call = [](void* with, int i) { (*static_cast<Function*>(with))(i); };
        argument = &function;
        done.store(0, std::memory_order_relaxed);
        state.store((task(state.load()) + 1) * COUNT * COUNT + count * COUNT);
        tasks.fetch_add(1);
        if (asleep.load()) tasks.notify_all();
        take_pieces();
        while (done.load(std::memory_order_acquire) < count) yield();
    }

    // Pieces are taken only of a task that has some left; it does not end before they are done.
    void take_pieces() {
        for (;;) {
            uint64_t word = state.load();
            if (next(word) >= pieces(word)) return;
            word = state.fetch_add(1);
            if (next(word) >= pieces(word)) return;
            call(argument, next(word));
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void work() {
        for (uint32_t seen = tasks.load();;) {
            for (int spins = 0; tasks.load() == seen && spins < SPIN_COUNT; spins++) yield();
            if (tasks.load() == seen) {
                asleep++;
                tasks.wait(seen);
                asleep--;
            }
            seen = tasks.load();
            take_pieces();
        }
    }

    std::mutex claimed;
    int workers = 0;
    void (*call)(void*, int) = nullptr;
    void* argument = nullptr;
    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<int> done{0};
    alignas(64) std::atomic<uint32_t> tasks{0};
    std::atomic<int> asleep{0};
};

}  // namespace starflow
