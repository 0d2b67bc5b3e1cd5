/* draft.c: greedy text from a model that drafts for itself with every second FFN left out.
 *
 *     swift_gguf_draft_example MODEL.gguf PROMPT [N_PREDICT] [DRAFT_MAX]
 *
 * The whole cycle in one file, on llama.h and swift_gguf.h alone: draft under a sub-network, verify
 * all draft tokens in one pass of the whole model, keep those it agrees with, take the rest back.
 * Text goes to standard output, figures and errors to standard error. */

#include "swift_gguf.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DRAFT_P_MIN 0.6f /* an unsure draft is a wrong draft more often than it pays */

struct session {
    struct llama_model           * model;
    struct llama_context         * ctx;
    const struct llama_vocab     * vocab;
    struct swift_gguf_subnetwork * subnetwork;
    struct llama_batch             batch;
    llama_token                  * prompt;
    int32_t                        n_prompt;
    llama_token                  * draft;         /* draft_max + 1 entries */
    float                        * probabilities; /* likewise */
    int32_t                        n_drafted;
    int32_t                        n_accepted;
    int32_t                        n_cycles;
};

/* One line on standard error; false, so that callers can return it. */
static bool fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return false;
}

/* llama.cpp logs pages; this program says in its own words what failed. */
static void no_log(enum ggml_log_level level, const char * text, void * user_data) {
    (void) level;
    (void) text;
    (void) user_data;
}

/* The header we are compiled with against the library we run with: parameter structs are passed by
 * value, so a mismatch would not crash here but read garbage somewhere else. */
static bool check_library(void) {
    if (swift_gguf_abi() != SWIFT_GGUF_ABI) {
        return fail("the library has ABI %d, this program needs %d; build both from one source",
                    (int) swift_gguf_abi(), SWIFT_GGUF_ABI);
    }
    const struct {
        const char * name;
        size_t       size;
    } structs[] = {
        { "llama_model_params",      sizeof(struct llama_model_params)      },
        { "llama_context_params",    sizeof(struct llama_context_params)    },
        { "llama_batch",             sizeof(struct llama_batch)             },
        { "swift_gguf_sublayer",     sizeof(struct swift_gguf_sublayer)     },
        { "swift_gguf_draft_params", sizeof(struct swift_gguf_draft_params) },
    };
    for (size_t i = 0; i < sizeof(structs) / sizeof(structs[0]); i++) {
        if (swift_gguf_struct_size(structs[i].name) != structs[i].size) {
            return fail("the library has another %s than this program; build both from one source", structs[i].name);
        }
    }
    return true;
}

static bool tokenize(struct session * s, const char * text) {
    const int32_t length = (int32_t) strlen(text);
    if (llama_vocab_type(s->vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return fail("the model has no tokenizer");
    }
    /* a first call without room says how much is needed, as a negative number */
    const int32_t n = -llama_tokenize(s->vocab, text, length, NULL, 0, true, true);
    if (n <= 0) {
        return fail("the prompt is empty");
    }
    s->prompt = malloc((size_t) n * sizeof(*s->prompt));
    if (s->prompt == NULL) {
        return fail("out of memory");
    }
    s->n_prompt = llama_tokenize(s->vocab, text, length, s->prompt, n, true, true);
    return s->n_prompt == n || fail("the prompt cannot be tokenized");
}

static bool open_context(struct session * s, int32_t n_predict, int32_t draft_max) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx    = (uint32_t) (s->n_prompt + n_predict + draft_max + 1);
    params.n_batch  = params.n_ctx; /* the prompt in one call; llama.cpp cuts it up itself */
    params.swa_full = true;         /* a cache of the window's size could not be rolled back */

    s->ctx = llama_init_from_model(s->model, params);
    if (s->ctx == NULL) {
        return fail("no context of %u tokens; is there enough memory?", params.n_ctx);
    }
    const char * refusal = swift_gguf_rollback_refusal(s->ctx);
    if (refusal != NULL) {
        return fail("no speculation with this model: %s", refusal);
    }
    /* So that a row verified among others has the very logits it has alone. Without such a switch (not
     * on a CPU) rows differ by rounding, and the text may part from plain decoding at near ties. */
    (void) swift_gguf_set_batch_invariant(s->ctx, true);

    s->batch         = llama_batch_init((int32_t) params.n_batch, 0, 1);
    s->draft         = malloc(((size_t) draft_max + 1) * sizeof(*s->draft));
    s->probabilities = malloc(((size_t) draft_max + 1) * sizeof(*s->probabilities));
    return (s->batch.token != NULL && s->draft != NULL && s->probabilities != NULL) || fail("out of memory");
}

