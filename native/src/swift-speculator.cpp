// Speculators: the planner with a context.

#include "swift-planner.h"
#include "swift-profile.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

using clock_type = std::chrono::steady_clock;

static double ms_since(clock_type::time_point start) {
    return std::chrono::duration<double, std::milli>(clock_type::now() - start).count();
}

struct swift_gguf_speculator {
    swift_gguf_speculator(llama_context & ctx, std::string profile) :
        ctx(ctx), profile(std::move(profile)) {}

    llama_context &                ctx;
    std::string                    profile; // empty: none
    std::unique_ptr<swift_planner> planner;

    const swift_gguf_draft_request * requests   = nullptr; // while they are drafted
    int32_t                          n_requests = 0;
    double                           draft_ms   = 0.0;
    clock_type::time_point           drafted;
    std::string                      why;

    const swift_gguf_draft_request & request_of(int32_t seq_id) const {
        return *std::find_if(requests, requests + n_requests, [&](const auto & each) { return each.seq_id == seq_id; });
    }
};

namespace {

// Tokens of one sequence, the last of them with logits, or all.
int32_t decode(llama_context & ctx, const std::vector<llama_token> & tokens, llama_pos pos, llama_seq_id seq_id, bool all) {
    const int32_t               n = (int32_t) tokens.size();
    std::vector<llama_pos>      positions;
    std::vector<int32_t>        n_seq_id(n, 1);
    std::vector<llama_seq_id *> seq_ids(n, &seq_id);
    std::vector<int8_t>         outputs(n, all);
    outputs.back() = 1;
    for (int32_t i = 0; i < n; ++i) {
        positions.push_back(pos + i);
    }
    llama_batch batch = {};
    batch.n_tokens    = n;
    batch.token       = const_cast<llama_token *>(tokens.data());
    batch.pos         = positions.data();
    batch.n_seq_id    = n_seq_id.data();
    batch.seq_id      = seq_ids.data();
    batch.logits      = outputs.data();
    try {
        const int32_t code = llama_decode(&ctx, batch);
        return code == 0 ? 0 : SWIFT_GGUF_ERROR_DECODE - std::abs(code);
    } catch (...) { // exceptions of the graph build and of allocations
        return SWIFT_GGUF_ERROR_GRAPH;
    }
}

bool holds_all_before(llama_context & ctx, llama_seq_id seq_id, llama_pos pos) {
    return llama_memory_seq_pos_max(llama_get_memory(&ctx), seq_id) == pos - 1;
}

int32_t drafting_pass(
        swift_gguf_speculator &      speculator,
        const swift_subnetwork_ptr & subnetwork,
        int32_t                      seq_id,
        const std::vector<int32_t> & chain,
        int32_t                      n_missing,
        swift_offer &                offer) {
    const swift_gguf_draft_request & of  = speculator.request_of(seq_id);
    const int32_t                    n   = (int32_t) chain.size() + 1;
    const llama_pos                  pos = of.pos + n - n_missing;
    if (!holds_all_before(speculator.ctx, seq_id, pos)) {
        return 1; // another program's cells are left alone
    }
    std::vector<llama_token> tokens(chain.end() - std::min(n_missing, n - 1), chain.end());
    if (n_missing == n) {
        tokens.insert(tokens.begin(), of.text[of.n_text - 1]);
    }
    const swift_scope scope(speculator.ctx, subnetwork);
    if (decode(speculator.ctx, tokens, pos, seq_id, false) != 0) {
        return 1;
    }
    float         probability = 0;
    const int32_t n_found     = swift_gguf_top(&speculator.ctx, -1, 1, &offer.token, &probability);
    offer.probability         = probability;
    offer.source              = SWIFT_SOURCE_LAYER_SKIP;
    return n_found == 1 ? 0 : SWIFT_GGUF_ERROR_LOGITS;
}

bool is_valid(const llama_context & ctx, const swift_gguf_draft_request & of) {
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&ctx.get_model()));
    return of.seq_id >= 0 && of.seq_id < (llama_seq_id) llama_n_seq_max(&ctx) && of.text != nullptr && of.n_text > 0 &&
            of.pos >= 0 && of.n_max >= 0 && (of.draft != nullptr || of.n_max == 0) && of.text[of.n_text - 1] >= 0 &&
            of.text[of.n_text - 1] < n_vocab;
}

