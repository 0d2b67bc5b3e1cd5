#include "swift-costs.h"

#include <cstdio>

#ifndef SWIFT_GGUF_VERSION
#    define SWIFT_GGUF_VERSION "unknown"
#endif

// FNV-1a, of all that changes what a pass costs and is too long for a name.
static uint32_t digest(const std::string & text) {
    uint64_t hash = 14695981039346656037u;
    for (const char c : text) {
        hash = (hash ^ (unsigned char) c) * 1099511628211u;
    }
    return (uint32_t) (hash ^ hash >> 32) & 0xffffff;
}

std::string swift_machine_key(const llama_context & ctx) {
    std::string parts = std::string(swift_gguf_llama_commit()) + "\n" + SWIFT_GGUF_VERSION + "\n";
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        parts += std::string(ggml_backend_dev_description(ggml_backend_dev_get(i))) + "\n";
    }
    std::string backend = "cpu";
    if (swift_access::n_devices(ctx) > 0) {
        backend = std::string(ggml_backend_dev_name(ctx.get_model().devices[0].dev)) + "-" + std::to_string(ctx.get_model().n_gpu_layers()) + "l";
    }
    char end[32];
    std::snprintf(end, sizeof(end), "-%06x", digest(parts));
    return backend + "-" + std::to_string(llama_n_threads(const_cast<llama_context *>(&ctx))) + "t" +
            (ctx.get_cparams().flash_attn ? "" : "-nofa") + end;
}

int32_t swift_gguf_machine_key(const llama_context * ctx, char * key, size_t n_key) {
    if (ctx == nullptr || key == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const std::string text = swift_machine_key(*ctx);
    std::snprintf(key, n_key, "%s", text.c_str());
    return (int32_t) text.size();
}
