/* swift_gguf.h: run a sub-network of a loaded llama.cpp model as its own draft model.
 *
 * Part of the patched libllama that swift-gguf builds; include it after or instead of llama.h.
 * Everything here works on ordinary llama.cpp contexts. No function throws or aborts on bad
 * arguments; those that can fail say how.
 *
 * Layers are numbered from 0; "sub-layer" means the attention or the FFN (dense or MoE) of a layer.
 */

#ifndef SWIFT_GGUF_H
#define SWIFT_GGUF_H

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SWIFT_GGUF_ABI 6

/* Error codes of the functions that return int32_t. llama_decode's own codes are passed through
 * offset by SWIFT_GGUF_ERROR_DECODE: -100 - code. swift_gguf_error_name names them. */
#define SWIFT_GGUF_ERROR_ARGUMENT (-1) /* a null pointer, an index or a length out of range */
#define SWIFT_GGUF_ERROR_ROLLBACK (-2) /* the context cannot be rolled back, see swift_gguf_rollback_refusal */
#define SWIFT_GGUF_ERROR_GRAPH    (-3) /* llama.cpp could not build the graph */
#define SWIFT_GGUF_ERROR_LOGITS   (-4) /* the logits are not finite: damaged weights */
#define SWIFT_GGUF_ERROR_SAMPLER  (-5) /* the caller's sampler threw, as a grammar does at a token it does not allow */
#define SWIFT_GGUF_ERROR_DECODE   (-100)

/* What an error code means, as an English clause that is never freed. */
LLAMA_API const char * swift_gguf_error_name(int32_t code);

/*
 * Threads. A context and all that was made for it belong to one thread at a time, as with llama.h. Two contexts may
 * be used from two threads. swift_gguf_set_stop_flag's flag may be written by any thread at any time.
 */

/*
 * Versions. Compare all of them before calling anything else from another language.
 */

/* SWIFT_GGUF_ABI of the library. */
LLAMA_API int32_t swift_gguf_abi(void);

/* The llama.cpp commit the library was built from, or "unknown" for a user's own checkout. */
LLAMA_API const char * swift_gguf_llama_commit(void);

/* sizeof of a struct that is passed by value: "llama_model_params", "llama_context_params",
 * "llama_batch", "llama_model_quantize_params", "llama_sampler_chain_params",
 * "llama_token_data_array", or of this header's "swift_gguf_cost", "swift_gguf_sublayer",
 * "swift_gguf_draft_params", "swift_gguf_draft_request". 0 for an unknown name. */
LLAMA_API size_t swift_gguf_struct_size(const char * name);

/* Was this program compiled with the headers of the library it runs with? Structs are passed by value. Where
 * they differ, no call fails, but wrong values arrive. */
static inline bool swift_gguf_is_compatible(void);

/*
 * Sidecars: weights derived from a model for its draft passes, FFNs of fewer neurons and an output head
 * over fewer tokens, in a GGUF file of their own (swift-gguf prepare).
 */

/* Draft weights for one loaded model. Any number of its sub-networks and contexts may use them. */
struct swift_gguf_sidecar;

/* Loads the sidecar of `model` onto the devices of the model's layers. What the CPU reads as it lies in the
 * file is mapped. Shapes are checked against the model's. Whether the weights were derived from this model
 * the caller has to check (the file's "swift.fingerprint").
 *
 * Returns NULL if it cannot be used, with an English clause in `error` (n_error bytes, may be NULL). */
LLAMA_API struct swift_gguf_sidecar * swift_gguf_sidecar_load(
        const struct llama_model * model,
        const char *               path,
        char *                     error,
        size_t                     n_error);

/* May be called while sub-networks use the weights: these stay until the last sub-network is freed. */
LLAMA_API void swift_gguf_sidecar_free(struct swift_gguf_sidecar * sidecar);

/* Bytes of all its tensors. */
LLAMA_API uint64_t swift_gguf_sidecar_size(const struct swift_gguf_sidecar * sidecar);

/*
 * Sub-networks.
 */

/* An immutable choice of what a pass runs. May be set on any number of contexts. */
struct swift_gguf_subnetwork;

