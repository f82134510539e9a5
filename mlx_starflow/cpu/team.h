// Threads that take the pieces of one task after another.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace starflow {

inline void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// None waits for one that has not begun: where there is no CPU for a helper, the caller does everything itself.
class Team {
  public:
    void grow(int threads) {
        for (; helpers < threads - 1; helpers++) std::thread([this] { help(); }).detach();
    }

    // One caller at a time has the helpers; another does without.
    class Turn {
      public:
        explicit Turn(Team& team) : team(team), mine(team.owner.try_lock()) {}
        ~Turn() {
            if (mine) team.owner.unlock();
        }

        // work(i) for each i below `pieces`, in no order.
        template <typename Work>
        void all(int pieces, Work&& work) {
            if (!mine || !team.helpers || pieces < 2)
                for (int i = 0; i < pieces; i++) work(i);
            else
                team.share(pieces, work);
        }

      private:
        Team& team;
        const bool mine;
    };

  private:
    static constexpr uint64_t COUNT = 1 << 20;
    static constexpr int PATIENCE = 4000;  // looks for more work before a helper sleeps: some 200 microseconds

    // A task's number, how many pieces it has, and the next of them, in one word: who takes a piece knows whose it is.
    static uint64_t task(uint64_t word) { return word / (COUNT * COUNT); }
    static int pieces(uint64_t word) { return word / COUNT % COUNT; }
    static int next(uint64_t word) { return word % COUNT; }

    template <typename Work>
    void share(int count, Work& work) {
        call = [](void* with, int i) { (*static_cast<Work*>(with))(i); };
        argument = &work;
        done.store(0, std::memory_order_relaxed);
        state.store((task(state.load()) + 1) * COUNT * COUNT + count * COUNT);
        tasks.fetch_add(1);
        if (asleep.load()) tasks.notify_all();
        take();
        while (done.load(std::memory_order_acquire) < count) rest();
    }

    // Pieces are taken only of a task that has some left; it does not end before they are done.
    void take() {
        for (;;) {
            uint64_t word = state.load();
            if (next(word) >= pieces(word)) return;
            word = state.fetch_add(1);
            if (next(word) >= pieces(word)) return;
            call(argument, next(word));
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void help() {
        for (uint32_t seen = tasks.load();;) {
            for (int looks = 0; tasks.load() == seen && looks < PATIENCE; looks++) rest();
            if (tasks.load() == seen) {
                asleep++;
                tasks.wait(seen);
                asleep--;
            }
            seen = tasks.load();
            take();
        }
    }

    std::mutex owner;
    int helpers = 0;
    void (*call)(void*, int) = nullptr;
    void* argument = nullptr;
    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<int> done{0};
    alignas(64) std::atomic<uint32_t> tasks{0};
    std::atomic<int> asleep{0};
};

}  // namespace starflow
