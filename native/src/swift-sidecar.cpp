#include "swift-access.h"
#include "swift-sidecar.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

namespace {

struct refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string shape_of(const ggml_tensor * t) {
    return "[" + std::to_string(t->ne[0]) + ", " + std::to_string(t->ne[1]) + "]";
}

ggml_backend_dev_t device_of(const ggml_tensor * weight) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(weight->buffer));
    return dev != nullptr ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); // plain memory has none
}

// Can the device multiply with this weight in memory of this type? Asked in the way llama.cpp does.
bool multiplies(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft, const ggml_tensor * weight) {
    const ggml_init_params params = { 4 * ggml_tensor_overhead(), nullptr, true };
    const ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor *          w       = ggml_dup_tensor(ctx.get(), weight);
    ggml_tensor *          columns = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, w->ne[0], 512);
    ggml_tensor *          product = ggml_mul_mat(ctx.get(), w, columns);
    // an empty buffer tells the device the type
    const ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(buft, 0));
    w->buffer = buffer.get();
    return ggml_backend_dev_supports_op(dev, product);
}

// The memory type that the device reads fastest: repacked, if it has one for the type of weights.
ggml_backend_buffer_type_t memory_for_matrix(ggml_backend_dev_t dev, const ggml_tensor * weight) {
    const ggml_backend_reg_t reg       = ggml_backend_dev_backend_reg(dev);
    const auto               get_extra = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * extra = get_extra ? get_extra(dev) : nullptr; extra != nullptr && *extra != nullptr; ++extra) {
        if (multiplies(dev, *extra, weight)) {
            return *extra;
        }
    }
    const ggml_backend_buffer_type_t usual = ggml_backend_dev_buffer_type(dev);
    if (!multiplies(dev, usual, weight)) {
        throw refused(std::string("no kernel for ") + ggml_type_name(weight->type) + " on " + ggml_backend_dev_name(dev));
    }
    return usual;
}

class loader {
public:
    loader(const llama_model & model, const char * path) :
        model(model), file(path, "rb"), sidecar(std::make_shared<swift_sidecar>()) {
        ggml_context *         ctx    = nullptr;
        const gguf_init_params params = { /*no_alloc=*/true, &ctx };
        gguf.reset(gguf_init_from_file(path, params));
        described.reset(ctx);
        if (!gguf) {
            throw refused("it is no sound GGUF file");
        }
        if (gguf_get_data_offset(gguf.get()) > file.size()) {
            throw refused("it is cut short");
        }
    }

    std::shared_ptr<const swift_sidecar> load() {
        for (size_t il = 0; il < model.layers.size(); ++il) {
            plan_ffn(model.layers[il], (int) il);
            plan_attention(model.layers[il], (int) il);
        }
        plan_head();
        if (sidecar->ffns.empty() && sidecar->copies.empty() && sidecar->head == nullptr) {
            throw refused("nothing in it belongs to this model");
        }
        fill();
        return sidecar;
    }

private:
    struct planned {
        const ggml_tensor * source; // as the file describes it; null: filled with -inf
        ggml_tensor *       target;
    };

    const llama_model &            model;
    llama_file                     file;
    gguf_context_ptr               gguf;
    ggml_context_ptr               described;
    std::shared_ptr<swift_sidecar> sidecar;

    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context *, std::vector<planned>>> plan;

    const ggml_tensor * find(const std::string & name) const {
        return ggml_get_tensor(described.get(), name.c_str());
    }

    ggml_tensor * place(ggml_backend_buffer_type_t buft, const ggml_tensor * source, const ggml_tensor * like) {
        auto & [ctx, tensors] = plan[buft];
        if (ctx == nullptr) {
            const ggml_init_params params = { (model.layers.size() * 11 + 8) * ggml_tensor_overhead(), nullptr, true };
            sidecar->contexts.emplace_back(ggml_init(params));
            ctx = sidecar->contexts.back().get();
        }
        ggml_tensor * target = ggml_dup_tensor(ctx, like);
        ggml_set_name(target, (std::string("swift.") + ggml_get_name(like)).c_str());
        tensors.push_back({ source, target });
        return target;
    }

    ggml_tensor * matrix(const std::string & name, const ggml_tensor * whole, int64_t ne0, int64_t ne1) {
        const ggml_tensor * source = find(name);
        if (source == nullptr || source->ne[0] != ne0 || source->ne[1] != ne1 || ggml_n_dims(source) > 2) {
            throw refused(name + (source != nullptr ? " has the shape " + shape_of(source) : " is missing"));
        }
        if (source->type != GGML_TYPE_F32 && ggml_get_type_traits(source->type)->to_float == nullptr) {
            throw refused(name + " is of a type that no weights have"); // backends would accept it and crash
        }
        return place(memory_for_matrix(device_of(whole), source), source, source);
    }

