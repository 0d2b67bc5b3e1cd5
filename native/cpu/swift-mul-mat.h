// Products of a quantised matrix with a few columns at once, for ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// Room for a token and 64 draft tokens. Wider passes process prompts, which have kernels of their own.
#define SWIFT_NARROW_MAX 72

// Computes the product, if there is a kernel for its types: in batch-invariant mode (params->use_ref) up to
// SWIFT_NARROW_MAX columns, with params->swift_prompts more than that. Every thread of the pool calls it. Returns false if nothing was done; then no thread has waited for another.
//
// n_interleaved, n_block: how many rows ggml's repacking interleaves, and how many bytes of each at a time;
// 1, 1 for a matrix that is not repacked.
bool swift_mul_mat(
        const struct ggml_compute_params * params, struct ggml_tensor * dst,
        int64_t n_interleaved, int64_t n_block);

#ifdef __cplusplus
}
#endif
