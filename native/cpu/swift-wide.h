// Products of a quantised matrix with many columns: prompts, for ggml's CPU backend.

#pragma once

#include <cstdint>

struct ggml_compute_params;
struct ggml_tensor;

// As swift_mul_mat, for a product that it takes, of more columns than SWIFT_NARROW_MAX.
bool swift_mul_mat_wide(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block);
