// The profile of a model: what is remembered of it between runs (swift_gguf/learning/profile.py).

#pragma once

#include "swift-access.h"
#include "swift-sidecar.h"
#include "swift-costs.h"
#include "swift-recycling.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

struct swift_profile {
    swift_subnetwork_ptr                 subnetwork; // the one that the last run used; null: none is known
    std::vector<std::pair<bool, double>> seen;       // of its draft tokens: right or not, probability
    std::optional<swift_costs>           costs;      // of this machine, at the nearest context length
    std::vector<swift_recycling::row>    recycling;  // the latest learned last
};

// Reads a profile; a file that does not exist is an empty one. path: null for the one in the model's metadata.
// Throws std::exception with an English clause.
swift_profile swift_profile_read(const llama_context & ctx, const char * path, const swift_gguf_sidecar * sidecar);

// Adds what was learned to the file, which other processes may use at the same time. Throws likewise.
void swift_profile_add(const llama_context & ctx, const std::string & path, const swift_costs & costs, const swift_recycling & recycling);

// All narrow FFNs of a sidecar, and its head; null where it has none.
swift_subnetwork_ptr swift_narrow(const llama_model & model, const swift_gguf_sidecar * sidecar, bool draft_head);
