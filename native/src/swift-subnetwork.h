// Which sub-layers of the target model a pass leaves out.
//
// llama.cpp includes this header from llama-cparams.h, so it must stay free of ggml and llama types.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

enum class swift_sublayer {
    attention,
    ffn,
};

// What the shared graph helpers were asked to build. Filled during a probing graph build only.
struct swift_visits {
    std::vector<bool> attention;
    std::vector<bool> ffn;
};

// Immutable once a context holds it; contexts share it through swift_subnetwork_ptr.
struct swift_subnetwork {
    std::vector<bool> skip_attention; // [n_layer]
    std::vector<bool> skip_ffn;       // [n_layer]

    // Not part of the value: where a probing build notes the sub-layers it meets.
    std::shared_ptr<swift_visits> visits;

    // False for layers outside [0, n_layer): NextN blocks and layer-less helpers are never skipped.
    bool skips(swift_sublayer kind, int il) const {
        const auto & skip = kind == swift_sublayer::attention ? skip_attention : skip_ffn;
        return il >= 0 && il < (int) skip.size() && skip[il];
    }
};

using swift_subnetwork_ptr = std::shared_ptr<const swift_subnetwork>;

// Do two passes build the same graph? The result of a graph build keeps its copy of the pointer
// alive, so equal addresses can never be a recycled allocation.
inline bool swift_same_graph(const swift_subnetwork_ptr & a, const swift_subnetwork_ptr & b) {
    if (a == b) {
        return true;
    }
    return a && b && a->skip_attention == b->skip_attention && a->skip_ffn == b->skip_ffn;
}