/* Every second FFN of those that can be skipped: never the first layer's, drafts need it most. */
static bool choose_subnetwork(struct session * s) {
    const int32_t n_layer = llama_model_n_layer(s->model);

    struct swift_gguf_sublayer * attention = calloc((size_t) n_layer, sizeof(*attention));
    struct swift_gguf_sublayer * ffn       = calloc((size_t) n_layer, sizeof(*ffn));
    float                      * ffn_share = calloc((size_t) n_layer, sizeof(*ffn_share));

    bool    ok        = attention != NULL && ffn != NULL && ffn_share != NULL;
    int32_t n_skipped = 0;
    if (!ok) {
        fail("out of memory");
    } else if (swift_gguf_sublayers(s->ctx, attention, ffn, n_layer) != 0) {
        ok = fail("the model's sub-layers cannot be found out");
    } else {
        for (int32_t il = 0; il < n_layer; ++il) {
            const bool is_skipped = il % 2 == 1 && ffn[il].status == SWIFT_GGUF_SUBLAYER_OK;
            ffn_share[il]         = is_skipped ? 0.0f : 1.0f;
            n_skipped += is_skipped;
        }
        s->subnetwork = swift_gguf_subnetwork_init(NULL, ffn_share, n_layer, NULL, false);
        if (s->subnetwork == NULL) {
            ok = fail("a sub-network of %d layers is not possible", (int) n_layer);
        } else if (n_skipped == 0) {
            ok = fail("this model has no FFN that can be skipped");
        }
    }
    free(attention);
    free(ffn);
    free(ffn_share);
    return ok;
}

/* Appends a token to the batch; `output`: with logits. */
static void push(struct llama_batch * batch, llama_token token, llama_pos pos, bool output) {
    const int32_t i = batch->n_tokens++;
    batch->token[i]     = token;
    batch->pos[i]       = pos;
    batch->n_seq_id[i]  = 1;
    batch->seq_id[i][0] = 0;
    batch->logits[i]    = output;
}

static bool decode(struct session * s) {
    const int32_t code = llama_decode(s->ctx, s->batch);
    return code == 0 || fail("llama_decode returned %d", (int) code);
}

static bool argmax(struct session * s, int32_t row, llama_token * token) {
    float probability;
    return swift_gguf_top(s->ctx, row, 1, token, &probability) == 1 || fail("row %d has no logits", (int) row);
}

static void print_token(const struct session * s, llama_token token) {
    char          piece[256];
    const int32_t n = llama_token_to_piece(s->vocab, token, piece, (int32_t) sizeof(piece), 0, false);
    if (n > 0) {
        fwrite(piece, 1, (size_t) n, stdout);
        fflush(stdout);
    }
}

