#include "swift-graph.h"

#include "llama-graph.h"
#include "swift-sidecar.h"

#include <algorithm>
#include <cmath>

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

// The sub-network of the pass being built, or nullptr: the whole model.
static const swift_subnetwork * subnetwork_of(const llm_graph_context & graph) {
    return graph.res->t_inp_embd != nullptr ? graph.cparams.swift_subnetwork.get() : nullptr;
}

static void note(std::vector<bool> & seen, int il) {
    if (il >= 0 && il < (int) seen.size()) {
        seen[il] = true;
    }
}

ggml_tensor * swift_skip_attention(
        const llm_graph_context & graph,
        const ggml_tensor *       wo,
        const ggml_tensor *       q_cur,
        const ggml_tensor *       v_cur,
        const ggml_tensor *       v_mla,
        int                       il) {
    const swift_subnetwork * subnetwork = subnetwork_of(graph);
    if (subnetwork == nullptr) {
        return nullptr;
    }
    if (subnetwork->visits) {
        note(subnetwork->visits->attention, il);
    }
    if (!subnetwork->skips_attention(il)) {
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
    const swift_subnetwork * subnetwork = subnetwork_of(graph);
    if (subnetwork == nullptr) {
        return nullptr;
    }
    if (subnetwork->visits) {
        note(subnetwork->visits->ffn, il);
    }
    return subnetwork->share(il) > 0.0f ? nullptr : zeros(graph, down->ne[1], cur->ne[1]);
}

void swift_narrow_ffn(
        const llm_graph_context & graph,
        ggml_tensor *&            up,
        ggml_tensor *&            up_b,
        ggml_tensor *&            gate,
        ggml_tensor *&            gate_b,
        ggml_tensor *&            down,
        ggml_tensor *&            down_b,
        int                       il) {
    const swift_subnetwork * subnetwork = subnetwork_of(graph);
    if (subnetwork == nullptr || !subnetwork->sidecar || subnetwork->share(il) >= 1.0f) {
        return;
    }
    const auto found = subnetwork->sidecar->ffns.find(down);
    if (found != subnetwork->sidecar->ffns.end()) {
        up     = found->second.up;
        up_b   = found->second.up_b;
        gate   = found->second.gate;
        gate_b = found->second.gate_b;
        down   = found->second.down;
        down_b = found->second.down_b;
    }
}

ggml_tensor * swift_draft_weight(const llm_graph_context & graph, ggml_tensor * w) {
    const swift_subnetwork * subnetwork = subnetwork_of(graph);
    if (subnetwork == nullptr || !subnetwork->sidecar) {
        return w;
    }
    const auto found = subnetwork->sidecar->copies.find(w);
    return found != subnetwork->sidecar->copies.end() && subnetwork->share(found->second.il) < 1.0f ? found->second.weight : w;
}

int64_t swift_n_experts(const llm_graph_context & graph, int64_t n_used, int il) {
    const swift_subnetwork * subnetwork = subnetwork_of(graph);
    if (subnetwork == nullptr || subnetwork->share(il) >= 1.0f) {
        return n_used;
    }
    return std::max<int64_t>(1, std::llround(subnetwork->share(il) * (double) n_used));
}

ggml_tensor * swift_draft_logits(const llm_graph_context & graph, const ggml_tensor * w, ggml_tensor * cur) {
    const swift_subnetwork * subnetwork = subnetwork_of(graph);
    if (subnetwork == nullptr || !subnetwork->draft_head || !subnetwork->sidecar || w != subnetwork->sidecar->output || w == nullptr) {
        return nullptr;
    }
    const swift_sidecar & sidecar = *subnetwork->sidecar;
    ggml_context *        ctx     = graph.ctx0;
    const int64_t         n_vocab = sidecar.floor->ne[0], n_rows = cur->ne[1];

    ggml_tensor * logits = ggml_mul_mat(ctx, sidecar.head, cur);
    logits               = ggml_reshape_3d(ctx, logits, 1, sidecar.head->ne[1], n_rows);
    ggml_tensor * all    = ggml_repeat_4d(ctx, sidecar.floor, n_vocab, n_rows, 1, 1);
    all                  = ggml_set_rows(ctx, ggml_reshape_3d(ctx, all, 1, n_vocab, n_rows), logits, sidecar.head_ids);
    return ggml_reshape_2d(ctx, all, n_vocab, n_rows);
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
