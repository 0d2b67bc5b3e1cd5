// Products of a quantised matrix with a few columns at once, for ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// A pending token and 64 draft tokens fit. Up to this width each row of a batch has the bits that it has alone;
// wider batches are prompts, whose products and attention have kernels of their own.
#define SWIFT_NARROW_MAX 72

#define swift_is_narrow(params, n_columns) ((params)->use_ref && (n_columns) <= SWIFT_NARROW_MAX)

// Computes the product in batch-invariant mode (params->use_ref), if there is a kernel for its types. Every
// thread of the pool calls it. Returns false if nothing was done; then no thread has waited for another.
//
// n_interleaved, n_block: how many rows ggml's repacking interleaves, and how many bytes of each at a time;
// 1, 1 for a matrix that is not repacked.
bool swift_mul_mat(
        const struct ggml_compute_params * params, struct ggml_tensor * dst,
        int64_t n_interleaved, int64_t n_block);

#ifdef __cplusplus
}
#endif
