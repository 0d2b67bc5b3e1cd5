// What passes cost on this machine: the numbers of swift_gguf/planning/cost.py, and the same values in a profile.

#pragma once

#include "swift-access.h"

#include <nlohmann/json_fwd.hpp>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

// Times of passes at one context length, all in milliseconds. The fields of Costs in cost.py, which explains them.
struct swift_costs {
    std::vector<std::pair<int32_t, double>> pass_ms;                                // width, ms; widths ascend from 1
    std::vector<double>                     attention_ms, ffn_ms, kv_ms, narrow_ms; // [n_layer]
    double                                  head_ms = 0, more_ms = 0, row_ms = 0, switch_ms = 0, draft_head_ms = 0;
    int64_t                                 n_kv = 0;
    std::set<std::string>                   untimed;
    bool                                    is_provisional = false, is_busy = false;

    bool    is_estimate() const { return untimed.count("passes") > 0; }
    int32_t trust() const { return is_busy || is_estimate() ? 0 : 2 - is_provisional; }

    double      verify_ms(int32_t width) const;
    double      draft_ms(const swift_subnetwork & subnetwork) const;
    swift_costs at(int64_t n_kv) const; // at another context length
    swift_costs scaled(double factor) const;
    void        set_pass(int32_t width, double ms);

    // Throw std::exception for values that are none.
    nlohmann::json     to_json() const;
    static swift_costs from_json(const nlohmann::json & values, size_t n_layer);

    // From the bytes that passes read; nothing is timed. Throws.
    static swift_costs estimated(llama_context & ctx, const swift_gguf_sidecar * sidecar);
};

// The costs at the current context length, learned from live passes and corrected by them (CostsHere in cost.py).
class swift_costs_here {
public:
    explicit swift_costs_here(swift_costs costs) { update(std::move(costs)); }

    void update(swift_costs costs); // starts again from new measurements
    void look(int64_t n_past);      // what follows is meant at this context length

    bool   is_known() const { return !costs.is_estimate(); } // plain passes were timed
    double verify_ms(int32_t width) const;
    double draft_ms(const swift_subnetwork & subnetwork) const { return here.draft_ms(subnetwork) * factor; }
    void   observe(int32_t width, double ms); // a full pass, all rows with logits

    swift_costs         refreshed() const; // with the corrections by width
    const swift_costs & measured() const { return costs; }

private:
    void set(const swift_costs & at);
    void correct();
    bool learns(int32_t width, double ms);

    swift_costs                            costs, here;
    double                                 speed = 0, together = 0, factor = 1; // the first two: natural logarithms
    std::map<int32_t, double>              beside;
    std::map<int32_t, std::vector<double>> first_ms;           // of widths that are being learned
    std::vector<double>                    uncorrected, table; // by width
};

// What costs depend on besides the model and the context length.
std::string swift_machine_key(const llama_context & ctx);

// "machine@bucket", as in a profile: context lengths up to a power of two share costs.
int64_t swift_context_bucket(int64_t n_kv);
