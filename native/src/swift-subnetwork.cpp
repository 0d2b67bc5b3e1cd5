#include "swift-access.h"

#include "llama-kv-cache.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-iswa.h"

#include <cstring>

#ifndef SWIFT_GGUF_LLAMA_COMMIT
#    define SWIFT_GGUF_LLAMA_COMMIT "unknown"
#endif

int32_t swift_gguf_abi(void) {
    return SWIFT_GGUF_ABI;
}

const char * swift_gguf_llama_commit(void) {
    return SWIFT_GGUF_LLAMA_COMMIT;
}

const char * swift_gguf_error_name(int32_t code) {
    switch (code) {
        case SWIFT_GGUF_ERROR_ARGUMENT: return "an argument is out of range";
        case SWIFT_GGUF_ERROR_ROLLBACK: return "the context cannot be rolled back";
        case SWIFT_GGUF_ERROR_GRAPH: return "llama.cpp could not build the graph";
        case SWIFT_GGUF_ERROR_LOGITS: return "the logits are not finite; the model's weights are damaged";
        case SWIFT_GGUF_ERROR_SAMPLER: return "the sampler threw";
        case SWIFT_GGUF_ERROR_DECODE - 1: return "there is no room in the context";
        case SWIFT_GGUF_ERROR_DECODE - 2: return "the pass was stopped";
        default: return code >= 0 ? "no error" : "llama_decode failed";
    }
}

size_t swift_gguf_struct_size(const char * name) {
    static const struct {
        const char * name;
        size_t       size;
    } sizes[] = {
        { "llama_model_params",          sizeof(llama_model_params)          },
        { "llama_context_params",        sizeof(llama_context_params)        },
        { "llama_batch",                 sizeof(llama_batch)                 },
        { "llama_model_quantize_params", sizeof(llama_model_quantize_params) },
        { "llama_sampler_chain_params",  sizeof(llama_sampler_chain_params)  },
        { "llama_token_data_array",      sizeof(llama_token_data_array)      },
        { "swift_gguf_cost",             sizeof(swift_gguf_cost)             },
        { "swift_gguf_sublayer",         sizeof(swift_gguf_sublayer)         },
        { "swift_gguf_draft_params",     sizeof(swift_gguf_draft_params)     },
        { "swift_gguf_draft_request",    sizeof(swift_gguf_draft_request)    },
    };
    for (const auto & entry : sizes) {
        if (name != nullptr && std::strcmp(entry.name, name) == 0) {
            return entry.size;
        }
    }
    return 0;
}

swift_gguf_subnetwork * swift_gguf_subnetwork_init(
        const uint8_t *            skip_attention,
        const float *              ffn_share,
        int32_t                    n_layer,
        const swift_gguf_sidecar * sidecar,
        bool                       draft_head) try {
    if (n_layer < 0 || n_layer > LLAMA_MAX_LAYERS) {
        return nullptr;
    }
    auto value = std::make_shared<swift_subnetwork>();
    value->skip_attention.assign(n_layer, false);
    value->ffn_share.assign(n_layer, 1.0f);
    for (int32_t il = 0; il < n_layer; ++il) {
        value->skip_attention[il] = skip_attention != nullptr && skip_attention[il] != 0;
        if (ffn_share != nullptr) {
            value->ffn_share[il] = ffn_share[il];
        }
    }
    if (sidecar != nullptr) {
        value->sidecar    = sidecar->value;
        value->draft_head = draft_head;
    }
    return new swift_gguf_subnetwork { std::move(value) };
} catch (...) { // std::bad_alloc
    return nullptr;
}

void swift_gguf_subnetwork_free(swift_gguf_subnetwork * subnetwork) {
    delete subnetwork;
}

const char * swift_gguf_rollback_refusal(const llama_context * ctx) {
    if (ctx == nullptr) {
        return "there is no context";
    }
    const llama_model * model = llama_get_model(ctx);
    if (llama_model_is_recurrent(model)) {
        return "the model is recurrent: its state cannot be taken back token by token";
    }
    if (llama_model_is_hybrid(model)) {
        return "the model has recurrent layers: their state cannot be taken back token by token";
    }
    if (llama_model_has_encoder(model)) {
        return "the model has an encoder: only decoder-only models are supported";
    }
    if (llama_model_is_diffusion(model)) {
        return "the model is a diffusion model: it does not generate token after token";
    }
    const llama_memory_t memory = llama_get_memory(ctx);
    if (memory == nullptr) {
        return "the context has no memory: the model does not generate text";
    }
    if (dynamic_cast<const llama_kv_cache *>(memory) != nullptr || dynamic_cast<const llama_kv_cache_dsa *>(memory) != nullptr) {
        return nullptr;
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return iswa->get_swa()->get_size() < iswa->get_base()->get_size()
                ? "the sliding-window cache is smaller than the context: create the context with swa_full = true"
                : nullptr;
    }
    return "the model's memory type has no exact rollback";
}

int32_t swift_gguf_set_subnetwork(llama_context * ctx, const swift_gguf_subnetwork * subnetwork) {
    if (ctx == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    if (subnetwork != nullptr && swift_gguf_rollback_refusal(ctx) != nullptr) {
        return SWIFT_GGUF_ERROR_ROLLBACK;
    }
    swift_access::subnetwork(*ctx) = subnetwork != nullptr ? subnetwork->value : nullptr;
    return 0;
}

// A function of the CPU backend by its name in the backend's registry; null where there is none.
static void * cpu_function(const llama_context * ctx, const char * name) {
    const ggml_backend_t cpu = ctx != nullptr ? swift_access::cpu(*ctx) : nullptr;
    return cpu != nullptr ? ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu)), name) : nullptr;
}

static int32_t set_switch(llama_context * ctx, const char * name, bool enable) {
    const auto set = (void (*)(ggml_backend_t, bool)) cpu_function(ctx, name);
    if (set == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    set(swift_access::cpu(*ctx), enable);
    return 0;
}

bool swift_gguf_has_kernels(const llama_context * ctx) {
    const auto has_kernels = (bool (*)()) cpu_function(ctx, "swift_has_kernels");
    return has_kernels != nullptr && has_kernels() && swift_access::n_devices(*ctx) == 0;
}

int32_t swift_gguf_set_batch_invariant(llama_context * ctx, bool enable) {
    return set_switch(ctx, "ggml_backend_cpu_set_use_ref", enable);
}

int32_t swift_gguf_set_stop_flag(llama_context * ctx, const int32_t * flag) {
    if (ctx == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const auto stopped = [](void * data) { return *static_cast<const volatile int32_t *>(data) != 0; };
    llama_set_abort_callback(ctx, flag != nullptr ? (ggml_abort_callback) stopped : nullptr, const_cast<int32_t *>(flag));
    return 0;
}