/* skip_attention: n_layer bytes, non-zero leaves that attention out; NULL leaves out none.
 * ffn_share: n_layer numbers; NULL: all whole. 0 or less leaves that FFN out, 1 or more runs it whole.
 *   Between 0 and 1, a mixture of experts runs that share of its experts, at least one. Any other FFN runs the
 *   sidecar's neurons, if the sidecar has some for the layer. Below 1, the layer's attention reads the
 *   sidecar's copies of its matrices, if there are any.
 * sidecar: may be NULL.
 * draft_head: the pass computes logits for the sidecar's tokens only; all others are -inf.
 *
 * Any combination is safe. Returns NULL if n_layer is negative or absurd. */
LLAMA_API struct swift_gguf_subnetwork * swift_gguf_subnetwork_init(
        const uint8_t *                   skip_attention,
        const float *                     ffn_share,
        int32_t                           n_layer,
        const struct swift_gguf_sidecar * sidecar,
        bool                              draft_head);

LLAMA_API void swift_gguf_subnetwork_free(struct swift_gguf_subnetwork * subnetwork);

/* The best sub-network found for a model so far.
 *
 * path: the model's profile, a file that swift-gguf writes (swift-gguf config --profile MODEL). NULL: the profile
 *   inside the model (metadata "swift.profile").
 * sidecar: has the narrow FFNs and the draft head; NULL if there is none.
 *
 * Returns NULL if no sub-network can be used, with an English clause in `error` (n_error bytes, may be NULL). */
LLAMA_API struct swift_gguf_subnetwork * swift_gguf_subnetwork_load(
        const struct llama_model *        model,
        const char *                      path,
        const struct swift_gguf_sidecar * sidecar,
        char *                            error,
        size_t                            n_error);

/* From now on the context's passes run `subnetwork`; NULL: the whole model again. The context keeps its
 * own reference, so the handle may be freed at once.
 *
 * A skipped attention stores no K and V, so positions decoded under a sub-network must be removed
 * (llama_memory_seq_rm) and decoded again by the whole model before anything relies on them.
 *
 * Returns 0, or SWIFT_GGUF_ERROR_ARGUMENT, or SWIFT_GGUF_ERROR_ROLLBACK. */
LLAMA_API int32_t swift_gguf_set_subnetwork(
        struct llama_context *               ctx,
        const struct swift_gguf_subnetwork * subnetwork);

/* Says why decoded positions cannot be removed from this context exactly, as one English sentence without
 * a full stop; NULL if they can. Recurrent and hybrid models keep a running state. A sliding-window cache
 * smaller than the context forgets what a rollback would need. */
LLAMA_API const char * swift_gguf_rollback_refusal(const struct llama_context * ctx);

/* Batch-invariant mode of the CPU backend. In this mode a row's logits depend neither on how many rows are
 * decoded with it nor on where their cells lie, so drafts can be verified exactly. Flash attention and products
 * run the kernels of native/cpu where there are any, which are also faster, and ggml's reference path elsewhere
 * (no tiles, sums not split over threads). May be switched between any two passes.
 * Returns 0, or SWIFT_GGUF_ERROR_ARGUMENT if the CPU backend has no such switch. */
LLAMA_API int32_t swift_gguf_set_batch_invariant(struct llama_context * ctx, bool enable);

/* True if batch-invariant mode serves prompts, too: this processor has the kernels of native/cpu, and the model uses no
 * other device. Then a row's logits have the same bits at every width, for the types that have kernels. Elsewhere the
 * mode is meant for narrow batches and slow for wide ones. */
LLAMA_API bool swift_gguf_has_kernels(const struct llama_context * ctx);

/* Once *flag is not zero, the context's passes stop within one operation: llama_decode returns 2 and its
 * tokens are not in the memory. The CPU can stop; other backends finish their pass. The flag belongs to the
 * caller. Any thread may write it. It must outlive the context or be replaced; NULL: never stop.
 * Returns 0, or SWIFT_GGUF_ERROR_ARGUMENT. */
LLAMA_API int32_t swift_gguf_set_stop_flag(struct llama_context * ctx, const int32_t * flag);

/*
 * Observation.
 */

/* Called during a pass, once for each FFN whose down projection is one product of matrices. It gets the FFN's
 * input [n_tokens][n_embd], the activations of its neurons [n_tokens][n_ff] and its output
 * [n_tokens][n_embd]. All are valid during the call only. The last layer computes only tokens with
 * logits. */
