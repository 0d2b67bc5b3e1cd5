// Weights derived from a model for its draft passes (swift-gguf prepare): FFNs of fewer neurons, an
// output head over fewer tokens, attention in fewer bits.

#pragma once

#include "ggml-cpp.h"
#include "llama-mmap.h"

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

// They replace the tensors of a whole FFN; null where the FFN has none.
struct swift_narrow_tensors {
    ggml_tensor * up     = nullptr; // [n_embd, n_narrow], or twice as many rows where the gate is in it
    ggml_tensor * up_b   = nullptr;
    ggml_tensor * gate   = nullptr; // [n_embd, n_narrow]
    ggml_tensor * gate_b = nullptr; // holds the gates of a low-rank path open (swift_gguf/prepare/low_rank.py)
    ggml_tensor * down   = nullptr; // [n_narrow, n_embd]
    ggml_tensor * down_b = nullptr; // [n_embd], what the dropped neurons add on average
};

// It replaces a matrix of attention: the same in fewer bits.
struct swift_smaller_copy {
    ggml_tensor * weight;
    int           il; // used where the FFN of this layer is narrower, too
};

// Immutable once loaded. Belongs to one model, whose tensors it refers to.
struct swift_sidecar {
    std::unordered_map<const ggml_tensor *, swift_narrow_tensors> ffns;   // by the whole down projection
    std::unordered_map<const ggml_tensor *, swift_smaller_copy>   copies; // by the model's own

    const ggml_tensor * output   = nullptr; // the model's output projection, if there is a draft head
    ggml_tensor *       head     = nullptr; // [n_embd, n_head]: some of its rows
    ggml_tensor *       head_ids = nullptr; // I32 [n_head]: which
    ggml_tensor *       floor    = nullptr; // F32 [n_vocab]: -inf, the logits of all other tokens

    uint64_t n_bytes = 0;

    // what holds the tensors; buffers may lie in the mapping
    std::unique_ptr<llama_mmap>          mapping;
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;
};
