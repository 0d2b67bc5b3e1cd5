// Products of a matrix with any number of columns, in the same arithmetic, for ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// Computes the product, if there is a kernel for its types, with params->use_ref or params->swift_prompts. Every thread
// of the pool calls it. Returns false if nothing was done; then no thread has waited for another.
//
// n_interleaved, n_block: how many rows ggml's repacking interleaves, and how many bytes of each at a time;
// 1, 1 for a matrix that is not repacked.
bool swift_mul_mat(
        const struct ggml_compute_params * params, struct ggml_tensor * dst,
        int64_t n_interleaved, int64_t n_block);

#ifdef __cplusplus
}
#endif
