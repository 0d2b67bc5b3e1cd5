#include "swift-access.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

// The logits of up to some 260 000 tokens are read after every draft pass. Each lane below has a sum or a maximum
// of its own, so that compilers turn the loops into vector instructions.
static const int32_t LANES   = 16;
static const int32_t STRETCH = 256;

static float max_of(const float * x, int32_t n) {
    float lanes[LANES];
    std::fill(lanes, lanes + LANES, -INFINITY);
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int32_t lane = 0; lane < LANES; ++lane) {
            lanes[lane] = lanes[lane] < x[i + lane] ? x[i + lane] : lanes[lane]; // a NaN is never taken
        }
    }
    float max = *std::max_element(lanes, lanes + LANES);
    for (; i < n; ++i) {
        max = max < x[i] ? x[i] : max;
    }
    return max;
}

// exp(x) of -24 <= x <= 0, to about 1e-6 of it: 2^whole by the exponent's bits, 2^part by its series
static inline float exp_of(float x) {
    const float   t     = x * 1.44269504f;
    const int32_t whole = (int32_t) t; // towards zero
    const float   p     = (t - (float) whole) * 0.693147181f;
    const float   part =
            1.0f + p * (1.0f + p * (0.5f + p * (0.166666667f + p * (0.0416666667f + p * (0.00833333333f + p * (0.00138888889f + p * 0.000198412698f))))));
    const int32_t bits = (whole + 127) << 23;
    float         scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return scale * part;
}

// Sum of exp(x - max). Logits more than 24 below the maximum add less than 4e-11 each: nothing.
static float sum_of_exp(const float * x, int32_t n, float max) {
    float   lanes[LANES] = {};
    int32_t i            = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int32_t lane = 0; lane < LANES; ++lane) {
            const float below = x[i + lane] - max;
            const float one   = exp_of(below > -24.0f ? below : -24.0f); // a NaN is not greater
            lanes[lane] += below > -24.0f ? one : 0.0f;
        }
    }
    float sum = 0.0f;
    for (float lane : lanes) {
        sum += lane;
    }
    for (; i < n; ++i) {
        const float below = x[i] - max;
        sum += below > -24.0f ? exp_of(below) : 0.0f;
    }
    return sum;
}

