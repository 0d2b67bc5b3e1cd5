// A pass has hundreds of barriers, one after every operation. ggml's threads spin there without end, libgomp's
// for some 15 ms. Spinning is the fastest way to wait while every thread has a core of its own. It is the slowest
// when another program wants a core: the spinning thread burns the time slice that the late thread needs. Beside
// two busy programs on two cores a pass takes a hundred times as long.
//
// Here threads spin while nobody is late. When one was late, all sleep at every barrier for a while. A thread that
// sleeps gives up its core at once. When it is woken it gets a core at once, because it has used less time than a
// program that never sleeps. Afterwards the threads spin again, to see whether the machine is still busy.

#include "swift-threads.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#    include <linux/futex.h>
#    include <sys/syscall.h>
#endif
#if !defined(_WIN32)
#    include <unistd.h>
#endif
#if defined(__x86_64__)
#    include <immintrin.h>
#endif

namespace {

// Threads that all run nearly always meet within this time. A thread that has lost its core is away for a time
// slice, 3 ms. After long work, as with prompts, threads arrive further apart: then half of the time that the
// waiting thread has worked is not late yet.
constexpr int64_t LATE_NS = 1'000'000;
// How long all sleep after one was late; doubled each time it happens again.
constexpr int64_t SLEEPY_MIN_NS = 4'000'000;
constexpr int64_t SLEEPY_MAX_NS = 128'000'000;
// Between two graphs the caller samples and drafts. A thread that sleeps meanwhile has to be woken and starts late.
constexpr int64_t POLL_NS = 2'000'000;

std::atomic<int>     n_sleeping { 0 };
std::atomic<int64_t> sleepy_until_ns { 0 }; // 0: nobody was late
std::atomic<int64_t> sleepy_for_ns { 0 };
thread_local int64_t left_ns = 0; // when this thread left its latest barrier
std::atomic<int64_t> last_late_ns { 0 };

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

void be_sleepy(int64_t now) {
    const int64_t before = sleepy_for_ns.load(std::memory_order_relaxed);
    const bool    again  = now - last_late_ns.load(std::memory_order_relaxed) < 2 * before;
    const int64_t length = again ? std::min(2 * before, SLEEPY_MAX_NS) : SLEEPY_MIN_NS;
    last_late_ns.store(now, std::memory_order_relaxed);
    sleepy_for_ns.store(length, std::memory_order_relaxed);
    sleepy_until_ns.store(now + length, std::memory_order_relaxed);
}

bool is_sleepy() {
    const int64_t until = sleepy_until_ns.load(std::memory_order_relaxed);
    if (until == 0) { // on a quiet machine nobody looks at the clock
        return false;
    }
    if (now_ns() < until) {
        return true;
    }
    sleepy_until_ns.store(0, std::memory_order_relaxed);
    return false;
}

// Spins until is_over(), for `limit_ns` at most. Returns whether it is over.
template <typename F>
bool spin(int64_t limit_ns, F is_over) {
    int64_t began = 0;
    for (int i = 1; !is_over(); i++) {
        relax();
        if (i % 32 == 0) { // a pause takes between 1 and 50 ns, a look at the clock 30
            const int64_t now = now_ns();
            began             = began ? began : now;
            if (now - began >= limit_ns) {
                return is_over();
            }
        }
    }
    return true;
}

// May return early.
void sleep_while(const int * value, int seen) {
#if defined(__linux__)
    // Nobody is missed: whoever changes the value looks for sleepers afterwards, and the kernel checks the value before
    // it lets us sleep.
    n_sleeping.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    n_sleeping.fetch_sub(1, std::memory_order_seq_cst);
#else
    (void) value;
    (void) seen;
    std::this_thread::yield();
#endif
}

int64_t this_process() {
#if defined(_WIN32)
    return 0;
#else
    return getpid();
#endif
}

struct own_pool {
    ggml_threadpool * pool      = nullptr;
    int               n_threads = 0;
    int64_t           process   = 0;

    // A forked process has the memory of the threads, but not the threads: nobody could join them.
    bool is_ours() const { return pool != nullptr && process == this_process(); }

    void renew(int n) {
        free();
        ggml_threadpool_params params = ggml_threadpool_params_default(n);
        pool                          = ggml_threadpool_new(&params);
        n_threads                     = n;
        process                       = this_process();
    }

    void free() {
        if (is_ours()) {
            ggml_threadpool_free(pool);
        }
        pool = nullptr;
    }

    ~own_pool() { free(); }
};

} // namespace

void swift_wait_while(const int * value, int seen) {
    const auto is_over = [=] { return __atomic_load_n(value, __ATOMIC_RELAXED) != seen; };
    if (!is_sleepy()) {
        const int64_t worked = now_ns() - left_ns;
        if (!spin(std::max(LATE_NS, worked / 2), is_over)) {
            be_sleepy(now_ns());
        }
    }
    while (!is_over()) {
        sleep_while(value, seen);
    }
    left_ns = now_ns();
}

void swift_wake(const int * value) {
    left_ns = now_ns(); // the last one to come does not wait
#if defined(__linux__)
    if (n_sleeping.load(std::memory_order_seq_cst) > 0) {
        syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
#else
    (void) value;
#endif
}

void swift_poll(bool (*is_ready)(void *), void * state) {
    if (!is_sleepy()) {
        spin(POLL_NS, [=] { return is_ready(state); });
    }
}

ggml_threadpool * swift_threadpool(int n_threads) {
    thread_local own_pool mine;
    if (!mine.is_ours() || mine.n_threads < n_threads) {
        mine.renew(n_threads);
    }
    return mine.pool;
}
