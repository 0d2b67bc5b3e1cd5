// What a pass reads, counted on the graph that llama.cpp would run.

#include "swift-access.h"

#include <algorithm>

namespace {

const ggml_tensor * root(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src : t;
}

bool is_view(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        default: return false;
    }
}

// Graph tensors have no buffer before allocation, so a leaf with one is a weight or part of the cache.
bool is_resident(const ggml_tensor * leaf) { return leaf->buffer != nullptr; }

bool is_weight(const ggml_tensor * leaf) {
    return ggml_backend_buffer_get_usage(leaf->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

uint64_t bytes_of(const ggml_tensor * t) {
    return ggml_row_size(t->type, t->ne[0]) * ggml_nrows(t);
}

// Bytes of `weight` that `node` reads.
uint64_t weight_bytes_read(const ggml_tensor * node, const ggml_tensor * weight) {
    if (node->op == GGML_OP_GET_ROWS) {
        return std::min<uint64_t>(bytes_of(weight), ggml_row_size(weight->type, weight->ne[0]) * ggml_nelements(node->src[1]));
    }
    if (node->op == GGML_OP_MUL_MAT_ID) {
        // [.., .., n_expert] by ids [n_expert_used, n_tokens]: at most this many different experts run
        const int64_t n_expert = weight->ne[2];
        const int64_t n_used   = std::min<int64_t>(n_expert, ggml_nelements(node->src[2]));
        return bytes_of(weight) / n_expert * n_used;
    }
    return bytes_of(weight);
}

// Bytes of the cache that `node` reads through the view `kv` when n_kv positions are filled.
uint64_t kv_bytes_read(const ggml_tensor * kv, int64_t n_kv) {
    const int64_t n_cells = root(kv)->ne[1]; // caches are [n_embd_gqa, n_cells, n_stream]
    return bytes_of(kv) / n_cells * std::min(n_kv, n_cells);
}

swift_gguf_cost count(const llama_context & ctx, ggml_cgraph * graph, int64_t n_kv) {
    // some models scale, cap or bias what the output projection gives
    const ggml_tensor * head = swift_access::logits(ctx);
    while (head != nullptr && head->op != GGML_OP_MUL_MAT) {
        head = head->src[0];
    }

    swift_gguf_cost cost = {};
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_view(node)) {
            continue;
        }
        cost.n_nodes++;

        // a store into the cache names its destination as a source, but does not read it
        const bool is_store = node->op == GGML_OP_SET_ROWS || node->op == GGML_OP_CPY;

        for (const ggml_tensor * src : node->src) {
            if (src == nullptr || !is_resident(root(src))) {
                continue;
            }
            if (is_weight(root(src))) {
                const uint64_t bytes = weight_bytes_read(node, src);
                cost.weight_bytes += bytes;
                if (node == head) {
                    cost.head_bytes += bytes;
                }
            } else if (!is_store) {
                cost.kv_bytes += kv_bytes_read(src, n_kv);
            }
        }
    }
    cost.n_splits = ggml_backend_sched_get_n_splits(ctx.get_sched());
    return cost;
}

// Returns 0 or an error code. graph_reserve may throw (std::bad_alloc, "failed to ...").
int32_t pass_cost(
        llama_context &      ctx,
        swift_subnetwork_ptr subnetwork,
        int32_t              n_tokens,
        int32_t              n_outputs,
        int64_t              n_kv,
        swift_gguf_cost &    cost) {
    try {
        const swift_scope scope(ctx, std::move(subnetwork));
        ggml_cgraph *     graph = swift_access::build(ctx, n_tokens, n_outputs);
        if (graph == nullptr) {
            return SWIFT_GGUF_ERROR_GRAPH;
        }
        cost = count(ctx, graph, n_kv);
        return 0;
    } catch (...) {
        return SWIFT_GGUF_ERROR_GRAPH;
    }
}

bool has_attention(const llama_layer & layer) {
    return layer.wo != nullptr || layer.wq != nullptr || layer.wqkv != nullptr;
}

bool has_ffn(const llama_layer & layer) {
    return layer.ffn_up != nullptr || layer.ffn_down != nullptr || layer.ffn_down_exps != nullptr;
}

} // namespace

int32_t swift_gguf_pass_cost(
        llama_context *               ctx,
        const swift_gguf_subnetwork * subnetwork,
        int32_t                       n_tokens,
        int32_t                       n_outputs,
        int32_t                       n_kv,
        swift_gguf_cost *             cost) {
    if (ctx == nullptr || cost == nullptr || llama_get_memory(ctx) == nullptr || n_kv < 0 ||
        n_tokens < 1 || n_tokens > (int32_t) llama_n_ubatch(ctx) || n_outputs < 1 || n_outputs > n_tokens) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    return pass_cost(*ctx, subnetwork != nullptr ? subnetwork->value : nullptr, n_tokens, n_outputs, n_kv, *cost);
}

int32_t swift_gguf_sublayers(
        llama_context *       ctx,
        swift_gguf_sublayer * attention,
        swift_gguf_sublayer * ffn,
        int32_t               n_layer) try {
    if (ctx == nullptr || attention == nullptr || ffn == nullptr || llama_get_memory(ctx) == nullptr ||
        n_layer != llama_model_n_layer(llama_get_model(ctx))) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const int64_t n_kv = llama_n_ctx(ctx);

    // The whole model, noting which sub-layers go through the shared helpers.
    auto probe    = std::make_shared<swift_subnetwork>();
    probe->visits = std::make_shared<swift_visits>();
    probe->visits->attention.assign(n_layer, false);
    probe->visits->ffn.assign(n_layer, false);

    swift_gguf_cost full = {};
    if (const int32_t error = pass_cost(*ctx, probe, 1, 1, n_kv, full)) {
        return error;
    }

    for (int32_t il = 0; il < n_layer; ++il) {
        const llama_layer & layer = llama_get_model(ctx)->layers[il];
        for (const bool is_attention : { true, false }) {
            swift_gguf_sublayer & out = is_attention ? attention[il] : ffn[il];
            out                       = {};

            if (!(is_attention ? probe->visits->attention : probe->visits->ffn)[il]) {
                const bool exists = is_attention ? has_attention(layer) : has_ffn(layer);
                out.status        = exists ? SWIFT_GGUF_SUBLAYER_UNSHARED : SWIFT_GGUF_SUBLAYER_ABSENT;
                continue;
            }

            auto without = std::make_shared<swift_subnetwork>();
            without->skip_attention.assign(n_layer, false);
            without->ffn_share.assign(n_layer, 1.0f);
            if (is_attention) {
                without->skip_attention[il] = true;
            } else {
                without->ffn_share[il] = 0.0f;
            }

            swift_gguf_cost cost = {};
            if (const int32_t error = pass_cost(*ctx, without, 1, 1, n_kv, cost)) {
                return error;
            }
            out.weight_bytes = full.weight_bytes - std::min(full.weight_bytes, cost.weight_bytes);
            out.kv_bytes     = full.kv_bytes - std::min(full.kv_bytes, cost.kv_bytes);
            out.n_nodes      = full.n_nodes - cost.n_nodes;
            out.status       = out.weight_bytes + out.kv_bytes > 0 ? SWIFT_GGUF_SUBLAYER_OK : SWIFT_GGUF_SUBLAYER_USELESS;
        }
    }
    return 0;
} catch (...) { // std::bad_alloc
    return SWIFT_GGUF_ERROR_GRAPH;
}