typedef void (*swift_gguf_ffn_callback)(
        void *        data,
        int32_t       layer,
        int32_t       n_tokens,
        int32_t       n_embd,
        const float * input, /* NULL where the FFN's first product was not seen */
        int32_t       n_ff,
        const float * activations,
        const float * output);

struct swift_gguf_ffn_observer;

/* Observes the context's passes until swift_gguf_observe_ffn_end, which has to be called before the context is
 * freed. One observer a context. Returns NULL if there is nothing to observe. */
LLAMA_API struct swift_gguf_ffn_observer * swift_gguf_observe_ffn(
        struct llama_context *            ctx,
        const struct swift_gguf_sidecar * sidecar, /* whose narrow FFNs are observed, too; may be NULL */
        swift_gguf_ffn_callback           callback,
        void *                            data);

LLAMA_API void swift_gguf_observe_ffn_end(struct swift_gguf_ffn_observer * observer);

/*
 * Cost: what a pass reads, counted on the graph that llama.cpp would run. These functions compute nothing,
 * but the next llama_decode rebuilds its graph (about a millisecond).
 */

struct swift_gguf_cost {
    uint64_t weight_bytes; /* weights read, the output head included; for a MoE the experts that run */
    uint64_t head_bytes;   /* of which the output projection onto the vocabulary */
    uint64_t kv_bytes;     /* keys and values read from the cache */
    int32_t  n_nodes;      /* operations, views not counted */
    int32_t  n_splits;     /* parts the scheduler cuts the graph into, one backend each */
};

/* Cost of decoding n_tokens tokens of one sequence, n_outputs of them with logits, when the cache
 * holds n_kv positions. */
LLAMA_API int32_t swift_gguf_pass_cost(
        struct llama_context *               ctx,
        const struct swift_gguf_subnetwork * subnetwork, /* NULL: the whole model */
        int32_t                              n_tokens,
        int32_t                              n_outputs,
        int32_t                              n_kv,
        struct swift_gguf_cost *             cost);

enum swift_gguf_sublayer_status {
    SWIFT_GGUF_SUBLAYER_OK       = 0, /* can be skipped, and skipping saves work */
    SWIFT_GGUF_SUBLAYER_ABSENT   = 1, /* this layer has no such sub-layer */
    SWIFT_GGUF_SUBLAYER_UNSHARED = 2, /* it exists, but the architecture builds it without llama.cpp's shared helpers */
    SWIFT_GGUF_SUBLAYER_USELESS  = 3, /* skipping it would save nothing */
};

struct swift_gguf_sublayer {
    int32_t  status;       /* enum swift_gguf_sublayer_status */
    int32_t  n_nodes;      /* what a one-token pass saves without this sub-layer: operations, */
    uint64_t weight_bytes; /* weights read, */
    uint64_t kv_bytes;     /* and keys and values read, at a full cache */
};

/* Finds out, from the graphs themselves, which sub-layers can be skipped and what each one saves.
 * attention, ffn: n_layer entries each, n_layer as llama_model_n_layer says. */
LLAMA_API int32_t swift_gguf_sublayers(
        struct llama_context *       ctx,
        struct swift_gguf_sublayer * attention,
        struct swift_gguf_sublayer * ffn,
        int32_t                      n_layer);

/*
 * Drafting and verifying. A cycle drafts (swift_gguf_draft, or any draft of your own), then verifies. It gives the
 * tokens of plain decoding. Plain decoding is a cycle without a draft. On CPUs logits are the same to the bit once
 * swift_gguf_set_batch_invariant is on. A speculator (below) does all this, and decides what is worth it.
 */

/* The k most likely tokens of output row i (as llama_get_logits_ith counts: index into the batch, or -1
 * for the last row), likeliest first, and their probabilities under softmax at temperature 1.
 *
 * tokens, probabilities: room for k entries each. Returns how many there are (fewer than k only where
 * the vocabulary is smaller), or an error code. */
LLAMA_API int32_t swift_gguf_top(
        struct llama_context * ctx,
        int32_t                i,
        int32_t                k,
        llama_token *          tokens,
        float *                probabilities);

