// --spec-type swift: a speculator (swift_gguf.h) as a type of speculation of llama.cpp. Included once, by
// common/speculative.cpp, after common_speculative_impl.

#include "swift_gguf.h"

#include <filesystem>
#include <set>

static const double SWIFT_MEASURE_S = 1.0; // before the first request, where costs are not known yet

struct common_speculative_impl_swift : public common_speculative_impl {
    common_speculative_impl_swift(const common_params_speculative_swift & params, uint32_t n_seq) :
        common_speculative_impl(COMMON_SPECULATIVE_TYPE_SWIFT, n_seq, params.n_max), ctx(params.ctx), known(n_seq) {
        if (ctx == nullptr) {
            throw std::runtime_error("swift works in the server only");
        }
        char why[256] = "";
        load_sidecar(params, why, sizeof(why));
        std::string profile = params.profile;
        speculator          = swift_gguf_speculator_init(ctx, profile.empty() ? nullptr : profile.c_str(), sidecar, why, sizeof(why));
        if (speculator == nullptr && !profile.empty() && swift_gguf_rollback_refusal(ctx) == nullptr) {
            SPC_WRN("swift: the profile %s is not used: %s\n", profile.c_str(), why);
            profile.clear();
            speculator = swift_gguf_speculator_init(ctx, nullptr, sidecar, why, sizeof(why));
        }
        if (speculator == nullptr) {
            SPC_WRN("swift: no speculation: %s\n", why);
            return;
        }
        if (const int32_t error = swift_gguf_speculator_measure(speculator, SWIFT_MEASURE_S)) {
            SPC_WRN("swift: passes cannot be timed now: %s\n", swift_gguf_error_name(error));
        }
        is_invariant = swift_gguf_has_kernels(ctx);
        saves        = !profile.empty();
        SPC_INF("swift: speculation is on; profile: %s, sidecar: %s\n", saves ? profile.c_str() : "none", sidecar ? "yes" : "none");
    }

    ~common_speculative_impl_swift() override {
        char why[256] = "";
        if (saves && !swift_gguf_speculator_save(speculator, why, sizeof(why))) {
            SPC_WRN("swift: the profile was not written: %s\n", why);
        }
        swift_gguf_speculator_free(speculator);
        swift_gguf_sidecar_free(sidecar);
    }

    void begin(llama_seq_id seq_id, const llama_tokens & /*prompt*/) override {
        known[seq_id] = {};
        if (speculator != nullptr) {
            swift_gguf_speculator_begin(speculator, seq_id);
        }
    }

    void draft(common_speculative_draft_params_vec & dparams) override {
        if (speculator == nullptr) {
            return;
        }
        std::vector<swift_gguf_draft_request> requests;
        for (llama_seq_id seq_id = 0; seq_id < (llama_seq_id) n_seq; ++seq_id) {
            common_speculative_draft_params & dp   = dparams[seq_id];
            sequence &                        self = known[seq_id];
            self.in_pass                           = false;
            if (!dp.drafting) {
                continue;
            }
            tell(seq_id, *dp.prompt, dp.id_last);
            dp.result->resize(std::min(dp.n_max < 0 ? n_max : dp.n_max, n_max));
            requests.push_back({ seq_id, self.text.data(), (int32_t) self.text.size(), dp.pos0, (int32_t) dp.result->size(), dp.result->data(), 0 });
        }
        if (requests.empty()) {
            return;
        }
        // sequences of the last pass that draft nothing, or by another type, have a row in the coming one, too
        const int32_t n_others = std::max(0, n_decoding - (int32_t) requests.size());
        const int32_t error    = swift_gguf_speculator_draft(speculator, requests.data(), (int32_t) requests.size(), n_others);
        n_rows                 = (int32_t) requests.size() + n_others;
        for (const swift_gguf_draft_request & of : requests) {
            dparams[of.seq_id].result->resize(error == 0 ? of.n_draft : 0);
            known[of.seq_id].in_pass = error == 0;
            known[of.seq_id].n_draft = error == 0 ? of.n_draft : 0;
            n_rows += known[of.seq_id].n_draft;
        }
        if (error != 0) {
            SPC_WRN("swift: no draft: %s\n", swift_gguf_error_name(error));
        }
        switch_invariant(true);
    }

    bool process(const common_batch & batch) override {
        if (speculator == nullptr) {
            return true;
        }
        switch_invariant(false);
        if (n_rows > 0 && batch.size() == n_rows) { // a prompt in the same pass would take most of its time
            swift_gguf_speculator_passed(speculator, -1, -1);
        }
        n_rows = 0;
        std::set<llama_seq_id> decoding;
        for (int32_t i = 0; i < batch.size(); ++i) {
            const common_batch::token & token = batch.tokens[i];
            sequence &                  self  = known[token.seq_id];
            if (token.output) {
                decoding.insert(token.seq_id);
            }
            if (!self.in_pass || self.row >= 0 || !token.output) {
                continue;
            }
            self.row = i;
            if (self.n_draft == 0) {
                swift_gguf_speculator_learn(speculator, token.seq_id, i, 1);
            }
        }
        n_decoding = (int32_t) decoding.size();
        return true;
    }

    void accept(llama_seq_id seq_id, uint16_t n_accepted, bool is_other) override {
        const sequence & self = known[seq_id];
        if (speculator != nullptr && !is_other && self.in_pass && self.row >= 0) {
            swift_gguf_speculator_learn(speculator, seq_id, self.row, 1 + n_accepted);
        }
    }

private:
    struct sequence {
        llama_tokens text; // the last token is not decoded yet
        int32_t      n_draft = 0;
        int32_t      row     = -1; // of the last token of the text, in the latest pass
        bool         in_pass = false;
    };

    // What the target chose is the text that came since the last draft.
    void tell(llama_seq_id seq_id, const llama_tokens & prompt, llama_token last) {
        sequence &   self = known[seq_id];
        const size_t n    = self.text.size();
        if (n > 0 && n < prompt.size() + 1 && self.row >= 0) {
            llama_tokens chosen(prompt.begin() + n, prompt.end());
            chosen.push_back(last);
            swift_gguf_speculator_accept(speculator, seq_id, chosen.data(), (int32_t) chosen.size());
        }
        self.text = prompt;
        self.text.push_back(last);
        self.row = -1;
    }

    // Without kernels of ours the mode is slow for prompts: only passes after a draft have it.
    void switch_invariant(bool on) {
        if (!is_invariant) {
            swift_gguf_set_batch_invariant(ctx, on);
        }
    }

    void load_sidecar(const common_params_speculative_swift & params, char * why, size_t n_why) {
        std::string path = params.sidecar;
        if (path.empty()) {
            const std::string beside = std::filesystem::path(params.model).replace_extension().string() + ".swift.gguf";
            path                     = std::filesystem::exists(beside) ? beside : "";
        }
        if (!path.empty() && path != "none" && (sidecar = swift_gguf_sidecar_load(llama_get_model(ctx), path.c_str(), why, n_why)) == nullptr) {
            SPC_WRN("swift: the sidecar %s is not used: %s\n", path.c_str(), why);
        }
    }

    llama_context *         ctx;
    swift_gguf_sidecar *    sidecar    = nullptr;
    swift_gguf_speculator * speculator = nullptr;
    std::vector<sequence>   known;
    int32_t                 n_rows       = 0; // of the pass after the latest draft
    int32_t                 n_decoding   = 0; // sequences with a row in the latest pass
    bool                    is_invariant = false, saves = false;
};
