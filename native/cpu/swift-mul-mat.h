// Products of a quantised matrix with a few columns at once, for ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// A pending token and 64 draft tokens fit. Wider passes are prefill, for which ggml has better kernels.
#define SWIFT_NARROW_MAX 72

// Computes the product in batch-invariant mode (params->use_ref), if its types are known here; called
// by every thread of the pool. False: nothing was done, and no thread was waited for.
//
// n_interleaved, n_block: rows that ggml's repacking interleaves, and bytes of each at a time; 1, 1
// where the matrix is not repacked.
bool swift_mul_mat(
        const struct ggml_compute_params * params, struct ggml_tensor * dst,
        int64_t n_interleaved, int64_t n_block);

#ifdef __cplusplus
}
#endif
