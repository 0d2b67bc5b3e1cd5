// Products of a matrix with any number of columns, in the same arithmetic, for ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// Computes the product in batch-invariant mode (params->use_ref), if there is a kernel for its types. Every thread of
// the pool calls it. Returns false if nothing was done; then no thread has waited for another.
//
// n_interleaved, n_block: how many rows ggml's repacking interleaves, and how many bytes of each at a time;
// 1, 1 for a matrix that is not repacked.
bool swift_mul_mat(
        const struct ggml_compute_params * params, struct ggml_tensor * dst,
        int64_t n_interleaved, int64_t n_block);

// The same for GGML_OP_MUL_MAT_ID: each column with the matrices of the experts that were chosen for it.
bool swift_mul_mat_id(
        const struct ggml_compute_params * params, struct ggml_tensor * dst,
        int64_t n_interleaved, int64_t n_block);

// Where there is no kernel, a prompt takes ggml's fast way, which depends on its width, and a verification the one that
// does not. No verification is wider than this: a token and 64 draft tokens have room.
static const int64_t SWIFT_NARROW_MAX = 72;

#ifdef __cplusplus
}
#endif