struct swift_gguf_draft_params {
    llama_seq_id seq_id;
    int32_t      n_max; /* at most this many draft tokens */
    float        p_min; /* stop before the first token less probable than this; 0: never */
};

/* Drafts greedily under `subnetwork`: decodes `token` at position `pos`, then the tokens it drafts. It stops
 * at n_max tokens, before a token less probable than p_min, or after an end of generation, which is drafted.
 * Before it returns, whatever happens, it restores the context's own sub-network and removes the drafted
 * positions: the context then holds positions < pos, as before.
 *
 * tokens, probabilities: room for n_max entries each. Returns the number of draft tokens, or an error
 * code. */
LLAMA_API int32_t swift_gguf_draft(
        struct llama_context *                 ctx,
        const struct swift_gguf_subnetwork *   subnetwork,
        const struct swift_gguf_draft_params * params,
        llama_token                            token,
        llama_pos                              pos,
        llama_token *                          tokens,
        float *                                probabilities);

/* Decodes `token` at position `pos` and n_draft draft tokens after it in one pass of the whole model. Then samples
 * row after row by the caller's own chain, as plain decoding would (llama_sampler_sample, which accepts what it
 * samples), while each sampled token is the next draft token. Rejected draft tokens are removed from the memory.
 *
 * sampler: ends in one that chooses (llama_sampler_init_dist, _greedy, ...).
 * pos: the first position that the memory does not hold. n_draft: less than llama_n_batch(ctx); may be 0.
 * tokens: room for n_draft + 1 entries.
 *
 * Returns the number of sampled tokens, n >= 1. All but the last are draft tokens. The context then holds positions
 * < pos + n, and the last sampled token is the next to be decoded, at pos + n. An end of generation is always the last.
 *
 * Or returns an error code. The context then holds positions < pos, and nothing was sampled. After
 * SWIFT_GGUF_ERROR_SAMPLER tokens may have been sampled: free the chain or reset it (llama_sampler_reset). A grammar
 * that threw aborts the program when it is used again. */
LLAMA_API int32_t swift_gguf_verify(
        struct llama_context * ctx,
        struct llama_sampler * sampler,
        llama_seq_id           seq_id,
        llama_token            token,
        llama_pos              pos,
        const llama_token *    draft,
        int32_t                n_draft,
        llama_token *          tokens);

/*
 * Speculators: decide before each pass which drafts are verified, if any. A speculator learns what passes cost and how
 * often which draft tokens are right. It drafts only what is expected to save time, and bounds what drafts may lose
 * against plain decoding. Drafts come from the text itself (n-grams), from the target's likeliest tokens of earlier
 * passes (recycling), and from passes of the sub-network in the profile, or of the sidecar (layer-skip).
 * native/examples/speculate.c is a whole program.
 */

struct swift_gguf_speculator;

/* profile: a file that is read now and written by swift_gguf_speculator_save; it need not exist. NULL: the profile
 *   inside the model, if there is one.
 * sidecar: may be NULL; the speculator keeps a reference of its own.
 *
 * Returns NULL if the context cannot be rolled back, or if the profile is damaged or of another model, with an English
 * clause in `error` (n_error bytes, may be NULL). Without a profile it works, too. To be freed before the context. */
LLAMA_API struct swift_gguf_speculator * swift_gguf_speculator_init(
        struct llama_context *            ctx,
        const char *                      profile,
        const struct swift_gguf_sidecar * sidecar,
        char *                            error,
        size_t                            n_error);

LLAMA_API void swift_gguf_speculator_free(struct swift_gguf_speculator * speculator);

/* Times full passes of several widths on tokens of its own in sequence 0, which must be empty, for about `seconds`. If
 * costs of this machine are in the profile, returns at once. To be called in the mode that passes will have
 * (swift_gguf_set_batch_invariant). Without this call, passes are timed while they are used.
 * Returns 0 or an error code. */
LLAMA_API int32_t swift_gguf_speculator_measure(struct swift_gguf_speculator * speculator, double seconds);

/* Another answer of a sequence begins. */
LLAMA_API int32_t swift_gguf_speculator_begin(struct swift_gguf_speculator * speculator, llama_seq_id seq_id);