/* The cycle. `pending` is the last token that is certain; it is decoded with the next drafts. */
static bool generate(struct session * s, int32_t n_predict, int32_t draft_max) {
    s->batch.n_tokens = 0;
    for (int32_t i = 0; i < s->n_prompt; i++) {
        push(&s->batch, s->prompt[i], i, i == s->n_prompt - 1);
    }
    llama_token pending;
    if (!decode(s) || !argmax(s, -1, &pending)) {
        return false;
    }
    llama_pos n_past = s->n_prompt; /* positions that the context holds */
    int32_t   n_left = n_predict;
    while (n_left > 0 && !llama_vocab_is_eog(s->vocab, pending)) {
        print_token(s, pending);
        n_left--;
        if (n_left == 0) {
            break;
        }

        /* 1. Draft. The context is left as it was: nothing of `pending` or the draft stays in it. */
        const struct swift_gguf_draft_params params = {
            .seq_id = 0,
            .n_max  = draft_max < n_left ? draft_max : n_left - 1, /* the verification adds one */
            .p_min  = DRAFT_P_MIN,
        };
        const int32_t n_draft =
            swift_gguf_draft(s->ctx, s->subnetwork, &params, pending, n_past, s->draft, s->probabilities);
        if (n_draft < 0) {
            return fail("drafting failed (code %d)", (int) n_draft);
        }

        /* 2. Verify: one pass of the whole model. Row i holds what it says after draft token i - 1. */
        s->batch.n_tokens = 0;
        push(&s->batch, pending, n_past, true);
        for (int32_t i = 0; i < n_draft; i++) {
            push(&s->batch, s->draft[i], n_past + 1 + i, true);
        }
        if (!decode(s)) {
            return false;
        }

        /* 3. Accept as long as the model says the same, then take its own word for the next token. */
        int32_t     n_accepted = 0;
        llama_token next;
        for (;;) {
            if (!argmax(s, n_accepted, &next)) {
                return false;
            }
            if (n_accepted == n_draft || next != s->draft[n_accepted] || llama_vocab_is_eog(s->vocab, next)) {
                break;
            }
            print_token(s, next);
            n_accepted++;
            n_left--;
        }
        s->n_cycles++;
        s->n_drafted += n_draft;
        s->n_accepted += n_accepted;

        /* 4. Roll back: forget the positions of draft tokens that were wrong. */
        n_past += 1 + n_accepted;
        if (!llama_memory_seq_rm(llama_get_memory(s->ctx), 0, n_past, -1)) {
            return fail("the context cannot be rolled back");
        }
        pending = next;
    }
    putchar('\n');
    return true;
}

static void close_session(struct session * s) {
    swift_gguf_subnetwork_free(s->subnetwork);
    if (s->batch.token != NULL) {
        llama_batch_free(s->batch);
    }
    free(s->draft);
    free(s->probabilities);
    free(s->prompt);
    llama_free(s->ctx);
    llama_model_free(s->model);
    llama_backend_free();
}

static bool parse_count(const char * text, int32_t max, int32_t * count) {
    char     * end;
    const long value = strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < 1 || value > max) {
        return fail("'%s' is not a number from 1 to %d", text, (int) max);
    }
    *count = (int32_t) value;
    return true;
}

static bool run(struct session * s, const char * path, const char * prompt, int32_t n_predict, int32_t draft_max) {
    s->model = llama_model_load_from_file(path, llama_model_default_params());
    if (s->model == NULL) {
        return fail("%s cannot be loaded: is it there, and a GGUF model?", path);
    }
    s->vocab = llama_model_get_vocab(s->model);
    if (!tokenize(s, prompt) || !open_context(s, n_predict, draft_max) || !choose_subnetwork(s) ||
        !generate(s, n_predict, draft_max)) {
        return false;
    }
    fprintf(stderr, "drafted %d, accepted %d (%.0f %%); %.2f tokens a pass of the whole model\n",
            (int) s->n_drafted, (int) s->n_accepted,
            s->n_drafted > 0 ? 100.0 * s->n_accepted / s->n_drafted : 0.0,
            s->n_cycles > 0 ? 1.0 + (double) s->n_accepted / s->n_cycles : 1.0);
    return true;
}

int main(int argc, char ** argv) {
    int32_t n_predict = 128;
    int32_t draft_max = 4;
    if (argc < 3 || argc > 5) {
        fprintf(stderr, "usage: %s MODEL.gguf PROMPT [N_PREDICT] [DRAFT_MAX]\n", argv[0]);
        return 2;
    }
    if ((argc > 3 && !parse_count(argv[3], 1000000, &n_predict)) ||
        (argc > 4 && !parse_count(argv[4], 64, &draft_max))) {
        return 2;
    }
    if (!check_library()) {
        return 1;
    }
    llama_log_set(no_log, NULL);
    llama_backend_init();

    struct session s  = { 0 };
    const bool     ok = run(&s, argv[1], argv[2], n_predict, draft_max);
    close_session(&s);
    return ok ? 0 : 1;
}