int32_t draft(swift_gguf_speculator & speculator, swift_gguf_draft_request * requests, int32_t n_requests, int32_t n_others) {
    const auto                          start = clock_type::now();
    std::vector<swift_planner::request> wanted;
    for (int32_t i = 0; i < n_requests; ++i) {
        const swift_gguf_draft_request & of   = requests[i];
        const int64_t                    room = (int64_t) llama_n_ctx_seq(&speculator.ctx) - of.pos - 1;
        wanted.push_back({ of.seq_id, of.text, (size_t) of.n_text, (int32_t) std::clamp<int64_t>(room, 0, of.n_max), {} });
        requests[i].n_draft = 0;
    }
    speculator.requests   = requests;
    speculator.n_requests = n_requests;
    speculator.planner->draft(wanted, n_others);

    // skipped layers stored nothing for these positions, so they must go
    const llama_memory_t memory = llama_get_memory(&speculator.ctx);
    for (int32_t i = 0; i < n_requests; ++i) {
        if (llama_memory_seq_pos_max(memory, requests[i].seq_id) >= requests[i].pos &&
            !llama_memory_seq_rm(memory, requests[i].seq_id, requests[i].pos, -1)) {
            return SWIFT_GGUF_ERROR_ROLLBACK;
        }
        requests[i].n_draft = (int32_t) wanted[i].draft.size();
        std::copy(wanted[i].draft.begin(), wanted[i].draft.end(), requests[i].draft);
    }
    speculator.drafted  = clock_type::now();
    speculator.draft_ms = ms_since(start);
    return 0;
}

std::unique_ptr<swift_gguf_speculator> init(llama_context & ctx, const char * path, const swift_gguf_sidecar * sidecar) {
    swift_profile found = swift_profile_read(ctx, path, sidecar);

    auto                made   = std::make_unique<swift_gguf_speculator>(ctx, path != nullptr ? path : "");
    const llama_vocab * vocab  = llama_model_get_vocab(&ctx.get_model());
    const auto          is_eog = [vocab](int32_t token) { return llama_vocab_is_eog(vocab, token); };
    made->planner              = std::make_unique<swift_planner>(found.costs ? *found.costs : swift_costs::estimated(ctx, sidecar), is_eog);

    for (swift_recycling::row & row : found.recycling) {
        made->planner->recycling.put(std::move(row));
    }
    for (const auto & [is_right, probability] : found.seen) {
        made->planner->calibration.recall(SWIFT_SOURCE_LAYER_SKIP, is_right, probability);
    }
    const swift_subnetwork_ptr subnetwork = found.subnetwork ? found.subnetwork : swift_narrow(ctx.get_model(), sidecar, true);
    if (subnetwork) {
        swift_gguf_speculator & self = *made;
        made->planner->set_layer_skip(
                [&self, subnetwork](int32_t seq_id, const std::vector<int32_t> & chain, int32_t n_missing, swift_offer & offer) {
                    return drafting_pass(self, subnetwork, seq_id, chain, n_missing, offer);
                },
                subnetwork);
    }
    return made;
}

} // namespace

swift_gguf_speculator * swift_gguf_speculator_init(
        llama_context *            ctx,
        const char *               profile,
        const swift_gguf_sidecar * sidecar,
        char *                     error,
        size_t                     n_error) {
    if (ctx == nullptr) {
        return swift_refuse(error, n_error, "there is no context");
    }
    if (const char * refusal = swift_gguf_rollback_refusal(ctx)) {
        return swift_refuse(error, n_error, refusal);
    }
    try {
        return init(*ctx, profile, sidecar).release();
    } catch (const std::exception & reason) {
        return swift_refuse(error, n_error, reason.what());
    }
}

void swift_gguf_speculator_free(swift_gguf_speculator * speculator) { delete speculator; }

