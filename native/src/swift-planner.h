// Decides before each pass how many draft tokens of which source every sequence gets, if any: the planner of
// swift_gguf/planning/planner.py, for chains, and for several sequences in one pass.

#pragma once

#include "swift-economy.h"
#include "swift-ngram.h"
#include "swift-recycling.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

class swift_planner {
public:
    // Runs a drafting pass for a sequence after its text and `chain`, of which the last `n_missing` tokens (the pending
    // token included) were not decoded yet. Gives the likeliest token and its probability. Returns 0; 1 if it cannot go
    // on here; an error code if it never can.
    using drafting_pass = std::function<int32_t(int32_t seq_id, const std::vector<int32_t> & chain, int32_t n_missing, swift_offer & offer)>;

    struct request {
        int32_t              seq_id;
        const int32_t *      text; // the last token is pending: sampled, but not decoded
        size_t               n_text;
        int32_t              n_max;
        std::vector<int32_t> draft; // the result
    };

    swift_planner(swift_costs costs, std::function<bool(int32_t)> is_eog) :
        here(std::move(costs)), economy(calibration, here), is_eog(std::move(is_eog)) {}

    void set_layer_skip(drafting_pass pass, swift_subnetwork_ptr subnetwork);

    void begin(int32_t seq_id); // another answer

    // n_others: rows of the coming pass that belong to sequences without a request
    void draft(std::vector<request> & requests, int32_t n_others);

    // The draft and the pass took so long; 0: unknown, or the pass had other work, too.
    void passed(double draft_ms, double pass_ms);

    // The target chose these tokens: draft tokens and one more, which may be missing at the end.
    void accept(int32_t seq_id, const int32_t * tokens, int32_t n_tokens);

    // Should the target's likeliest tokens of this sequence's rows be read? That takes time.
    bool wants_rows(int32_t seq_id);
    void has_read(double ms_per_row) { reading_ms = ms_per_row; }

    const std::vector<int32_t> & chain(int32_t seq_id) { return sequences[seq_id].chain; }
    const std::vector<int32_t> & end(int32_t seq_id) { return sequences[seq_id].end; }

    std::string why() const;

    swift_calibration calibration;
    swift_recycling   recycling;
    swift_costs_here  here;

private:
    struct sequence {
        swift_ngram          ngram;
        std::vector<int32_t> end; // the last two tokens of the text
        swift_guard          guard;

        // of the latest draft
        std::vector<int32_t>                  chain;
        std::vector<std::vector<swift_offer>> offered; // after the text, and after each token of the chain
        size_t                                n_text    = 0;
        int32_t                               n_max     = 0;
        int32_t                               n_decoded = 0; // tokens that drafting passes have decoded
        double                                credit_ms = 0.0, expected_ms = 0.0, joint = 1.0;
        int32_t                               n_chosen = -1;    // by the target; -1: not known yet
        bool                                  is_open  = false; // waits for the target's choice
    };
    struct candidate {
        double      joint;
        int64_t     serial;
        size_t      i; // the request
        swift_offer offer;
    };

    std::vector<swift_offer> look_up(sequence & of);
    void                     extend(request & of, size_t i, std::vector<candidate> & heap);
    void                     grow(std::vector<request> & requests);
    void                     end_cycle();
    double                   draft_pass_ms() const { return here.draft_ms(*subnetwork) * pace.factor(); }

    swift_economy                economy;
    swift_pace                   pace;
    std::function<bool(int32_t)> is_eog;
    drafting_pass                run;
    swift_subnetwork_ptr         subnetwork;
    bool                         is_broken = false;

    std::map<int32_t, sequence> sequences;
    std::vector<int32_t>        cycle;                   // sequences of the latest draft
    int32_t                     n_rows = 1, n_nodes = 0; // rows that are decoded anyway; draft tokens
    double                      took_draft_ms = 0.0, took_pass_ms = 0.0;
    int64_t                     serial      = 0;
    int32_t                     since_draft = 64;

    double  worth = 0.1, reading_ms = 0.0; // what an offer of recycling gains, on average; the time to read a row
    int64_t turn = 0;
};
