#include "swift-costs.h"
#include "swift-profile.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <stdexcept>

using json = nlohmann::json;

namespace {

const int64_t STEP      = 256; // tokens; llama.cpp pads what attention reads to a multiple of this
const int32_t MAX_WIDTH = 65;
const size_t  FEW       = 5;           // passes from which the time of a width is learned
const size_t  PLAIN     = 2;           // plain passes after which their time is known
const double  KEPT      = 255.0 / 256; // per one-token pass, so that a width that was given up is tried again
const double  NOISE     = 0.3;         // a larger surprise may be a hiccup; natural logarithm
const double  MORE      = 0.5;         // what each token after the first is thought to add to a pass, in passes

const double GUESSED_BYTES_PER_MS = 1e7;

const char * const PARTS[] = { "passes", "sub-layers", "sidecar", "rows", "switch" };

double real(const json & value) {
    const double number = value.is_number() ? value.get<double>() : NAN;
    if (!std::isfinite(number) || number < 0) {
        throw std::runtime_error("a time is no number");
    }
    return number;
}

std::vector<double> reals(const json & values, size_t n) {
    std::vector<double> numbers;
    for (const json & value : values) {
        numbers.push_back(real(value));
    }
    if (!values.is_array() || numbers.size() != n) {
        throw std::runtime_error("times of another number of layers");
    }
    return numbers;
}

std::vector<double> times(std::vector<double> numbers, double factor) {
    for (double & number : numbers) {
        number *= factor;
    }
    return numbers;
}

double sum(const std::vector<double> & numbers) {
    double all = 0;
    for (const double number : numbers) {
        all += number;
    }
    return all;
}

} // namespace

double swift_costs::verify_ms(int32_t width) const {
    if (width == 1 || pass_ms.size() == 1) {
        return pass_ms[0].second + (width - 1) * more_ms;
    }
    size_t right                 = std::lower_bound(pass_ms.begin(), pass_ms.end(), std::make_pair(width, 0.0)) - pass_ms.begin();
    right                        = std::min(right, pass_ms.size() - 1);
    const auto & [low, low_ms]   = pass_ms[right - 1];
    const auto & [high, high_ms] = pass_ms[right];
    double slope                 = (high_ms - low_ms) / (high - low);
    if (width > high) { // the last step may be flat by chance
        slope = std::max({ slope, (high_ms - pass_ms[0].second) / high, 0.0 });
    }
    return high_ms + (width - high) * slope;
}

double swift_costs::draft_ms(const swift_subnetwork & subnetwork) const {
    double saved = subnetwork.draft_head ? draft_head_ms : 0.0;
    for (size_t il = 0; il < ffn_ms.size(); ++il) {
        const float share = subnetwork.share((int) il);
        saved += subnetwork.skips_attention((int) il) ? attention_ms[il] : 0.0;
        saved += share <= 0 ? ffn_ms[il] : share < 1 && !narrow_ms.empty() ? narrow_ms[il]
                                                                           : 0.0;
    }
    return std::max(0.0, pass_ms[0].second - saved);
}

swift_costs swift_costs::at(int64_t other) const {
    swift_costs  costs  = *this;
    const double more   = (double) (other - n_kv);
    const double growth = more * sum(kv_ms), least = pass_ms[0].second / 10;
    for (auto & [width, ms] : costs.pass_ms) {
        ms = std::max(least, ms + width * growth);
    }
    for (size_t il = 0; il < kv_ms.size(); ++il) {
        costs.attention_ms[il] = std::max(0.0, attention_ms[il] + more * kv_ms[il]);
    }
    costs.n_kv = other;
    return costs;
}

swift_costs swift_costs::scaled(double factor) const {
    swift_costs costs = *this;
    for (auto & [width, ms] : costs.pass_ms) {
        ms *= factor;
    }
    for (auto * layers : { &costs.attention_ms, &costs.ffn_ms, &costs.kv_ms, &costs.narrow_ms }) {
        *layers = times(*layers, factor);
    }
    for (double * single : { &costs.head_ms, &costs.more_ms, &costs.row_ms, &costs.switch_ms, &costs.draft_head_ms }) {
        *single *= factor;
    }
    return costs;
}

