// A profile is a JSON file, or lies in the model's metadata.

#include "swift-profile.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>

#ifndef _WIN32
#    include <fcntl.h>
#    include <sys/file.h>
#    include <unistd.h>
#endif

using json   = nlohmann::json;
namespace fs = std::filesystem;

namespace {

const int          PROFILE_VERSION = 1;
const char * const METADATA_KEY    = "swift.profile";
const size_t       MIN_POSITIONS   = 64;
const size_t       MAX_COSTS       = 32;

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

json parsed(const std::string & text, int32_t n_layer) {
    json profile = json::parse(text);
    if (profile.at("version") != PROFILE_VERSION) {
        throw refused("the profile is of a version that this library does not read");
    }
    if (profile.at("n_layer") != n_layer) {
        throw refused("the profile is of another model");
    }
    return profile;
}

description described(const json & known) {
    return {
        known.at("skip_attn").get<std::string>(),
        known.at("skip_ffn").get<std::string>(),
        known.value("narrow_ffn", ""),
        known.value("draft_head", false),
    };
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

swift_subnetwork_ptr subnetwork_of(const llama_model & model, const description & found, const swift_gguf_sidecar * sidecar) {
    const int32_t n_layer = llama_model_n_layer(&model);
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
    return value;
}

std::vector<std::pair<bool, double>> seen_of(const json & known) {
    std::vector<std::pair<bool, double>> all;
    for (const json & window : known.at("seen")) {
        const std::string agrees = window.at("agrees").get<std::string>();
        for (size_t i = 0; i < agrees.size(); ++i) {
            all.emplace_back(agrees[i] == '1', window.at("confidence").at(i).get<double>());
        }
    }
    return all;
}

// The costs that were measured on this machine at the nearest context length. Nearby lengths differ by less than the
// error of a quick measurement: there the better measurement counts.
std::optional<swift_costs> costs_of(const json & stored, const std::string & machine, size_t n_layer) {
    std::optional<swift_costs> best;
    double                     best_rank[3] = {};
    if (!stored.is_object()) {
        throw refused("the profile is damaged");
    }
    for (const auto & [key, values] : stored.items()) {
        if (key.rfind(machine + "@", 0) != 0) {
            continue;
        }
        const swift_costs costs    = swift_costs::from_json(values, n_layer);
        const double      distance = std::fabs(std::log2((double) swift_context_bucket(costs.n_kv) / (double) swift_context_bucket(0)));
        const double      rank[3]  = { distance > 2 ? distance : 0.0, -(double) costs.trust(), distance };
        if (!best || std::lexicographical_compare(rank, rank + 3, best_rank, best_rank + 3)) {
            best = costs;
            std::copy(rank, rank + 3, best_rank);
        }
    }
    return best;
}

swift_recycling::row row_of(const json & values, int32_t n_vocab) {
    const std::vector<int32_t> context = values.at(0).get<std::vector<int32_t>>();
    swift_recycling::row       row     = { swift_recycling::NONE, 0, values.at(1).get<std::vector<int32_t>>(), values.at(2).get<std::vector<double>>() };
    if (context.empty() || context.size() > 2 || row.successors.empty() || row.successors.size() != row.probabilities.size()) {
        throw refused("the profile is damaged");
    }
    row.token                   = context.back();
    row.previous                = context.size() > 1 ? context[0] : swift_recycling::NONE;
    std::vector<int32_t> tokens = row.successors;
    tokens.insert(tokens.end(), context.begin(), context.end());
    for (const int32_t token : tokens) {
        if (token < 0 || token >= n_vocab) {
            throw refused("the profile names tokens that the model does not have");
        }
    }
    for (const double p : row.probabilities) {
        if (!(p >= 0 && p <= 1)) {
            throw refused("the profile is damaged");
        }
    }
    return row;
}

swift_gguf_subnetwork * load(const llama_model & model, const char * path, const swift_gguf_sidecar * sidecar) {
    const json profile = parsed(path != nullptr ? file_at(path) : metadata(model, METADATA_KEY), llama_model_n_layer(&model));
    if (profile.at("known").empty()) {
        throw refused("the profile names no sub-network yet");
    }
    return new swift_gguf_subnetwork { subnetwork_of(model, described(profile.at("known").at(0)), sidecar) };
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
    } catch (const json::exception &) {
        return swift_refuse(error, n_error, "the profile is damaged");
    } catch (const std::exception & reason) {
        return swift_refuse(error, n_error, reason.what());
    }
}

swift_subnetwork_ptr swift_narrow(const llama_model & model, const swift_gguf_sidecar * sidecar, bool draft_head) {
    if (sidecar == nullptr || sidecar->value->ffns.empty()) {
        return nullptr;
    }
    auto value     = std::make_shared<swift_subnetwork>();
    value->sidecar = sidecar->value;
    value->skip_attention.assign(model.layers.size(), false);
    for (const llama_layer & layer : model.layers) {
        value->ffn_share.push_back(sidecar->value->ffns.count(layer.ffn_down) > 0 ? 0.5f : 1.0f);
    }
    value->draft_head = draft_head && sidecar->value->head != nullptr;
    return value;
}

swift_profile swift_profile_read(const llama_context & ctx, const char * path, const swift_gguf_sidecar * sidecar) {
    const llama_model & model   = ctx.get_model();
    const int32_t       n_layer = llama_model_n_layer(&model), n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(&model));
    swift_profile       found;
    if (path == nullptr ? llama_model_meta_val_str(&model, METADATA_KEY, nullptr, 0) < 0 : !fs::exists(path)) {
        return found;
    }
    try {
        const json profile = parsed(path != nullptr ? file_at(path) : metadata(model, METADATA_KEY), n_layer);
        for (const json & known : profile.at("known")) {
            auto seen = seen_of(known);
            if (seen.size() >= MIN_POSITIONS) { // fewer may be luck
                found.subnetwork = subnetwork_of(model, described(known), sidecar);
                found.seen       = std::move(seen);
                break;
            }
        }
        found.costs = costs_of(profile.at("costs"), swift_machine_key(ctx), n_layer);
        for (const json & row : profile.value("recycling", json::array())) {
            found.recycling.push_back(row_of(row, n_vocab));
        }
    } catch (const json::exception &) {
        throw refused("the profile is damaged");
    }
    return found;
}

