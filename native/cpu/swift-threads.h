// How the threads of a pass wait for each other, and the pools they come from, for ggml's CPU backend.

#pragma once

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_threadpool;

// Waits while *value is `seen`: spins first, then sleeps. Whoever changes the value calls swift_wake afterwards.
void swift_wait_while(const int * value, int seen);
void swift_wake(const int * value);

// Spins for a while, at most until is_ready(state).
void swift_poll(bool (*is_ready)(void * state), void * state);

// The calling thread's own pool, of at least so many threads. It lives as long as the thread.
struct ggml_threadpool * swift_threadpool(int n_threads);

#ifdef __cplusplus
}
#endif
