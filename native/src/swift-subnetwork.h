// Which sub-layers of the target model a pass leaves out, and which it runs narrower.
//
// llama.cpp includes this header from llama-cparams.h, so it must stay free of ggml and llama types.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

struct swift_sidecar;

// Which sub-layers the shared graph helpers were asked to build. Filled only while a graph is built to probe.
struct swift_visits {
    std::vector<bool> attention;
    std::vector<bool> ffn;
};

// Immutable once a context holds it; contexts share it through swift_subnetwork_ptr.
struct swift_subnetwork {
    std::vector<bool>  skip_attention; // [n_layer]
    std::vector<float> ffn_share;      // [n_layer], 0: left out, 1: whole, between: narrower

    // Has the narrow FFNs and the draft head; may be null. Its users keep it alive.
    std::shared_ptr<const swift_sidecar> sidecar;
    bool                                 draft_head = false; // logits of the sidecar's tokens only

    // Not part of the value: where a probing build notes the sub-layers it finds.
    std::shared_ptr<swift_visits> visits;

    // Layers outside [0, n_layer) are whole: NextN blocks and layer-less helpers.
    bool  skips_attention(int il) const { return has(il) && skip_attention[il]; }
    float share(int il) const { return has(il) ? ffn_share[il] : 1.0f; }

    bool operator==(const swift_subnetwork & other) const {
        return skip_attention == other.skip_attention && ffn_share == other.ffn_share && sidecar == other.sidecar &&
                draft_head == other.draft_head;
    }

private:
    bool has(int il) const { return il >= 0 && il < (int) ffn_share.size(); }
};

using swift_subnetwork_ptr = std::shared_ptr<const swift_subnetwork>;

// Do two passes build the same graph? The result of a graph build keeps its copy of the pointer
// alive, so equal addresses can never be a recycled allocation.
inline bool swift_same_graph(const swift_subnetwork_ptr & a, const swift_subnetwork_ptr & b) {
    return a == b || (a && b && *a == *b);
}
