// The functions that the patch calls from llama.cpp's graph build.

#pragma once

#include "swift-subnetwork.h"

struct ggml_tensor;
struct llm_graph_context;

// Each returns what the sub-layer contributes to the residual stream when the pass leaves it out (a
// tensor of zeros, shaped like the real result), or nullptr when the sub-layer is to be built.
ggml_tensor * swift_skip_attention(
        const llm_graph_context & graph,
        const ggml_tensor *       wo,    // output projection, or nullptr if the caller applies it later
        const ggml_tensor *       q_cur, // [n_embd_head_k, n_head, n_tokens]
        const ggml_tensor *       v_cur, // [n_embd_head_v, n_head_kv, n_tokens], or nullptr (KV of another layer)
        const ggml_tensor *       v_mla,
        int                       il);

ggml_tensor * swift_skip_ffn(
        const llm_graph_context & graph,
        const ggml_tensor *       cur,  // [n_embd, n_tokens or n_outputs]
        const ggml_tensor *       down, // down projection: [n_ff, n_embd] or [n_ff, n_embd, n_expert]
        int                       il);

// Replaces an FFN's tensors by the sidecar's where the pass runs that FFN narrower.
void swift_narrow_ffn(
        const llm_graph_context & graph,
        ggml_tensor *&            up,
        ggml_tensor *&            up_b,
        ggml_tensor *&            gate,
        ggml_tensor *&            gate_b,
        ggml_tensor *&            down,
        ggml_tensor *&            down_b,
        int                       il);

// The sidecar's smaller copy of a matrix of attention, where the pass narrows that layer; else `w`.
ggml_tensor * swift_draft_weight(const llm_graph_context & graph, ggml_tensor * w);

// How many experts a token of this pass runs, where the model has it run `n_used`: at least one.
int64_t swift_n_experts(const llm_graph_context & graph, int64_t n_used, int il);

// The logits of a pass with a draft head: [n_vocab, n_outputs], -inf for tokens that the head leaves out. nullptr
// where `w` is not the output projection or the pass has no draft head.
ggml_tensor * swift_draft_logits(const llm_graph_context & graph, const ggml_tensor * w, ggml_tensor * cur);

// Adds each input tensor that no sub-layer uses any more to the graph as a leaf.
// llama.cpp writes all inputs before a pass (llm_graph_result::set_inputs) and aborts on one that
// was never allocated, such as the attention mask of a pass without attention.
void swift_keep_inputs(const llm_graph_context & graph);
