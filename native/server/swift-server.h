// What llama.cpp's server calls besides its own speculation (native/patches/0006-server.patch).

#pragma once

#include "common.h"
#include "swift_gguf.h"

// After the target's context is made, whatever the type of speculation. Kernels of ours are faster than ggml's, and
// tokens do not depend on the type then. Where there are none, batch-invariant mode is for narrow batches only.
inline void swift_server_begin(common_params_speculative_swift & params, llama_context * ctx) {
    params.ctx = ctx;
    if (swift_gguf_has_kernels(ctx)) {
        swift_gguf_set_batch_invariant(ctx, true);
    }
}