int32_t swift_gguf_speculator_measure(swift_gguf_speculator * speculator, double seconds) try {
    if (speculator == nullptr || !holds_all_before(speculator->ctx, 0, 0)) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    swift_planner & planner = *speculator->planner;
    if (planner.here.is_known()) {
        return 0;
    }
    llama_context &   ctx     = speculator->ctx;
    const int32_t     n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&ctx.get_model()));
    const int32_t     room    = std::min<int32_t>(llama_n_batch(&ctx), llama_n_ctx_seq(&ctx));
    const auto        start   = clock_type::now();
    swift_costs       costs   = planner.here.measured();
    const swift_scope whole(ctx, nullptr);

    // Rounds, so that a slow spell affects all widths; the fastest time counts, as disturbances only add time. The
    // width of drafts and of plain decoding come first: there may not be time for all.
    std::map<int32_t, double> fastest;
    for (int32_t round = 0; round < 3 && ms_since(start) < 1e3 * seconds; ++round) {
        for (const int32_t width : { 1, 2, 8, 4, 3, 6 }) {
            if (width > room || (round > 0 && ms_since(start) >= 1e3 * seconds)) {
                continue;
            }
            std::vector<llama_token> tokens; // different ones: a mixture of experts reads other experts for them
            for (int32_t i = 0; i < width; ++i) {
                tokens.push_back((int32_t) (7919LL * (i + 1) % n_vocab));
            }
            for (int32_t warm = 0; warm < 2; ++warm) { // the first pass of a width builds its graph
                const auto    begin = clock_type::now();
                const int32_t code  = decode(ctx, tokens, 0, 0, true);
                llama_synchronize(&ctx);
                const double ms = ms_since(begin);
                if (!llama_memory_seq_rm(llama_get_memory(&ctx), 0, 0, -1) || code != 0) {
                    return code != 0 ? code : SWIFT_GGUF_ERROR_ROLLBACK;
                }
                const auto known = fastest.find(width);
                if (warm == 1 || known != fastest.end()) {
                    fastest[width] = known != fastest.end() ? std::min(known->second, ms) : ms;
                }
            }
            if (ms_since(start) >= 1e3 * seconds && fastest.count(2) > 0) {
                break;
            }
        }
    }
    if (fastest.count(1) == 0) {
        return 0;
    }
    costs = costs.scaled(fastest[1] / costs.pass_ms[0].second);
    for (const auto & [width, ms] : fastest) {
        costs.set_pass(width, ms);
    }
    costs.untimed.erase("passes");
    planner.here.update(std::move(costs));
    return 0;
} catch (...) {
    return SWIFT_GGUF_ERROR_GRAPH;
}

int32_t swift_gguf_speculator_begin(swift_gguf_speculator * speculator, llama_seq_id seq_id) try {
    if (speculator == nullptr || seq_id < 0) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    speculator->planner->begin(seq_id);
    return 0;
} catch (...) { // std::bad_alloc
    return SWIFT_GGUF_ERROR_GRAPH;
}

int32_t swift_gguf_speculator_draft(
        swift_gguf_speculator *    speculator,
        swift_gguf_draft_request * requests,
        int32_t                    n_requests,
        int32_t                    n_others) try {
    if (speculator == nullptr || requests == nullptr || n_requests < 1 || n_others < 0) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    for (int32_t i = 0; i < n_requests; ++i) {
        const auto is_same = [&](const auto & other) { return other.seq_id == requests[i].seq_id; };
        if (!is_valid(speculator->ctx, requests[i]) || std::any_of(requests, requests + i, is_same)) {
            return SWIFT_GGUF_ERROR_ARGUMENT;
        }
    }
    return draft(*speculator, requests, n_requests, n_others);
} catch (...) {
    return SWIFT_GGUF_ERROR_GRAPH;
}

void swift_gguf_speculator_passed(swift_gguf_speculator * speculator, double draft_ms, double pass_ms) {
    if (speculator != nullptr) {
        const double own_ms = ms_since(speculator->drafted);
        speculator->planner->passed(draft_ms < 0 ? speculator->draft_ms : draft_ms, pass_ms < 0 ? own_ms : pass_ms);
    }
}

