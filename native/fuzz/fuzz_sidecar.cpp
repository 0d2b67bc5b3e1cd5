// Gives swift_gguf_sidecar_load any bytes: it must refuse them or draft with them, and never crash.
//
//     fuzz_sidecar CORPUS ...      SWIFT_GGUF_FUZZ_MODEL names the model; scripts/sanitize.sh makes both

#include "swift_gguf.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

llama_model *   model;
llama_context * ctx;

[[noreturn]] void stop(const char * why) {
    fprintf(stderr, "fuzz_sidecar: %s\n", why);
    exit(1);
}

void silent(ggml_log_level, const char *, void *) {}

// Drafts with everything in the sidecar, as a program that trusts it.
void draft(const swift_gguf_sidecar * sidecar) {
    const std::vector<float>      shares(llama_model_n_layer(model), 0.5f);
    swift_gguf_subnetwork *       subnetwork = swift_gguf_subnetwork_init(nullptr, shares.data(), (int32_t) shares.size(), sidecar, true);
    const swift_gguf_draft_params params     = { 0, 2, 0.0f };
    llama_token                   tokens[2];
    float                         probabilities[2];
    swift_gguf_draft(ctx, subnetwork, &params, 1, 0, tokens, probabilities); // weights of noise may give NaN: an error code
    swift_gguf_subnetwork_free(subnetwork);
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set(silent, nullptr);
    const char * path = getenv("SWIFT_GGUF_FUZZ_MODEL");
    model             = path != nullptr ? llama_model_load_from_file(path, llama_model_default_params()) : nullptr;
    if (model == nullptr) {
        stop("SWIFT_GGUF_FUZZ_MODEL must name a model");
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_threads = params.n_threads_batch = 1;
    ctx                                       = llama_init_from_model(model, params);
    if (ctx == nullptr) {
        stop("the model has no context");
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const int file = memfd_create("sidecar", 0);
    if (file < 0 || write(file, data, size) != (ssize_t) size) {
        stop("no memory for a file");
    }
    char                 error[256];
    const std::string    path    = "/proc/self/fd/" + std::to_string(file);
    swift_gguf_sidecar * sidecar = swift_gguf_sidecar_load(model, path.c_str(), error, sizeof(error));
    if (sidecar != nullptr) {
        draft(sidecar);
        swift_gguf_sidecar_free(sidecar);
    } else if (strlen(error) == 0) {
        abort(); // refused without a message
    }
    close(file);
    return 0;
}