    ggml_tensor * vector(const std::string & name, const ggml_tensor * whole, int64_t ne0) {
        if (whole == nullptr) {
            return nullptr;
        }
        const ggml_tensor * source = find(name);
        if (source == nullptr || source->type != GGML_TYPE_F32 || source->ne[0] != ne0 || ggml_nelements(source) != ne0) {
            throw refused(name + " is missing or has another shape");
        }
        return place(ggml_backend_dev_buffer_type(device_of(whole)), source, source);
    }

    // A bias that the sidecar may have where the model has none. It then lies beside the matrix.
    ggml_tensor * own_vector(const std::string & name, const ggml_tensor * whole, const ggml_tensor * matrix, int64_t ne0) {
        return vector(name, whole == nullptr && find(name) != nullptr ? matrix : whole, ne0);
    }

    void plan_ffn(const llama_layer & layer, int il) {
        const std::string   prefix = "blk." + std::to_string(il) + ".ffn_";
        const ggml_tensor * down   = find(prefix + "down.weight");
        if (down == nullptr) {
            return; // this FFN stays whole
        }
        if (layer.ffn_down == nullptr || layer.ffn_up == nullptr || layer.ffn_down_s != nullptr || layer.ffn_up_s != nullptr ||
            layer.ffn_gate_s != nullptr || layer.ffn_act != nullptr) {
            throw refused("layer " + std::to_string(il) + " of the model has no FFN that can be narrowed");
        }
        const int64_t n_embd = layer.ffn_up->ne[0], n_narrow = down->ne[0];
        // some models keep gate and up in one matrix
        const int64_t        joined = layer.ffn_up->ne[1] / layer.ffn_down->ne[0];
        swift_narrow_tensors narrow;
        narrow.up   = matrix(prefix + "up.weight", layer.ffn_up, n_embd, joined * n_narrow);
        narrow.up_b = vector(prefix + "up.bias", layer.ffn_up_b, joined * n_narrow);
        if (layer.ffn_gate != nullptr) {
            narrow.gate   = matrix(prefix + "gate.weight", layer.ffn_gate, n_embd, n_narrow);
            narrow.gate_b = own_vector(prefix + "gate.bias", layer.ffn_gate_b, layer.ffn_gate, n_narrow);
        }
        narrow.down   = matrix(prefix + "down.weight", layer.ffn_down, n_narrow, layer.ffn_down->ne[1]);
        narrow.down_b = own_vector(prefix + "down.bias", layer.ffn_down_b, layer.ffn_down, layer.ffn_down->ne[1]);
        sidecar->ffns.emplace(layer.ffn_down, narrow);
    }

    void plan_attention(const llama_layer & layer, int il) {
        const struct {
            const char *        name;
            const ggml_tensor * whole;
            const ggml_tensor * scale; // for types that are scaled a second time
        } matrices[] = {
            { "q",      layer.wq,   layer.wq_s   },
            { "k",      layer.wk,   layer.wk_s   },
            { "v",      layer.wv,   layer.wv_s   },
            { "qkv",    layer.wqkv, layer.wqkv_s },
            { "output", layer.wo,   layer.wo_s   },
        };
        for (const auto & [part, whole, scale] : matrices) {
            const std::string name = "blk." + std::to_string(il) + ".attn_" + part + ".weight";
            if (find(name) == nullptr) {
                continue;
            }
            if (whole == nullptr || scale != nullptr || ggml_n_dims(whole) > 2) {
                throw refused(name + " stands for nothing in this model");
            }
            sidecar->copies.emplace(whole, swift_smaller_copy { matrix(name, whole, whole->ne[0], whole->ne[1]), il });
        }
    }

