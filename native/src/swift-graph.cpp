#include "swift-graph.h"

#include "llama-graph.h"

// Zeros of shape [ne0, ne1].
//
// All skipped sub-layers of a graph share one tensor, made from the input embedding: a fresh leaf
// would have no backend (ggml-alloc aborts), and anything made from the sub-layer's own input would
// keep the projections alive that the skip is meant to spare. `ggml_scale` exists on every backend.
static ggml_tensor * zeros(const llm_graph_context & graph, int64_t ne0, int64_t ne1) {
    ggml_context * ctx = graph.ctx0;

    if (graph.swift_zero == nullptr) {
        // models with extra embedding channels ("deepstack") hand on a strided view of the input
        ggml_tensor * embd = graph.res->t_inp_embd;
        if (!ggml_is_contiguous(embd)) {
            embd = ggml_cont(ctx, embd);
        }
        graph.swift_zero = ggml_scale(ctx, embd, 0.0f);
        ggml_set_name(graph.swift_zero, "swift_zero");
    }
    ggml_tensor * zero = graph.swift_zero;

    if (zero->ne[0] == ne0 && ggml_nrows(zero) == ne1) {
        return zero;
    }
    if (ne0 * ne1 <= ggml_nelements(zero)) {
        return ggml_view_2d(ctx, zero, ne0, ne1, ne0 * ggml_element_size(zero), 0);
    }
    // e.g. heads wider than the embedding, in a model that projects after gating
    ggml_tensor * one = ggml_view_2d(ctx, zero, 1, 1, ggml_element_size(zero), 0);
    return ggml_repeat_4d(ctx, one, ne0, ne1, 1, 1);
}

// Is this sub-layer left out of the pass being built?
static bool skipped(const llm_graph_context & graph, swift_sublayer kind, int il) {
    const swift_subnetwork * subnetwork = graph.cparams.swift_subnetwork.get();
    if (subnetwork == nullptr || graph.res->t_inp_embd == nullptr) {
        return false;
    }
    if (subnetwork->visits && il >= 0) {
        auto & seen = kind == swift_sublayer::attention ? subnetwork->visits->attention : subnetwork->visits->ffn;
        if (il < (int) seen.size()) {
            seen[il] = true;
        }
    }
    return subnetwork->skips(kind, il);
}

ggml_tensor * swift_skip_attention(
        const llm_graph_context & graph,
        const ggml_tensor *       wo,
        const ggml_tensor *       q_cur,
        const ggml_tensor *       v_cur,
        const ggml_tensor *       v_mla,
        int                       il) {
    if (!skipped(graph, swift_sublayer::attention, il)) {
        return nullptr;
    }
    if (wo != nullptr) {
        return zeros(graph, wo->ne[1], graph.n_tokens);
    }
    int64_t n_embd_head_v = 0;
    if (v_mla != nullptr) {
        n_embd_head_v = v_mla->ne[1];
    } else if (v_cur != nullptr) {
        n_embd_head_v = v_cur->ne[0];
    } else {
        n_embd_head_v = graph.hparams.n_embd_head_v(il);
    }
    return zeros(graph, n_embd_head_v * q_cur->ne[1], graph.n_tokens);
}

ggml_tensor * swift_skip_ffn(
        const llm_graph_context & graph,
        const ggml_tensor *       cur,
        const ggml_tensor *       down,
        int                       il) {
    // Without a down projection the width of the result depends on the activation; such an FFN runs.
    // So does one over a stack of streams (ne[2] > 1), whose shape the caller relies on.
    if (down == nullptr || cur->ne[2] != 1 || cur->ne[3] != 1) {
        return nullptr;
    }
    return skipped(graph, swift_sublayer::ffn, il) ? zeros(graph, down->ne[1], cur->ne[1]) : nullptr;
}

void swift_keep_inputs(const llm_graph_context & graph) {
    if (!graph.cparams.swift_subnetwork) {
        return;
    }
    for (ggml_tensor * t = ggml_get_first_tensor(graph.ctx0); t != nullptr; t = ggml_get_next_tensor(graph.ctx0, t)) {
        if (t->op == GGML_OP_NONE && t->view_src == nullptr && (t->flags & GGML_TENSOR_FLAG_INPUT)) {
            ggml_build_forward_expand(graph.gf, t);
        }
    }
}