void swift_costs::set_pass(int32_t width, double ms) {
    const auto place = std::lower_bound(pass_ms.begin(), pass_ms.end(), std::make_pair(width, 0.0));
    if (place != pass_ms.end() && place->first == width) {
        place->second = ms;
    } else {
        pass_ms.insert(place, { width, ms });
    }
}

json swift_costs::to_json() const {
    return {
        { "pass_ms",        pass_ms        },
        { "attention_ms",   attention_ms   },
        { "ffn_ms",         ffn_ms         },
        { "kv_ms",          kv_ms          },
        { "head_ms",        head_ms        },
        { "n_kv",           n_kv           },
        { "more_ms",        more_ms        },
        { "row_ms",         row_ms         },
        { "switch_ms",      switch_ms      },
        { "narrow_ms",      narrow_ms      },
        { "draft_head_ms",  draft_head_ms  },
        { "untimed",        untimed        },
        { "is_provisional", is_provisional },
        { "is_busy",        is_busy        },
    };
}

swift_costs swift_costs::from_json(const json & values, size_t n_layer) {
    swift_costs costs;
    for (const json & point : values.at("pass_ms")) {
        const int64_t width = point.at(0).get<int64_t>();
        const double  ms    = real(point.at(1));
        if (width <= (costs.pass_ms.empty() ? 0 : costs.pass_ms.back().first) || width > INT32_MAX || ms == 0) {
            throw std::runtime_error("widths do not ascend, or a pass takes no time");
        }
        costs.pass_ms.emplace_back((int32_t) width, ms);
    }
    if (costs.pass_ms.empty() || costs.pass_ms[0].first != 1) {
        throw std::runtime_error("there is no pass of one token");
    }
    costs.attention_ms   = reals(values.at("attention_ms"), n_layer);
    costs.ffn_ms         = reals(values.at("ffn_ms"), n_layer);
    costs.kv_ms          = reals(values.at("kv_ms"), n_layer);
    const json & narrow  = values.at("narrow_ms");
    costs.narrow_ms      = reals(narrow, narrow.empty() ? 0 : n_layer);
    costs.head_ms        = real(values.at("head_ms"));
    costs.more_ms        = real(values.at("more_ms"));
    costs.row_ms         = real(values.at("row_ms"));
    costs.switch_ms      = real(values.at("switch_ms"));
    costs.draft_head_ms  = real(values.at("draft_head_ms"));
    costs.n_kv           = (int64_t) real(values.at("n_kv"));
    costs.untimed        = values.at("untimed").get<std::set<std::string>>();
    costs.is_provisional = values.at("is_provisional").get<bool>();
    costs.is_busy        = values.at("is_busy").get<bool>();
    for (const std::string & part : costs.untimed) {
        if (std::find(std::begin(PARTS), std::end(PARTS), part) == std::end(PARTS)) {
            throw std::runtime_error("a part of a measurement that there is not");
        }
    }
    return costs;
}

namespace {

struct layers {
    std::vector<swift_gguf_sublayer> attention, ffn;

