// Reads the sub-network in a profile (swift_gguf/learning/profile.py). A profile is a file, or lies in the model's
// metadata.

#include "swift-access.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

const int          PROFILE_VERSION = 1;
const char * const METADATA_KEY    = "swift.profile";

struct refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Fields as swift_gguf/learning/profile.py names them.
struct description {
    std::string skip_attn, skip_ffn, narrow_ffn; // layers as in "3,5-9"
    bool        draft_head = false;
};

std::string file_at(const char * path) {
    std::ifstream     file(path, std::ios::binary);
    std::stringstream content;
    if (!file || !(content << file.rdbuf())) {
        throw refused("the profile cannot be read");
    }
    return content.str();
}

std::string metadata(const llama_model & model, const char * key) {
    const int32_t n = llama_model_meta_val_str(&model, key, nullptr, 0);
    if (n < 0) {
        throw refused("the model has no profile in its metadata");
    }
    std::string value(n + 1, '\0');
    llama_model_meta_val_str(&model, key, value.data(), value.size());
    value.resize(n);
    return value;
}

description best_of(const std::string & text, int32_t n_layer) {
    try {
        const nlohmann::json profile = nlohmann::json::parse(text);
        if (profile.at("version") != PROFILE_VERSION) {
            throw refused("the profile is of a version that this library does not read");
        }
        if (profile.at("n_layer") != n_layer) {
            throw refused("the profile is of another model");
        }
        if (profile.at("known").empty()) {
            throw refused("the profile names no sub-network yet");
        }
        const nlohmann::json & best = profile.at("known").at(0); // the sub-network that the last run used
        return {
            best.at("skip_attn").get<std::string>(),
            best.at("skip_ffn").get<std::string>(),
            best.value("narrow_ffn", ""),
            best.value("draft_head", false),
        };
    } catch (const nlohmann::json::exception &) {
        throw refused("the profile is damaged");
    }
}

// [n_layer], from "3,5-9".
std::vector<bool> layers_of(const std::string & text, int32_t n_layer) {
    std::vector<bool> layers(n_layer, false);
    const char *      at   = text.data();
    const char *      stop = at + text.size();
    while (at < stop) {
        int32_t first = -1;
        auto    end   = std::from_chars(at, stop, first);
        int32_t last  = first;
        if (end.ec == std::errc() && end.ptr < stop && *end.ptr == '-') {
            end = std::from_chars(end.ptr + 1, stop, last);
        }
        if (end.ec != std::errc() || first < 0 || last < first || last >= n_layer || (end.ptr < stop && *end.ptr != ',')) {
            throw refused("it names layers that the model does not have");
        }
        std::fill(layers.begin() + first, layers.begin() + last + 1, true);
        at = end.ptr + 1;
    }
    return layers;
}

swift_gguf_subnetwork * load(const llama_model & model, const char * path, const swift_gguf_sidecar * sidecar) {
    const int32_t     n_layer = llama_model_n_layer(&model);
    const description found   = best_of(path != nullptr ? file_at(path) : metadata(model, METADATA_KEY), n_layer);
    if (sidecar == nullptr && (found.draft_head || (!found.narrow_ffn.empty() && model.hparams.n_expert == 0))) {
        throw refused("it needs the model's sidecar");
    }
    auto value            = std::make_shared<swift_subnetwork>();
    value->skip_attention = layers_of(found.skip_attn, n_layer);
    value->sidecar        = sidecar != nullptr ? sidecar->value : nullptr;
    value->draft_head     = found.draft_head;

    const std::vector<bool> skipped = layers_of(found.skip_ffn, n_layer), narrow = layers_of(found.narrow_ffn, n_layer);
    for (int32_t il = 0; il < n_layer; ++il) {
        value->ffn_share.push_back(skipped[il] ? 0.0f : narrow[il] ? 0.5f
                                                                   : 1.0f);
    }
    return new swift_gguf_subnetwork { std::move(value) };
}

} // namespace

swift_gguf_subnetwork * swift_gguf_subnetwork_load(
        const llama_model *        model,
        const char *               path,
        const swift_gguf_sidecar * sidecar,
        char *                     error,
        size_t                     n_error) {
    if (model == nullptr) {
        return swift_refuse(error, n_error, "there is no model");
    }
    try {
        return load(*model, path, sidecar);
    } catch (const std::exception & reason) {
        return swift_refuse(error, n_error, reason.what());
    }
}