/* A whole cycle of one sequence, as swift_gguf_verify: drafts at most n_max tokens, or none; decodes; samples.
 *
 * text: prompt and answer so far. The last token is not decoded yet; the context holds the others of this sequence.
 * tokens: room for n_max + 1 entries. Returns the number of sampled tokens or an error code. */
LLAMA_API int32_t swift_gguf_speculate(
        struct swift_gguf_speculator * speculator,
        struct llama_sampler *         sampler,
        llama_seq_id                   seq_id,
        const llama_token *            text,
        int32_t                        n_text,
        int32_t                        n_max,
        llama_token *                  tokens);

/* For programs that decode several sequences in one pass, the parts of a cycle: _draft; the pass; _passed; for each
 * sequence _learn and _accept. All of them are optional but _draft. */

struct swift_gguf_draft_request {
    llama_seq_id        seq_id;
    const llama_token * text; /* as above */
    int32_t             n_text;
    llama_pos           pos; /* of the last token; n_text - 1 unless the sequence holds images */
    int32_t             n_max;
    llama_token *       draft;   /* room for n_max entries */
    int32_t             n_draft; /* the result */
};

/* Drafts for the sequences of one pass. A draft token costs what it adds to the pass of all of them.
 * n_others: tokens that the pass decodes besides, of sequences without a request. Returns 0 or an error code. */
LLAMA_API int32_t swift_gguf_speculator_draft(
        struct swift_gguf_speculator *    speculator,
        struct swift_gguf_draft_request * requests,
        int32_t                           n_requests,
        int32_t                           n_others);

/* The pass is over (and the device synchronised). Call it only if the pass decoded nothing but those sequences' tokens.
 * draft_ms, pass_ms: how long drafting and the pass took; negative: as the speculator's own clock says. */
LLAMA_API void swift_gguf_speculator_passed(struct swift_gguf_speculator * speculator, double draft_ms, double pass_ms);

/* Reads the target's likeliest tokens of a sequence, while the logits of the pass are there.
 * row: the output row of the last token of the text (as llama_get_logits_ith counts); draft tokens follow.
 * n_rows: 1 and the number of accepted draft tokens. Returns 0 or an error code. */
LLAMA_API int32_t swift_gguf_speculator_learn(struct swift_gguf_speculator * speculator, llama_seq_id seq_id, int32_t row, int32_t n_rows);

/* The target chose these tokens: the accepted draft tokens and its own next one. */
LLAMA_API int32_t swift_gguf_speculator_accept(
        struct swift_gguf_speculator * speculator,
        llama_seq_id                   seq_id,
        const llama_token *            tokens,
        int32_t                        n_tokens);

/* Which sources draft, or why none does; valid until the next call. */
LLAMA_API const char * swift_gguf_speculator_why(struct swift_gguf_speculator * speculator);

/* Adds what was learned to the profile. Returns false with an English clause in `error` if that is not possible. */
LLAMA_API bool swift_gguf_speculator_save(struct swift_gguf_speculator * speculator, char * error, size_t n_error);

/* What costs depend on besides model and context length, as they are stored in a profile: backend, threads, and by a
 * digest the processor and the library's version. Returns the length of the key without its end, or an error code. */
LLAMA_API int32_t swift_gguf_machine_key(const struct llama_context * ctx, char * key, size_t n_key);

static inline bool swift_gguf_is_compatible(void) {
    return swift_gguf_abi() == SWIFT_GGUF_ABI &&
            swift_gguf_struct_size("llama_model_params") == sizeof(struct llama_model_params) &&
            swift_gguf_struct_size("llama_context_params") == sizeof(struct llama_context_params) &&
            swift_gguf_struct_size("llama_batch") == sizeof(struct llama_batch) &&
            swift_gguf_struct_size("llama_sampler_chain_params") == sizeof(struct llama_sampler_chain_params) &&
            swift_gguf_struct_size("swift_gguf_cost") == sizeof(struct swift_gguf_cost) &&
            swift_gguf_struct_size("swift_gguf_sublayer") == sizeof(struct swift_gguf_sublayer) &&
            swift_gguf_struct_size("swift_gguf_draft_params") == sizeof(struct swift_gguf_draft_params) &&
            swift_gguf_struct_size("swift_gguf_draft_request") == sizeof(struct swift_gguf_draft_request);
}

#ifdef __cplusplus
}
#endif

#endif /* SWIFT_GGUF_H */