    explicit layers(size_t n) :
        attention(n), ffn(n) {}
};

double cache_bytes(const swift_gguf_sublayer & sublayer, const llama_context & ctx) {
    return (double) sublayer.kv_bytes / llama_n_ctx(&ctx);
}

// Bytes that a pass reads.
double bytes_of(llama_context & ctx, swift_subnetwork_ptr subnetwork, swift_gguf_cost & cost, int32_t n_tokens = 1) {
    const swift_gguf_subnetwork handle { std::move(subnetwork) };
    if (swift_gguf_pass_cost(&ctx, handle.value ? &handle : nullptr, n_tokens, 1, 0, &cost) != 0) {
        throw std::runtime_error("llama.cpp could not build the graph");
    }
    return (double) (cost.weight_bytes + cost.kv_bytes);
}

// [n_layer]: a time of one kind of sub-layer, divided by the bytes that each reads.
std::vector<double> spread(double total_ms, const std::vector<swift_gguf_sublayer> & kind, const std::vector<bool> & used) {
    std::vector<double> parts;
    for (size_t il = 0; il < kind.size(); ++il) {
        parts.push_back(used[il] ? (double) kind[il].weight_bytes : 0.0);
    }
    const double all = sum(parts);
    return times(parts, total_ms / (all > 0 ? all : 1.0));
}

std::vector<bool> skippable(const std::vector<swift_gguf_sublayer> & kind) {
    std::vector<bool> found;
    for (const swift_gguf_sublayer & sublayer : kind) {
        found.push_back(sublayer.status == SWIFT_GGUF_SUBLAYER_OK);
    }
    return found;
}

bool any(const std::vector<bool> & values) {
    return std::find(values.begin(), values.end(), true) != values.end();
}

swift_subnetwork_ptr without(const std::vector<bool> & attention, const std::vector<bool> & ffn) {
    if (!any(attention) && !any(ffn)) {
        return nullptr;
    }
    auto subnetwork            = std::make_shared<swift_subnetwork>();
    subnetwork->skip_attention = attention;
    for (const bool skipped : ffn) {
        subnetwork->ffn_share.push_back(skipped ? 0.0f : 1.0f);
    }
    return subnetwork;
}

} // namespace

swift_costs swift_costs::estimated(llama_context & ctx, const swift_gguf_sidecar * sidecar) {
    const size_t n_layer = llama_model_n_layer(&ctx.get_model());
    layers       found(n_layer);
    if (swift_gguf_sublayers(&ctx, found.attention.data(), found.ffn.data(), (int32_t) n_layer) != 0) {
        throw std::runtime_error("llama.cpp could not build the graph");
    }
    const std::vector<bool> attention = skippable(found.attention), ffn = skippable(found.ffn), none(n_layer, false);

    swift_gguf_cost cost = {}, rest = {};
    const double    full_bytes = bytes_of(ctx, nullptr, cost), full_ms = full_bytes / GUESSED_BYTES_PER_MS;
    const auto      part_ms = [&](swift_subnetwork_ptr part, swift_gguf_cost & read) {
        return full_ms * (full_bytes > 0 ? bytes_of(ctx, std::move(part), read) / full_bytes : 1.0);
    };
    const double both         = part_ms(without(attention, ffn), rest);
    const double no_attention = part_ms(without(attention, none), cost), no_ffn = part_ms(without(none, ffn), cost);
    const double saved   = std::max(0.0, full_ms - both);
    const double att_ms  = std::min(std::max(0.0, (full_ms - no_attention + no_ffn - both) / 2), saved);
    const double at_rest = (double) (rest.weight_bytes + rest.kv_bytes);
    const double added   = bytes_of(ctx, nullptr, cost, 2) - full_bytes;

    swift_costs costs;
    costs.pass_ms = {
        { 1, full_ms }
    };
    costs.attention_ms = spread(att_ms, found.attention, attention);
    costs.ffn_ms       = spread(saved - att_ms, found.ffn, ffn);
    for (size_t il = 0; il < n_layer; ++il) {
        const double bytes = (double) found.attention[il].weight_bytes;
        costs.kv_ms.push_back(costs.attention_ms[il] * cache_bytes(found.attention[il], ctx) / (bytes > 0 ? bytes : 1.0));
    }
    costs.head_ms        = at_rest > 0 ? (full_ms - saved) * (double) rest.head_bytes / at_rest : 0.0;
    costs.more_ms        = full_ms * std::min(1.0, MORE + std::max(0.0, full_bytes > 0 ? added / full_bytes : 0.0));
    costs.untimed        = { std::begin(PARTS), std::end(PARTS) };
    costs.is_provisional = true;

    const swift_subnetwork_ptr narrow = swift_narrow(ctx.get_model(), sidecar, false);
    if (narrow) {
        std::vector<bool> used;
        for (size_t il = 0; il < n_layer; ++il) {
            used.push_back(narrow->share((int) il) < 1);
        }
        const double narrow_ms = part_ms(narrow, cost), with_head = part_ms(swift_narrow(ctx.get_model(), sidecar, true), cost);
        costs.narrow_ms     = spread(std::max(0.0, full_ms - narrow_ms), found.ffn, used);
        costs.draft_head_ms = std::max(0.0, narrow_ms - with_head);
    } else {
        costs.untimed.erase("sidecar");
    }
    return costs;
}

