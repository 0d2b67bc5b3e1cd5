// The only access to llama_context's private parts; the patch makes this struct its friend.

#pragma once

#include "swift_gguf.h"
#include "swift-subnetwork.h"

#include "llama-context.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <cstdio>

struct swift_gguf_subnetwork {
    swift_subnetwork_ptr value;
};

struct swift_gguf_sidecar {
    std::shared_ptr<const swift_sidecar> value;
};

struct swift_access {
    static swift_subnetwork_ptr & subnetwork(llama_context & ctx) {
        return ctx.cparams.swift_subnetwork;
    }

    static ggml_backend_t cpu(const llama_context & ctx) {
        return ctx.backend_cpu;
    }

    static size_t n_devices(const llama_context & ctx) {
        return ctx.get_model().n_devices();
    }

    // The graph of a pass over one sequence with a full cache, split over the backends but neither
    // allocated nor computed. Valid until the next graph of the context. May throw.
    static ggml_cgraph * build(llama_context & ctx, uint32_t n_tokens, uint32_t n_outputs) {
        ctx.synchronize();
        ctx.sched_reserve();
        const llama_memory_context_ptr memory = ctx.memory->init_full();
        return ctx.graph_reserve(n_tokens, 1, n_outputs, memory.get(), /*split_only=*/true);
    }

    // The scheduler hears of it when a graph is built anew, or at once from here.
    static void watch(llama_context & ctx, ggml_backend_sched_eval_callback callback, void * data) {
        ctx.synchronize();
        ctx.cparams.cb_eval           = callback;
        ctx.cparams.cb_eval_user_data = data;
        ggml_backend_sched_set_eval_callback(ctx.get_sched(), callback, data);
    }

    static const ggml_tensor * logits(const llama_context & ctx) {
        return ctx.get_gf_res_reserve()->get_logits();
    }
};

// Sets a sub-network for the lifetime of a scope, however the scope is left.
class swift_scope {
public:
    swift_scope(llama_context & ctx, swift_subnetwork_ptr subnetwork) :
        current(swift_access::subnetwork(ctx)), previous(current) {
        current = std::move(subnetwork);
    }
    ~swift_scope() { current = std::move(previous); }

    swift_scope(const swift_scope &)             = delete;
    swift_scope & operator=(const swift_scope &) = delete;

private:
    swift_subnetwork_ptr & current;
    swift_subnetwork_ptr   previous;
};

// For functions that return NULL and write the reason to the caller's buffer.
inline std::nullptr_t swift_refuse(char * error, size_t n_error, const char * why) {
    if (error != nullptr && n_error > 0) {
        std::snprintf(error, n_error, "%s", why);
    }
    return nullptr;
}

// swift_gguf_verify; also tells how long the pass took.
int32_t swift_verify(
        llama_context *     ctx,
        llama_sampler *     sampler,
        llama_seq_id        seq_id,
        llama_token         token,
        llama_pos           pos,
        const llama_token * draft,
        int32_t             n_draft,
        llama_token *       tokens,
        double &            pass_ms);
