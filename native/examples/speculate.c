/* speculate.c: text from a model that drafts for itself, then the same text decoded plainly.
 *
 *     speculate MODEL.gguf PROMPT [N_PREDICT [TEMPERATURE [PROFILE|- [SIDECAR]]]]
 *
 * What is learned goes into the profile (-: the profile inside the model, which stays as it is). The text goes to
 * standard output, everything else to standard error. */

#define _DEFAULT_SOURCE /* sysconf */
#include <swift_gguf.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TOKENS_MAX = 32768, DRAFT_MAX = 16, SEED = 42 };

static llama_token text[TOKENS_MAX], plain[TOKENS_MAX]; /* prompt and answer */

struct session {
    struct llama_model           * model;
    struct llama_context         * ctx;
    const struct llama_vocab     * vocab;
    struct swift_gguf_speculator * speculator;
    int32_t                        n_prompt, n_predict;
    float                          temperature;
};

struct figures {
    int32_t n_tokens, n_passes;
    double  seconds;
};

static void fail(const char * what, const char * why) {
    fprintf(stderr, "error: %s: %s\n", what, why);
    exit(1);
}

static void no_log(enum ggml_log_level level, const char * line, void * data) { (void) level, (void) line, (void) data; }

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static void print_token(const struct llama_vocab * vocab, llama_token token) {
    char          piece[256];
    const int32_t n = llama_token_to_piece(vocab, token, piece, (int32_t) sizeof(piece), 0, false);
    fwrite(piece, 1, n > 0 ? (size_t) n : 0, stdout);
    fflush(stdout);
}

/* Continues tokens[0 .. n_prompt), with drafts or plainly. Any chain of samplers does. */
static struct figures generate(const struct session * s, llama_token * tokens, bool with_drafts) {
    struct figures         f     = { 0 };
    struct llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(chain, llama_sampler_init_top_k(40));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(s->temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(SEED));

    /* All of the prompt but its last token: each cycle below decodes the last token of the text. */
    llama_memory_clear(llama_get_memory(s->ctx), true);
    swift_gguf_set_batch_invariant(s->ctx, false);
    if (s->n_prompt > 1 && llama_decode(s->ctx, llama_batch_get_one(tokens, s->n_prompt - 1)) != 0) {
        fail("the prompt cannot be decoded", "llama_decode failed");
    }
    swift_gguf_set_batch_invariant(s->ctx, true); /* on CPUs a row then has the same logits in any batch */
    swift_gguf_speculator_begin(s->speculator, 0);

    const double  start = now();
    const int32_t end   = s->n_prompt + s->n_predict;
    int32_t       n     = s->n_prompt;
    do {
        const int32_t n_max = end - n > DRAFT_MAX ? DRAFT_MAX : end - n - 1; /* a cycle adds a token of its own */
        const int32_t n_new = with_drafts ? swift_gguf_speculate(s->speculator, chain, 0, tokens, n, n_max, tokens + n)
                                          : swift_gguf_verify(s->ctx, chain, 0, tokens[n - 1], n - 1, NULL, 0, tokens + n);
        if (n_new < 0) {
            fail("decoding failed", swift_gguf_error_name(n_new));
        }
        f.n_passes++;
        for (int32_t i = 0; with_drafts && i < n_new; i++) {
            print_token(s->vocab, tokens[n + i]);
        }
        n += n_new;
    } while (n < end && !llama_vocab_is_eog(s->vocab, tokens[n - 1]));
    f.seconds  = now() - start;
    f.n_tokens = n - s->n_prompt;
    llama_sampler_free(chain);
    return f;
}

int main(int argc, char ** argv) {
    struct session s = { .n_predict = argc > 3 ? atoi(argv[3]) : 128, .temperature = argc > 4 ? (float) atof(argv[4]) : 0.8f };
    if (argc < 3 || argc > 7 || s.n_predict < 1 || s.n_predict >= TOKENS_MAX) {
        fprintf(stderr, "usage: %s MODEL.gguf PROMPT [N_PREDICT [TEMPERATURE [PROFILE|- [SIDECAR]]]]\n", argv[0]);
        return 2;
    }
    if (!swift_gguf_is_compatible()) {
        fail("this program was compiled with the headers of another library", "build it again");
    }
    llama_log_set(no_log, NULL);
    llama_backend_init();
    s.model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (s.model == NULL || llama_vocab_type(s.vocab = llama_model_get_vocab(s.model)) == LLAMA_VOCAB_TYPE_NONE) {
        fail(argv[1], "not to be loaded, or no model that writes text");
    }
    s.n_prompt = llama_tokenize(s.vocab, argv[2], (int32_t) strlen(argv[2]), text, TOKENS_MAX - s.n_predict, true, true);
    if (s.n_prompt < 1) {
        fail("the prompt", "empty or too long");
    }
    memcpy(plain, text, sizeof(text));
    struct llama_context_params params = llama_context_default_params();
    params.n_threads = params.n_threads_batch = (int32_t) sysconf(_SC_NPROCESSORS_ONLN);
    params.n_ctx = params.n_batch = (uint32_t) (s.n_prompt + s.n_predict + DRAFT_MAX);
    params.swa_full               = true; /* a cache of the window's size could not be rolled back */
    s.ctx                         = llama_init_from_model(s.model, params);
    char                        why[256] = "";
    struct swift_gguf_sidecar * sidecar  = argc > 6 ? swift_gguf_sidecar_load(s.model, argv[6], why, sizeof(why)) : NULL;
    const char *                profile  = argc > 5 && strcmp(argv[5], "-") != 0 ? argv[5] : NULL;
    if (why[0] == '\0') {
        s.speculator = swift_gguf_speculator_init(s.ctx, profile, sidecar, why, sizeof(why));
    }
    if (s.speculator == NULL) {
        fail("no speculation", why);
    }
    swift_gguf_set_batch_invariant(s.ctx, true); /* the mode of the passes that are timed */
    swift_gguf_speculator_measure(s.speculator, 1.0);
    const struct figures drafted = generate(&s, text, true), one = generate(&s, plain, false);
    const bool           same    = memcmp(text, plain, sizeof(text)) == 0;
    fprintf(stderr, "\nspeculative %8.1f tok/s   %d tokens in %d passes; %s\nplain       %8.1f tok/s   %s\n",
            drafted.n_tokens / drafted.seconds, (int) drafted.n_tokens, (int) drafted.n_passes,
            swift_gguf_speculator_why(s.speculator), one.n_tokens / one.seconds,
            same ? "the same text" : "ANOTHER TEXT: rows depend on their batch here, and two tokens were nearly tied");
    if (profile != NULL && !swift_gguf_speculator_save(s.speculator, why, sizeof(why))) {
        fprintf(stderr, "warning: nothing was learned: %s\n", why);
    }
    swift_gguf_speculator_free(s.speculator);
    swift_gguf_sidecar_free(sidecar);
    llama_free(s.ctx);
    llama_model_free(s.model);
    llama_backend_free();
    return 0;
}
