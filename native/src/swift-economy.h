// What drafts are worth and what they may cost: the numbers and formulas of swift_gguf/planning, which derives them.
// There a pass has one sequence. Here it may have several: each has a token that is decoded anyway, and draft tokens of
// all of them are rows of the same pass. With one sequence both give the same numbers.

#pragma once

#include "swift-costs.h"
#include "swift-offer.h"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

// Acceptance rates of draft tokens by source and confidence. Counts decay with every generated token.
class swift_calibration {
public:
    static constexpr size_t N_BANDS = 12;

    double acceptance(const swift_offer & offer) const;
    double first_acceptance(swift_source source) const; // before the confidence is known
    double evidence(swift_source source) const;         // how many of its likeliest offers were judged

    // the target chose `token` where these were offered; each source's likeliest come first
    void judge(const std::vector<swift_offer> & offers, int32_t token);

    // an offer that was recorded earlier
    void recall(swift_source source, bool is_right, double probability);

    void passed(int64_t n_tokens) { now += n_tokens; }

private:
    struct band {
        double  accepted = 0.0, judged = 0.0;
        int64_t at = 0; // when the counts were last updated, in generated tokens
    };

    void   count(band & known, bool accepted);
    double faded(const band & known) const;
    double share(const band & known, double prior, double weight) const;

    std::array<std::array<band, N_BANDS>, SWIFT_SOURCE_COUNT> bands;
    std::array<band, SWIFT_SOURCE_COUNT>                      first;
    int64_t                                                   now = 0;
};

class swift_economy {
public:
    static constexpr int32_t MAX_NODES = 32;

    swift_economy(swift_calibration & calibration, swift_costs_here & prices) :
        calibration(calibration), prices(prices) {}

    // The coming pass decodes a token of each of this many sequences. Before every draft.
    void look(int32_t n_rows, bool with_least);

    double plain_ms() const { return prices.verify_ms(n_rows) / n_rows; } // of a token, by plain decoding
    double rate() const;                                                  // tokens per millisecond of plain decoding, or of recent cycles if that is more
    void   took(int32_t n_tokens, double ms);

    double joint(double joint, const swift_offer & offer) const { return joint * calibration.acceptance(offer); }
    bool   includes(double joint) const { return joint >= least; }

    // Does a drafting pass after a path of probability `joint` save time? covered: the best offer that is there.
    // n_nodes: draft tokens of all sequences so far.
    bool pays(swift_source source, double joint, double covered, double cost_ms, int32_t n_nodes) const;

    // how many draft tokens of one sequence can be verified if, all rejected, they may lose `credit_ms`
    int32_t affordable(int32_t n_max, double credit_ms) const;

    // how many of the tokens, likeliest first, to verify
    size_t best_cut(const std::vector<double> & joints) const;

    // cost of verifying one draft token, in passes
    double row_share() const { return std::max(0.0, prices.verify_ms(n_rows + 1) / prices.verify_ms(n_rows) - 1.0); }

private:
    double row_ms(int32_t width) const;

    swift_calibration & calibration;
    swift_costs_here &  prices;
    int32_t             n_rows = 1;
    double              tokens = 0.0, ms = 0.0, least = 0.02;
};

// Never slower: in every answer drafts may lose one pass, a hundredth of the time, and what they gained.
class swift_guard {
public:
    void   begin(bool trusted);
    double credit() const { return balance + trust; } // in passes
    void   count(int32_t n_tokens, double ms, double plain_ms, bool drafted);

private:
    double balance = 1.0, trust = 0.0;
};

// How much longer a source's passes take than expected, as seen recently.
class swift_pace {
public:
    static constexpr double NOISE = 0.3; // a larger surprise may be a hiccup; natural logarithm

    double factor() const;
    void   observe(double took_ms, double expected_ms);
    void   rest(); // a cycle without such a pass

private:
    double  log = 0.0;
    int32_t n   = 0;
};