namespace {

// Keeps other writers out, as swift_gguf's do (filelock). The system releases it if the process ends.
class file_lock {
public:
    explicit file_lock(const std::string & path) {
#ifndef _WIN32
        file = open(path.c_str(), O_RDWR | O_CREAT, 0644);
        for (int tries = 0; file < 0 || flock(file, LOCK_EX | LOCK_NB) != 0; ++tries) {
            if (file < 0 || tries == 200) {
                throw refused("the profile cannot be locked");
            }
            usleep(10 * 1000);
        }
#endif
    }
    ~file_lock() {
#ifndef _WIN32
        if (file >= 0) {
            close(file);
        }
#endif
    }
    file_lock(const file_lock &)             = delete;
    file_lock & operator=(const file_lock &) = delete;

private:
    int file = -1;
};

// Replaces a file as a whole.
void replace(const fs::path & path, const std::string & text) {
    const fs::path temporary = fs::path(path).replace_extension(".tmp");
    FILE *         file      = std::fopen(temporary.string().c_str(), "wb");
    bool           is_whole  = file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size();
#ifndef _WIN32
    is_whole = is_whole && std::fflush(file) == 0 && fsync(fileno(file)) == 0;
#endif
    if (file != nullptr) {
        is_whole = std::fclose(file) == 0 && is_whole;
    }
    if (!is_whole) {
        throw refused("the profile cannot be written");
    }
    fs::rename(temporary, path);
}

using ordered = nlohmann::ordered_json; // the latest come last

// A profile of a model of which nothing is known. The name of the file is the fingerprint.
ordered nothing_known(const llama_model & model, const fs::path & path) {
    char name[256] = "";
    llama_model_meta_val_str(&model, "general.name", name, sizeof(name));
    return {
        { "version",     PROFILE_VERSION             },
        { "fingerprint", path.stem().string()        },
        { "model",       name                        },
        { "n_layer",     llama_model_n_layer(&model) },
        { "known",       ordered::array()            },
        { "costs",       ordered::object()           },
        { "recycling",   ordered::array()            },
        { "search_s",    0.0                         },
        { "evaluations", 0                           },
    };
}

void add_costs(ordered & stored, const std::string & key, const swift_costs & costs, size_t n_layer) {
    if (stored.contains(key) && swift_costs::from_json(json(stored.at(key)), n_layer).trust() > costs.trust()) {
        return;
    }
    stored.erase(key);
    stored[key] = costs.to_json();
    while (stored.size() > MAX_COSTS) {
        stored.erase(stored.begin());
    }
}

void add_rows(ordered & stored, const swift_recycling & recycling, int32_t n_vocab) {
    swift_recycling table;
    for (const ordered & row : stored) {
        table.put(row_of(json(row), n_vocab));
    }
    for (const swift_recycling::row & row : recycling.rows()) {
        table.put(row);
    }
    stored = ordered::array();
    for (const swift_recycling::row & row : table.rows()) {
        std::vector<int32_t> context = { row.previous, row.token };
        context.erase(context.begin(), context.begin() + (row.previous == swift_recycling::NONE));
        std::vector<double> rounded;
        for (const double p : row.probabilities) {
            rounded.push_back(std::min(1.0, std::round(p * 1000) / 1000));
        }
        stored.push_back({ context, row.successors, rounded });
    }
}

} // namespace

void swift_profile_add(const llama_context & ctx, const std::string & path, const swift_costs & costs, const swift_recycling & recycling) {
    const llama_model & model   = ctx.get_model();
    const int32_t       n_layer = llama_model_n_layer(&model);
    if (fs::path(path).has_parent_path()) {
        fs::create_directories(fs::path(path).parent_path());
    }
    const file_lock lock(fs::path(path).replace_extension(".lock").string());
    try {
        ordered profile = nothing_known(model, path);
        if (fs::exists(path)) {
            const std::string text = file_at(path.c_str());
            parsed(text, n_layer);
            profile = ordered::parse(text);
        }
        if (!costs.is_estimate()) {
            const std::string key = swift_machine_key(ctx) + "@" + std::to_string(swift_context_bucket(costs.n_kv));
            add_costs(profile.at("costs"), key, costs, n_layer);
        }
        add_rows(profile["recycling"], recycling, llama_vocab_n_tokens(llama_model_get_vocab(&model)));
        replace(path, profile.dump() + "\n");
    } catch (const json::exception &) {
        throw refused("the profile is damaged");
    }
}