int32_t swift_gguf_top(llama_context * ctx, int32_t i, int32_t k, llama_token * tokens, float * probabilities) {
    if (ctx == nullptr || k < 1 || tokens == nullptr || probabilities == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const float * logits = llama_get_logits_ith(ctx, i);
    if (logits == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    k                     = std::min(k, n_vocab);

    const float max = max_of(logits, n_vocab);
    if (!std::isfinite(max)) {
        return SWIFT_GGUF_ERROR_LOGITS;
    }
    const float sum = sum_of_exp(logits, n_vocab, max);

    // Insertion into a short sorted list. Once the list is good, insertions are rare: stretches without anything
    // greater are skipped whole. Of equal logits the lower id comes first, as in llama.cpp's greedy sampler.
    int32_t n = 0;
    for (int32_t begin = 0; begin < n_vocab; begin += STRETCH) {
        const int32_t end = std::min(begin + STRETCH, n_vocab);
        if (n == k && !(max_of(logits + begin, end - begin) > logits[tokens[n - 1]])) {
            continue;
        }
        for (int32_t t = begin; t < end; ++t) {
            if (std::isnan(logits[t])) {
                continue; // a NaN would block the list: nothing is greater
            }
            if (n == k && !(logits[t] > logits[tokens[n - 1]])) {
                continue;
            }
            int32_t place = n < k ? n++ : n - 1;
            for (; place > 0 && logits[t] > logits[tokens[place - 1]]; --place) {
                tokens[place] = tokens[place - 1];
            }
            tokens[place] = t;
        }
    }
    for (int32_t place = 0; place < n; ++place) {
        probabilities[place] = std::exp(logits[tokens[place]] - max) / sum;
    }
    return n;
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
        if (const int32_t found = swift_gguf_top(ctx, -1, 1, &token, &probability); found < 0) {
            return found;
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

    // Skipped layers stored nothing for these positions, so they must go.
    if (!llama_memory_seq_rm(memory, params->seq_id, pos, -1)) {
        return SWIFT_GGUF_ERROR_ROLLBACK;
    }
    return n;
}

// Decodes `tokens` from position `pos` on, all with logits. Returns 0 or an error code.
static int32_t decode_rows(llama_context * ctx, std::vector<llama_token> & tokens, llama_pos pos, llama_seq_id seq_id) {
    const int32_t               n = (int32_t) tokens.size();
    std::vector<llama_pos>      positions(n);
    std::vector<int32_t>        n_seq_id(n, 1);
    std::vector<llama_seq_id *> seq_ids(n, &seq_id);
    std::vector<int8_t>         outputs(n, 1);
    for (int32_t i = 0; i < n; ++i) {
        positions[i] = pos + i;
    }
    llama_batch batch = {};
    batch.n_tokens    = n;
    batch.token       = tokens.data();
    batch.pos         = positions.data();
    batch.n_seq_id    = n_seq_id.data();
    batch.seq_id      = seq_ids.data();
    batch.logits      = outputs.data();

    const int32_t code = llama_decode(ctx, batch);
    return code == 0 ? 0 : SWIFT_GGUF_ERROR_DECODE - std::abs(code);
}

// Samples rows 0, 1, ... while they confirm the draft. Returns how many, or an error code.
static int32_t sample_rows(llama_context * ctx, llama_sampler * sampler, const llama_token * draft, int32_t n_draft, llama_token * tokens) {
    const llama_vocab * vocab   = llama_model_get_vocab(llama_get_model(ctx));
    const int32_t       n_vocab = llama_vocab_n_tokens(vocab);
    for (int32_t n = 0;; ++n) {
        // A row of NaN would make a sampler abort. After accepted draft tokens, the next call meets it as its first row.
        const float * logits = llama_get_logits_ith(ctx, n);
        if (logits == nullptr || !std::isfinite(max_of(logits, n_vocab))) {
            return n > 0 ? n : SWIFT_GGUF_ERROR_LOGITS;
        }
        try {
            tokens[n] = llama_sampler_sample(sampler, ctx, n);
        } catch (...) {
            // A grammar throws at a token that it does not allow. Used again it aborts, so report an error whatever n is.
            return SWIFT_GGUF_ERROR_SAMPLER;
        }
        if (n == n_draft || tokens[n] != draft[n] || llama_vocab_is_eog(vocab, tokens[n])) {
            return n + 1;
        }
    }
}

int32_t swift_verify(
        llama_context *     ctx,
        llama_sampler *     sampler,
        llama_seq_id        seq_id,
        llama_token         token,
        llama_pos           pos,
        const llama_token * draft,
        int32_t             n_draft,
        llama_token *       tokens,
        double &            pass_ms) {
    if (ctx == nullptr || sampler == nullptr || tokens == nullptr || pos < 0 || n_draft < 0 || (draft == nullptr && n_draft > 0) ||
        n_draft >= (int64_t) llama_n_batch(ctx) || seq_id < 0 || seq_id >= (llama_seq_id) llama_n_seq_max(ctx) ||
        (int64_t) pos + n_draft >= llama_n_ctx_seq(ctx)) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    if (n_draft > 0 && swift_gguf_rollback_refusal(ctx) != nullptr) {
        return SWIFT_GGUF_ERROR_ROLLBACK;
    }
    const llama_memory_t memory = llama_get_memory(ctx);
    if (memory == nullptr || llama_memory_seq_pos_max(memory, seq_id) != pos - 1) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }

    int32_t n = 0;
    try {
        const swift_scope        scope(*ctx, nullptr); // the whole model, whatever sub-network the context has
        std::vector<llama_token> batch(1, token);
        batch.insert(batch.end(), draft, draft + n_draft);
        const auto start = std::chrono::steady_clock::now();
        n                = decode_rows(ctx, batch, pos, seq_id);
        llama_synchronize(ctx);
        pass_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
        if (n == 0) {
            n = sample_rows(ctx, sampler, draft, n_draft, tokens);
        }
    } catch (...) { // llama_decode lets exceptions of the graph build and of allocations through
        n = SWIFT_GGUF_ERROR_GRAPH;
    }
    if (n <= n_draft && !llama_memory_seq_rm(memory, seq_id, pos + std::max(n, 0), -1)) {
        return n < 0 ? n : SWIFT_GGUF_ERROR_ROLLBACK;
    }
    return n;
}

int32_t swift_gguf_verify(
        llama_context *     ctx,
        llama_sampler *     sampler,
        llama_seq_id        seq_id,
        llama_token         token,
        llama_pos           pos,
        const llama_token * draft,
        int32_t             n_draft,
        llama_token *       tokens) {
    double pass_ms = 0.0;
    return swift_verify(ctx, sampler, seq_id, token, pos, draft, n_draft, tokens, pass_ms);
}