int32_t swift_gguf_speculator_learn(swift_gguf_speculator * speculator, llama_seq_id seq_id, int32_t row, int32_t n_rows) try {
    if (speculator == nullptr || n_rows < 1) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    swift_planner &      planner = *speculator->planner;
    std::vector<int32_t> path    = planner.end(seq_id);
    if (path.empty() || n_rows > (int32_t) planner.chain(seq_id).size() + 1) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    if (!planner.wants_rows(seq_id)) {
        return 0;
    }
    if (path.size() == 1) {
        path.insert(path.begin(), swift_recycling::NONE);
    }
    path.insert(path.end(), planner.chain(seq_id).begin(), planner.chain(seq_id).begin() + n_rows - 1);
    const auto start = clock_type::now();
    for (int32_t i = 0; i < n_rows; ++i) {
        llama_token   tokens[swift_recycling::N_OFFERS];
        float         probabilities[swift_recycling::N_OFFERS];
        const int32_t n = swift_gguf_top(&speculator->ctx, row + i, swift_recycling::N_OFFERS, tokens, probabilities);
        if (n < 0) {
            return n;
        }
        planner.recycling.learn(path[i], path[i + 1], tokens, probabilities, n);
    }
    planner.has_read(ms_since(start) / n_rows);
    return 0;
} catch (...) {
    return SWIFT_GGUF_ERROR_GRAPH;
}

int32_t swift_gguf_speculator_accept(swift_gguf_speculator * speculator, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens) try {
    if (speculator == nullptr || tokens == nullptr || n_tokens < 1) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    speculator->planner->accept(seq_id, tokens, n_tokens);
    return 0;
} catch (...) {
    return SWIFT_GGUF_ERROR_GRAPH;
}

int32_t swift_gguf_speculate(
        swift_gguf_speculator * speculator,
        llama_sampler *         sampler,
        llama_seq_id            seq_id,
        const llama_token *     text,
        int32_t                 n_text,
        int32_t                 n_max,
        llama_token *           tokens) try {
    if (speculator == nullptr || sampler == nullptr || tokens == nullptr) {
        return SWIFT_GGUF_ERROR_ARGUMENT;
    }
    // `tokens` takes the draft first: swift_gguf_verify reads it from a copy
    swift_gguf_draft_request request = { seq_id, text, n_text, n_text - 1, std::min(n_max, (int32_t) llama_n_batch(&speculator->ctx) - 1), tokens, 0 };
    if (const int32_t error = swift_gguf_speculator_draft(speculator, &request, 1, 0)) {
        return error;
    }
    const std::vector<llama_token> draft(tokens, tokens + request.n_draft);
    double                         pass_ms = 0.0;
    const int32_t                  n       = swift_verify(&speculator->ctx, sampler, seq_id, text[n_text - 1], n_text - 1, draft.data(), (int32_t) draft.size(), tokens, pass_ms);
    if (n > 0) {
        swift_gguf_speculator_passed(speculator, -1, pass_ms);
        swift_gguf_speculator_learn(speculator, seq_id, 0, n);
        swift_gguf_speculator_accept(speculator, seq_id, tokens, n);
    }
    return n;
} catch (...) {
    return SWIFT_GGUF_ERROR_GRAPH;
}

const char * swift_gguf_speculator_why(swift_gguf_speculator * speculator) {
    if (speculator == nullptr) {
        return "there is no speculator";
    }
    speculator->why = speculator->planner->why();
    return speculator->why.c_str();
}

bool swift_gguf_speculator_save(swift_gguf_speculator * speculator, char * error, size_t n_error) {
    if (speculator == nullptr || speculator->profile.empty()) {
        swift_refuse(error, n_error, "there is no file for the profile");
        return false;
    }
    try {
        const swift_planner & planner = *speculator->planner;
        swift_profile_add(speculator->ctx, speculator->profile, planner.here.refreshed(), planner.recycling);
        return true;
    } catch (const std::exception & reason) {
        swift_refuse(error, n_error, reason.what());
        return false;
    }
}
