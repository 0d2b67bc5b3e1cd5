// Observes a model's FFNs while it runs: input, activations of the neurons, output. So `prepare` learns which
// neurons matter.

#include "swift-access.h"
#include "swift-sidecar.h"

#include <unordered_map>

struct swift_gguf_ffn_observer {
    llama_context *         ctx;
    swift_gguf_ffn_callback callback;
    void *                  data;

    std::unordered_map<const ggml_tensor *, int32_t> ups, downs; // layers by projection
    std::vector<float>                               activations, output;

    // the input of the current FFN: copied, since its memory may be reused before the FFN ends
    std::vector<float> input;
    int32_t            input_layer = -1;

    // ggml_backend_sched_eval_callback: first asked (ask) which nodes are wanted, then called after each of them
    static bool on_node(ggml_tensor * node, bool ask, void * user) {
        auto & self = *static_cast<swift_gguf_ffn_observer *>(user);
        if (!is_product(node)) {
            return !ask; // not wanted; go on
        }
        const auto up = self.ups.find(node->src[0]), down = self.downs.find(node->src[0]);
        if (up == self.ups.end() && down == self.downs.end()) {
            return !ask;
        }
        if (!ask && up != self.ups.end()) {
            self.input_layer = up->second;
            self.input.resize(ggml_nelements(node->src[1]));
            ggml_backend_tensor_get(node->src[1], self.input.data(), 0, ggml_nbytes(node->src[1]));
        } else if (!ask) {
            self.tell(node, down->second);
        }
        return true;
    }

    void tell(const ggml_tensor * node, int32_t layer) {
        const ggml_tensor * columns  = node->src[1];
        const bool          is_known = input_layer == layer && (int64_t) input.size() == node->ne[0] * node->ne[1];
        callback(
                data, layer, (int32_t) node->ne[1], (int32_t) node->ne[0], is_known ? input.data() : nullptr, (int32_t) columns->ne[0],
                fetched(columns, activations), fetched(node, output));
    }

    // One matrix by another, rows without gaps
    static bool is_product(const ggml_tensor * node) {
        const ggml_tensor * columns = node->src[1];
        return node->op == GGML_OP_MUL_MAT && columns->type == GGML_TYPE_F32 && ggml_is_contiguous(columns) && ggml_is_contiguous(node) &&
                node->ne[2] == 1 && node->ne[3] == 1;
    }

    static const float * fetched(const ggml_tensor * t, std::vector<float> & copy) {
        if (ggml_backend_buffer_is_host(t->buffer)) {
            return (const float *) t->data;
        }
        copy.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, copy.data(), 0, ggml_nbytes(t));
        return copy.data();
    }
};

swift_gguf_ffn_observer * swift_gguf_observe_ffn(
        llama_context *            ctx,
        const swift_gguf_sidecar * sidecar,
        swift_gguf_ffn_callback    callback,
        void *                     data) try {
    if (ctx == nullptr || callback == nullptr) {
        return nullptr;
    }
    auto         observer = std::make_unique<swift_gguf_ffn_observer>();
    const auto & layers   = llama_get_model(ctx)->layers;
    observer->ctx         = ctx;
    observer->callback    = callback;
    observer->data        = data;
    for (size_t il = 0; il < layers.size(); ++il) {
        if (layers[il].ffn_down != nullptr) {
            observer->downs.emplace(layers[il].ffn_down, (int32_t) il);
            observer->ups.emplace(layers[il].ffn_up, (int32_t) il);
        }
        if (sidecar == nullptr) {
            continue;
        }
        if (const auto narrow = sidecar->value->ffns.find(layers[il].ffn_down); narrow != sidecar->value->ffns.end()) {
            observer->downs.emplace(narrow->second.down, (int32_t) il);
            observer->ups.emplace(narrow->second.up, (int32_t) il);
        }
    }
    if (observer->downs.empty()) {
        return nullptr;
    }
    swift_access::watch(*ctx, swift_gguf_ffn_observer::on_node, observer.get());
    return observer.release();
} catch (...) { // std::bad_alloc
    return nullptr;
}

void swift_gguf_observe_ffn_end(swift_gguf_ffn_observer * observer) {
    if (observer != nullptr) {
        swift_access::watch(*observer->ctx, nullptr, nullptr);
        delete observer;
    }
}
