// Attention over the KV cache, for ggml's CPU backend.

#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// Computes GGML_OP_FLASH_ATTN_EXT in batch-invariant mode (params->use_ref): a token's row has the same bits
// whatever other tokens are in the batch and wherever the cells lie, as long as their order stays. Every thread of
// the pool calls it. Returns false if nothing was done; then no thread has waited for another.
bool swift_attention(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Is there a kernel for this processor?
bool swift_has_kernels(void);

// Bytes of the work buffer that it needs.
size_t swift_attention_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}
#endif
