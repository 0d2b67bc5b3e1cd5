// Which sub-layers of the target model a pass leaves out, and which it runs narrower.
//
// llama.cpp includes this header from llama-cparams.h, so it must stay free of ggml and llama types.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

struct swift_sidecar;

// What the shared graph helpers were asked to build. Filled during a probing graph build only.
struct swift_visits {
    std::vector<bool> attention;
    std::vector<bool> ffn;
};

// Immutable once a context holds it; contexts share it through swift_subnetwork_ptr.
struct swift_subnetwork {
    std::vector<bool>  skip_attention; // [n_layer]
    std::vector<float> ffn_share;      // [n_layer], 0: left out, 1: whole, between: narrower

    // Where narrow FFNs and the draft head come from; may be null. Kept alive by those who use it.
    std::shared_ptr<const swift_sidecar> sidecar;
    bool                                 draft_head = false; // logits of the sidecar's tokens only

    // Not part of the value: where a probing build notes the sub-layers it meets.
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
