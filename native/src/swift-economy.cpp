#include "swift-economy.h"

#include <algorithm>
#include <cmath>

namespace {

const double FLOOR  = 0.02;            // less likely tokens are not considered
const double MEMORY = 64;              // cycles over which the rate is averaged
const double FADE   = 1.0 - 1.0 / 400; // per generated token
const double KEPT   = 255.0 / 256;

const double BANDS[swift_calibration::N_BANDS] = { 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99 };

struct prior {
    double acceptance[swift_calibration::N_BANDS];
    double weight; // counts as much as this number of judged tokens
};

// Of layer-skip nothing is assumed: a band that is never tried would stay unknown.
const prior PRIORS[SWIFT_SOURCE_COUNT] = {
    { { 0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.5, 0.5, 0.7, 0.85, 0.93, 0.97 },       8.0 },
    { { 0.03, 0.04, 0.05, 0.08, 0.17, 0.15, 0.25, 0.3, 0.4, 0.35, 0.35, 0.55 }, 8.0 },
    { { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 },                                   2.0 },
};

size_t band_of(double probability) {
    return std::upper_bound(BANDS + 1, BANDS + swift_calibration::N_BANDS, probability) - BANDS - 1;
}

} // namespace

double swift_calibration::faded(const band & known) const {
    return std::pow(FADE, (double) (now - known.at));
}

double swift_calibration::share(const band & known, double prior, double weight) const {
    const double fade = faded(known);
    return (known.accepted * fade + prior * weight) / (known.judged * fade + weight);
}

void swift_calibration::count(band & known, bool accepted) {
    const double fade = faded(known);
    known.accepted    = known.accepted * fade + accepted;
    known.judged      = known.judged * fade + 1.0;
    known.at          = now;
}

double swift_calibration::acceptance(const swift_offer & offer) const {
    const size_t band = band_of(offer.probability);
    return share(bands[offer.source][band], PRIORS[offer.source].acceptance[band], PRIORS[offer.source].weight);
}

double swift_calibration::first_acceptance(swift_source source) const {
    double sum = 0.0;
    for (const double each : PRIORS[source].acceptance) {
        sum += each;
    }
    return share(first[source], sum / N_BANDS, PRIORS[source].weight);
}

double swift_calibration::evidence(swift_source source) const {
    return first[source].judged * faded(first[source]);
}

void swift_calibration::judge(const std::vector<swift_offer> & offers, int32_t token) {
    std::array<bool, SWIFT_SOURCE_COUNT> seen = {};
    for (const swift_offer & offer : offers) {
        const bool is_right = offer.token == token;
        count(bands[offer.source][band_of(offer.probability)], is_right);
        if (!seen[offer.source]) {
            seen[offer.source] = true;
            count(first[offer.source], is_right);
        }
    }
}

void swift_calibration::recall(swift_source source, bool is_right, double probability) {
    judge({
                  { 0, probability, source }
    },
          is_right ? 0 : -1);
}

void swift_economy::look(int32_t n, bool with_least) {
    if (n != n_rows) { // tokens of a pass of several sequences are cheaper: recent gains are shares of that
        const double before = plain_ms();
        n_rows              = n;
        ms *= plain_ms() / before;
    }
    if (with_least) {
        // unlikely tokens may fill up a pass at no extra cost
        least = std::max(FLOOR, 0.5 * row_ms(n_rows) * rate());
    }
}

double swift_economy::rate() const {
    const double plain = plain_ms(), some = MEMORY / 4 * n_rows; // averaged with some cycles of plain decoding
    return std::max(1.0 / plain, (tokens + some) / (ms + some * plain));
}

void swift_economy::took(int32_t n_tokens, double cycle_ms) {
    const double fade = 1.0 - 1.0 / MEMORY;
    tokens            = tokens * fade + n_tokens;
    ms                = ms * fade + cycle_ms;
}

bool swift_economy::pays(swift_source source, double joint, double covered, double cost_ms, int32_t n_nodes) const {
    const double gain = joint * calibration.first_acceptance(source) - rate() * row_ms(n_rows + n_nodes);
    return -joint * covered - rate() * cost_ms + gain > 0;
}

// What one more row adds to a pass of `width`. Where several rows are cheaper together, this is their average.
double swift_economy::row_ms(int32_t width) const {
    double least_ms = std::numeric_limits<double>::infinity();
    for (int32_t wider = width + 1; wider < std::max(width, MAX_NODES) + 2; ++wider) {
        least_ms = std::min(least_ms, (prices.verify_ms(wider) - prices.verify_ms(width)) / (wider - width));
    }
    return std::max(0.0, least_ms);
}

int32_t swift_economy::affordable(int32_t n_max, double credit_ms) const {
    const double most_ms = prices.verify_ms(n_rows) + credit_ms;
    int32_t      n       = n_max;
    while (n > 0 && prices.verify_ms(n_rows + n) > most_ms) {
        --n;
    }
    return std::max(n, 0);
}

size_t swift_economy::best_cut(const std::vector<double> & joints) const {
    const double each = rate();
    double       best = 0.0 - each * prices.verify_ms(n_rows), sum = 0.0;
    size_t       n = 0;
    for (size_t i = 0; i < joints.size(); ++i) {
        sum += joints[i];
        const double worth = sum - each * prices.verify_ms(n_rows + (int32_t) i + 1);
        if (worth > best) {
            best = worth;
            n    = i + 1;
        }
    }
    return n;
}

void swift_guard::begin(bool trusted) {
    balance = std::min(balance, 1.0);
    trust   = trusted ? 3.0 : 0.0; // otherwise bad luck would stop good drafts
}

void swift_guard::count(int32_t n_tokens, double ms, double plain_ms, bool drafted) {
    const double passes = ms / plain_ms;
    const double gain   = drafted ? n_tokens - passes : 0.0;
    balance             = std::min(8.0, balance + gain + 0.01 * passes); // old gains do not pay for new losses
}

double swift_pace::factor() const { return std::exp(log); }

void swift_pace::observe(double took_ms, double expected_ms) {
    if (!(expected_ms > 0.0) || !std::isfinite(expected_ms) || !(took_ms > 0.0)) {
        return;
    }
    ++n; // what is expected at first may be an estimate
    const double part = std::max(1.0 / 16, 1.0 / (n + 1));
    log += std::clamp(std::log(took_ms / expected_ms), -NOISE, NOISE) * part;
    log = std::max(-NOISE, log);
}

void swift_pace::rest() { log *= KEPT; }
