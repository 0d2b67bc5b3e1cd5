#include "swift-access.h"

#include <algorithm>
#include <cmath>

int32_t swift_gguf_top1(llama_context * ctx, int32_t i, llama_token * token, float * probability) {
    if (ctx == nullptr || token == nullptr || probability == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const float * logits = llama_get_logits_ith(ctx, i);
    if (logits == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));

    // std::max_element is one dependent chain; the maximum first, then its index, vectorises.
    float max = logits[0];
    for (int32_t k = 1; k < n_vocab; ++k) {
        max = std::max(max, logits[k]);
    }
    const float * best = std::find(logits, logits + n_vocab, max);
    if (best == logits + n_vocab || !std::isfinite(max)) {
        return SWIFT_GGUF_ERROR_LOGITS;
    }
    *token = (llama_token) (best - logits);

    // Logits more than 24 below the maximum add under 4e-11 each: not worth an exponential.
    float sum = 0.0f;
    for (int32_t k = 0; k < n_vocab; ++k) {
        const float x = logits[k] - max;
        if (x > -24.0f) {
            sum += std::exp(x);
        }
    }
    *probability = 1.0f / sum;
    return 0;
}

// Decodes one token with logits. Returns 0 or an error code.
static int32_t decode_one(llama_context * ctx, llama_token token, llama_pos pos, llama_seq_id seq_id) {
    int32_t        n_seq_id = 1;
    llama_seq_id * seq_ids  = &seq_id;
    int8_t         output   = 1;

    llama_batch batch = {};
    batch.n_tokens    = 1;
    batch.token       = &token;
    batch.pos         = &pos;
    batch.n_seq_id    = &n_seq_id;
    batch.seq_id      = &seq_ids;
    batch.logits      = &output;

    const int32_t code = llama_decode(ctx, batch);
    return code == 0 ? 0 : SWIFT_GGUF_ERROR_DECODE - std::abs(code);
}

static int32_t draft_loop(
        llama_context *                 ctx,
        const swift_gguf_draft_params & params,
        llama_token                     token,
        llama_pos                       pos,
        llama_token *                   tokens,
        float *                         probabilities) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));

    for (int32_t n = 0; n < params.n_max; ++n) {
        if (const int32_t error = decode_one(ctx, token, pos + n, params.seq_id)) {
            return error;
        }
        float probability = 0.0f;
        if (const int32_t error = swift_gguf_top1(ctx, -1, &token, &probability)) {
            return error;
        }
        if (probability < params.p_min) {
            return n;
        }
        tokens[n]        = token;
        probabilities[n] = probability;
        if (llama_vocab_is_eog(vocab, token)) {
            return n + 1;
        }
    }
    return params.n_max;
}

int32_t swift_gguf_draft(
        llama_context *                 ctx,
        const swift_gguf_subnetwork *   subnetwork,
        const swift_gguf_draft_params * params,
        llama_token                     token,
        llama_pos                       pos,
        llama_token *                   tokens,
        float *                         probabilities) {
    if (ctx == nullptr || subnetwork == nullptr || params == nullptr || tokens == nullptr || probabilities == nullptr ||
        params->n_max < 0 || pos < 0 || params->seq_id < 0 || params->seq_id >= (llama_seq_id) llama_n_seq_max(ctx) ||
        (int64_t) pos + params->n_max > llama_n_ctx_seq(ctx)) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    if (swift_gguf_rollback_refusal(ctx) != nullptr) {
        return SWIFT_GGUF_ERROR_ROLLBACK;
    }
    const llama_memory_t memory = llama_get_memory(ctx);
    if (llama_memory_seq_pos_max(memory, params->seq_id) != pos - 1) {
        return SWIFT_GGUF_ERROR_ARGUMENT; // removing the draft would remove what was there before
    }

    const swift_scope scope(*ctx, subnetwork->value);
    int32_t           n = SWIFT_GGUF_ERROR_GRAPH;
    try {
        n = draft_loop(ctx, *params, token, pos, tokens, probabilities);
    } catch (...) { // llama_decode lets exceptions of the graph build and of allocations through
    }

    // Skipped layers stored nothing for these positions: nobody may build on them.
    if (!llama_memory_seq_rm(memory, params->seq_id, pos, -1)) {
        return SWIFT_GGUF_ERROR_ROLLBACK;
    }
    return n;
}