void swift_costs_here::update(swift_costs measured) {
    costs = std::move(measured);
    speed = together = 0;
    beside.clear();
    first_ms.clear();
    set(costs);
}

void swift_costs_here::set(const swift_costs & at) {
    here = at;
    uncorrected.assign(1, 0.0);
    for (int32_t width = 1; width <= MAX_WIDTH; ++width) {
        uncorrected.push_back(here.verify_ms(width));
    }
    correct();
}

void swift_costs_here::correct() {
    factor               = std::exp(speed);
    const double several = std::exp(together);
    table.clear();
    for (int32_t width = 0; width <= MAX_WIDTH; ++width) {
        table.push_back(uncorrected[width] * factor * (width > 1 ? several : 1.0));
    }
    for (const auto & [width, log] : beside) {
        table[width] *= std::exp(log);
    }
}

void swift_costs_here::look(int64_t n_past) {
    const int64_t n_kv = (n_past + STEP - 1) / STEP * STEP;
    if (here.n_kv != n_kv) {
        set(costs.at(n_kv));
    }
}

double swift_costs_here::verify_ms(int32_t width) const {
    return width > MAX_WIDTH ? here.verify_ms(width) * factor * std::exp(together) : table[width];
}

void swift_costs_here::observe(int32_t width, double ms) {
    if (width < 1 || width > MAX_WIDTH || !(ms > 0.0) || learns(width, ms)) {
        return;
    }
    const double surprise = std::clamp(std::log(ms / table[width]), -NOISE, NOISE);
    if (width == 1) { // the other widths are compared with it
        speed += surprise / 16;
        together *= KEPT;
    } else {
        // mostly to all widths: otherwise drafts that lose time move on to an untried width
        together += surprise / 24;
        beside[width] += surprise / 32;
        speed += surprise / 64;
    }
    correct();
}

// Learns the time of a width that nobody has timed, from its first passes: their lower median, as other programs only
// ever add time. False: it is known, and can only be corrected.
bool swift_costs_here::learns(int32_t width, double ms) {
    const auto is_width = [&](const auto & point) { return point.first == width; };
    const bool is_timed = width > 1 ? std::any_of(costs.pass_ms.begin(), costs.pass_ms.end(), is_width) : is_known();
    if (first_ms.count(width) == 0 && is_timed) {
        return false;
    }
    if (width > 1 && !is_known()) {
        return true; // of no use alone: what counts is the time relative to a plain pass
    }
    std::vector<double> & seen = first_ms[width];
    if (seen.size() == FEW) {
        return false;
    }
    seen.push_back(ms / factor / (width > 1 ? std::exp(together) : 1.0));
    std::vector<double> sorted = seen;
    std::sort(sorted.begin(), sorted.end());
    const double known_ms = sorted[(sorted.size() - 1) / 2];
    if (width > 1 || is_known()) {
        swift_costs with = here;
        with.set_pass(width, known_ms);
        with = with.at(costs.n_kv);
        costs.set_pass(width, std::find_if(with.pass_ms.begin(), with.pass_ms.end(), is_width)->second);
    } else {
        costs = costs.scaled(known_ms / here.pass_ms[0].second);
        if (seen.size() == PLAIN) {
            costs.untimed.erase("passes");
        }
    }
    set(costs.at(here.n_kv));
    return true;
}

swift_costs swift_costs_here::refreshed() const {
    swift_costs latest = costs;
    if (speed > std::log(1.25)) { // other programs use the machine: the corrections would be wrong afterwards
        return latest;
    }
    for (auto & [width, ms] : latest.pass_ms) {
        const auto log = beside.find(width);
        ms *= std::exp((log == beside.end() ? 0.0 : log->second) + (width > 1 ? together : 0.0));
    }
    return latest;
}

int64_t swift_context_bucket(int64_t n_kv) {
    int64_t bucket = STEP;
    while (bucket < n_kv) {
        bucket *= 2;
    }
    return bucket;
}