    void plan_head() {
        const ggml_tensor * head = find("output.weight");
        const ggml_tensor * ids  = find("output.ids");
        if (head == nullptr && ids == nullptr) {
            return;
        }
        const ggml_tensor * whole = model.output;
        if (whole == nullptr || head == nullptr || ids == nullptr || ids->type != GGML_TYPE_I32 || ids->ne[0] != head->ne[1] || ggml_nelements(ids) != head->ne[1] ||
            head->ne[1] > whole->ne[1]) {
            throw refused("its head does not fit the model's");
        }
        sidecar->output   = whole;
        sidecar->head     = matrix("output.weight", whole, whole->ne[0], head->ne[1]);
        sidecar->head_ids = place(ggml_backend_dev_buffer_type(device_of(whole)), ids, ids);

        const ggml_init_params params = { ggml_tensor_overhead(), nullptr, true };
        const ggml_context_ptr ctx(ggml_init(params));
        ggml_tensor *          floor = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, whole->ne[1]);
        ggml_set_name(floor, "output.floor");
        sidecar->floor = place(ggml_backend_dev_buffer_type(device_of(whole)), nullptr, floor);
    }

    const void * bytes_of(const ggml_tensor * source) const {
        const int64_t id     = gguf_find_tensor(gguf.get(), ggml_get_name(source));
        const size_t  offset = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), id);
        if (offset > file.size() || ggml_nbytes(source) > file.size() - offset) {
            throw refused("it is cut short");
        }
        return (const char *) sidecar->mapping->addr() + offset;
    }

    void fill() {
        if (!llama_mmap::SUPPORTED) {
            throw refused("this system cannot map files");
        }
        sidecar->mapping  = std::make_unique<llama_mmap>(&file);
        bool uses_mapping = false;
        for (auto & [buft, group] : plan) {
            auto & [ctx, tensors] = group;
            for (const planned & each : tensors) {
                sidecar->n_bytes += ggml_nbytes(each.target);
                if (each.source != nullptr && !ggml_validate_row_data(each.source->type, bytes_of(each.source), ggml_nbytes(each.source))) {
                    throw refused(std::string(ggml_get_name(each.source)) + " has numbers that are not finite");
                }
                if (each.target == sidecar->head_ids) {
                    check_ids((const int32_t *) bytes_of(each.source), ggml_nelements(each.target));
                }
            }
            uses_mapping = use_in_place(buft, tensors) || uses_mapping;
            // allocates what has no memory yet
            std::vector<planned> rest;
            for (const planned & each : tensors) {
                if (each.target->buffer == nullptr) {
                    rest.push_back(each);
                }
            }
            ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
            if (buffer != nullptr) {
                sidecar->buffers.emplace_back(buffer);
                ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            }
            for (const planned & each : rest) {
                if (each.target->buffer == nullptr) {
                    throw refused("there is no memory for it");
                }
                copy(each);
            }
        }
        if (!uses_mapping) {
            sidecar->mapping.reset();
        }
    }

    // Plain memory of the CPU can be the file itself. Returns whether it is.
    bool use_in_place(ggml_backend_buffer_type_t buft, const std::vector<planned> & tensors) {
        if (buft != ggml_backend_cpu_buffer_type()) {
            return false;
        }
        llama_mmap &          mapping = *sidecar->mapping;
        ggml_backend_buffer_t buffer  = nullptr;
        for (const planned & each : tensors) {
            const void * bytes = each.source != nullptr ? bytes_of(each.source) : nullptr;
            if (bytes == nullptr || (uintptr_t) bytes % ggml_backend_buft_get_alignment(buft) != 0) {
                continue;
            }
            if (buffer == nullptr) {
                buffer = ggml_backend_cpu_buffer_from_ptr(mapping.addr(), mapping.size());
                sidecar->buffers.emplace_back(buffer);
                ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            }
            ggml_backend_tensor_alloc(buffer, each.target, const_cast<void *>(bytes));
        }
        return buffer != nullptr;
    }

    void copy(const planned & each) {
        if (each.source == nullptr) {
            const std::vector<float> nothing(ggml_nelements(each.target), -INFINITY);
            ggml_backend_tensor_set(each.target, nothing.data(), 0, ggml_nbytes(each.target));
            return;
        }
        ggml_backend_tensor_set(each.target, bytes_of(each.source), 0, ggml_nbytes(each.target));
    }

    void check_ids(const int32_t * ids, int64_t n) const {
        for (int64_t i = 0; i < n; ++i) {
            if (ids[i] < 0 || ids[i] >= sidecar->output->ne[1]) {
                throw refused("its head names tokens that the model does not have");
            }
        }
    }
};

} // namespace

swift_gguf_sidecar * swift_gguf_sidecar_load(const llama_model * model, const char * path, char * error, size_t n_error) {
    if (model == nullptr || path == nullptr) {
        return swift_refuse(error, n_error, "there is no model or no path");
    }
    try {
        return new swift_gguf_sidecar { loader(*model, path).load() };
    } catch (const std::exception & reason) {
        return swift_refuse(error, n_error, reason.what());
    }
}

void swift_gguf_sidecar_free(swift_gguf_sidecar * sidecar) {
    delete sidecar;
}

uint64_t swift_gguf_sidecar_size(const swift_gguf_sidecar * sidecar) {
    return sidecar != nullptr ? sidecar->value->n_bytes : 0;
}
