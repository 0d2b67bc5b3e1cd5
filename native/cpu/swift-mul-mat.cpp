// ggml multiplies a matrix with one column by one kernel, with a few columns by the same kernel once for each, with more
// by kernels made for prompts, which round differently. Then a token's logits depend, in the last bits, on how many
// tokens are decoded with it.
//
// Here there is one arithmetic for any number of columns (swift-panels.h), and weights are unpacked once for all of
// them. So a row of results has the same bits however many tokens are decoded together, and further tokens cost little.

#include "swift-mul-mat.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define SWIFT_AVX2
#endif

#ifdef SWIFT_AVX2

#    include "swift-floats.h"
#    include "swift-quantized.h"

namespace {

// work(begin, end) for all groups of so many bytes, shared out to the threads. One that was held up leaves its share to
// the others. But a chunk has groups enough: nobody asks ahead for its first one.
template <typename function>
void share_out(const ggml_compute_params * params, int64_t n_groups, size_t group, const function & work) {
    const int64_t n_long   = std::min(n_groups * (int64_t) group / (int64_t) BYTES_AT_ONCE, n_groups / 8);
    const int64_t n_chunks = std::min<int64_t>(n_groups, std::clamp<int64_t>(n_long, params->nth, 8 * params->nth));
    for (int64_t chunk = params->ith; chunk < n_chunks;
         chunk         = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        work(n_groups * chunk / n_chunks, n_groups * (chunk + 1) / n_chunks);
    }
}

void start_sharing(const ggml_compute_params * params) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
}

template <typename kernel>
int64_t n_groups_of(const ggml_tensor * src0) {
    return (src0->ne[1] + kernel::ROWS - 1) / kernel::ROWS;
}

// GGML_OP_MUL_MAT
struct with_all {
    template <typename kernel>
    static void multiply(const ggml_compute_params * params, ggml_tensor * dst) {
        const ggml_tensor * src0      = dst->src[0];
        const ggml_tensor * src1      = dst->src[1];
        const int           n_columns = (int) src1->ne[1];

        const int n_tiled = kernel::n_tiled(n_columns);
        kernel::prepare(params, src1, n_tiled);
        start_sharing(params);
        const auto y = kernel::gather(params, src1, nullptr, n_columns, n_tiled);

        static thread_local std::vector<float *> out;
        out.resize(n_columns);
        for (int c = 0; c < n_columns; c++) {
            out[c] = (float *) ((char *) dst->data + c * dst->nb[1]);
        }
        const matrix w = { (const char *) src0->data, src0->ne[1], src0->nb[1] };
        share_out(params, n_groups_of<kernel>(src0), kernel::ROWS * w.stride, [&](int64_t begin, int64_t end) {
            kernel::multiply(w, begin, end, y, n_columns, out.data());
        });
    }
};

// GGML_OP_MUL_MAT_ID: the columns of each expert together
struct with_chosen {
    struct expert {
        int64_t              first_group; // of all experts'
        std::vector<int64_t> columns;
        std::vector<float *> out;
    };

    static void choose(const ggml_tensor * dst, std::vector<expert> & experts) {
        const ggml_tensor * src1 = dst->src[1];
        const ggml_tensor * ids  = dst->src[2];
        experts.resize(dst->src[0]->ne[2]);
        for (expert & each : experts) {
            each.columns.clear();
            each.out.clear();
        }
        for (int64_t token = 0; token < ids->ne[1]; token++) {
            for (int64_t i = 0; i < ids->ne[0]; i++) {
                const int32_t id = *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + i * ids->nb[0]);
                GGML_ASSERT(id >= 0 && id < (int64_t) experts.size());
                expert & to = experts[id];
                to.columns.push_back(token * src1->ne[1] + i % src1->ne[1]);
                to.out.push_back((float *) ((char *) dst->data + i * dst->nb[1] + token * dst->nb[2]));
            }
        }
    }

    template <typename kernel>
    static void multiply(const ggml_compute_params * params, ggml_tensor * dst) {
        const ggml_tensor * src0 = dst->src[0];
        const ggml_tensor * src1 = dst->src[1];

        static thread_local std::vector<expert> experts; // each thread finds out itself: no need to wait
        choose(dst, experts);
        int64_t n_groups = 0;
        for (expert & each : experts) {
            each.first_group = n_groups;
            if (!each.columns.empty()) {
                n_groups += n_groups_of<kernel>(src0);
            }
        }
        kernel::prepare(params, src1, 0);
        start_sharing(params);
        share_out(params, n_groups, kernel::ROWS * src0->nb[1], [&](int64_t begin, int64_t end) {
            for (size_t e = 0; e < experts.size(); e++) {
                const expert & each = experts[e];
                const int64_t  last = e + 1 < experts.size() ? experts[e + 1].first_group : n_groups;
                const int64_t  from = std::max(begin, each.first_group), to = std::min(end, last);
                if (from < to) {
                    const int    n_columns = (int) each.columns.size();
                    const matrix w         = { (const char *) src0->data + e * src0->nb[2], src0->ne[1], src0->nb[1] };
                    const auto   y         = kernel::gather(params, src1, each.columns.data(), n_columns, kernel::n_tiled(n_columns));
                    kernel::multiply(w, from - each.first_group, to - each.first_group, y, n_columns, each.out.data());
                }
            }
        });
    }
};

// -- which kernel -------------------------------------------------------------------------------------

template <typename operation>
bool multiply_repacked(const ggml_compute_params * params, ggml_tensor * dst) {
    const auto with = [&](auto type) {
        operation::template multiply<quantized<decltype(type)>>(params, dst);
        return true;
    };
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: return with(q4_0_8x8 {});
        case GGML_TYPE_IQ4_NL: return with(iq4_nl_8x8 {});
        case GGML_TYPE_MXFP4: return with(mxfp4_8x8 {});
        case GGML_TYPE_Q4_K: return with(q4_K_8x8 {});
        case GGML_TYPE_Q2_K: return with(q2_K_8x8 {});
        default: return false;
    }
}

template <typename operation>
bool multiply_plain(const ggml_compute_params * params, ggml_tensor * dst) {
    const auto with = [&](auto type) {
        operation::template multiply<quantized<decltype(type)>>(params, dst);
        return true;
    };
    const auto with_floats = [&](auto kernel) {
        operation::template multiply<decltype(kernel)>(params, dst);
        return true;
    };
    switch (dst->src[0]->type) {
        case GGML_TYPE_F32: return with_floats(floats<float> {});
        case GGML_TYPE_F16: return with_floats(floats<ggml_fp16_t> {});
        case GGML_TYPE_BF16: return with_floats(floats<ggml_bf16_t> {});
        case GGML_TYPE_Q4_0: return with(q4_0 {});
        case GGML_TYPE_Q5_0: return with(q5_0 {});
        case GGML_TYPE_Q8_0: return with(q8_0 {});
        case GGML_TYPE_IQ4_NL: return with(iq4_nl {});
        case GGML_TYPE_MXFP4: return with(mxfp4 {});
        case GGML_TYPE_Q4_1: return with(q4_1 {});
        case GGML_TYPE_Q5_1: return with(q5_1 {});
        case GGML_TYPE_Q2_K: return with(q2_K {});
        case GGML_TYPE_Q3_K: return with(q3_K {});
        case GGML_TYPE_Q4_K: return with(q4_K {});
        case GGML_TYPE_Q5_K: return with(q5_K {});
        case GGML_TYPE_Q6_K: return with(q6_K {});
        case GGML_TYPE_IQ4_XS: return with(iq4_xs {});
        default: return false;
    }
}

template <typename operation>
bool multiply(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    if (!params->use_ref || src1->type != GGML_TYPE_F32 || src1->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float) || ggml_is_empty(dst) ||
        src0->nb[1] != ggml_row_size(src0->type, src0->ne[0])) {
        return false;
    }
    if (n_interleaved == 8 && n_block == 8) {
        return multiply_repacked<operation>(params, dst);
    }
    return n_interleaved == 1 && multiply_plain<operation>(params, dst);
}

} // namespace

bool swift_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block) {
    const bool is_one = ggml_nrows(dst->src[0]) == dst->src[0]->ne[1] && ggml_nrows(dst->src[1]) == dst->src[1]->ne[1];
    return is_one && multiply<with_all>(params, dst, n_interleaved, n_block);
}

bool swift_mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block) {
    return multiply<with_chosen>(params, dst, n_interleaved, n_block);
}

#else // SWIFT_AVX2

bool swift_mul_mat(const ggml_compute_params *, ggml_tensor *, int64_t, int64_t) {
    return false;
}

bool swift_mul_mat_id(const ggml_compute_params *, ggml_tensor *, int64_t, int64_t) {
    return false;
}

#endif // SWIFT_AVX2
