// ggml multiplies a matrix with one column by a kernel that unpacks the quantised weights as it goes. With two
// or three columns it runs that kernel once for each. With more it switches (for some types, on some machines)
// to kernels made for long prompts, which round differently. Neither suits the verification of drafts.
//
// Here weights are unpacked once and multiplied with every column, in the float operations of the one-column
// kernel and in their order. So a token's logits do not depend on how many tokens are decoded with it, to the
// bit, and further tokens cost little. Only integer additions, which are exact, are in another order.

#include "swift-mul-mat.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define SWIFT_NARROW_AVX2
#endif

#ifdef SWIFT_NARROW_AVX2

#    include "swift-kernels.h"
#    include "swift-wide.h"

namespace {

// kernel::multiply_tile for the remaining columns, N at most
template <typename kernel, int N>
void multiply_up_to(
        int64_t n_blocks, const typename kernel::weights * x, const typename kernel::prepared * columns, int n_columns,
        float * out, size_t out_stride) {
    if (n_columns >= N) {
        kernel::template multiply_tile<N>(n_blocks, x, columns, out, out_stride);
    } else if constexpr (N > 1) {
        multiply_up_to<kernel, N - 1>(n_blocks, x, columns, n_columns, out, out_stride);
    }
}

// kernel::rows rows of n_blocks blocks each, with columns [n_columns][n_blocks]
template <typename kernel>
void multiply_group(
        int64_t n_blocks, const typename kernel::weights * x, const typename kernel::prepared * columns, int n_columns,
        float * out, size_t out_stride) {
    for (int c = 0; c < n_columns; c += kernel::tile) {
        multiply_up_to<kernel, kernel::tile>(n_blocks, x, columns + c * n_blocks, n_columns - c, out + c * out_stride, out_stride);
    }
}

// Quantises the columns to the format the kernels read; each thread does some of the blocks.
void quantize_columns(const ggml_compute_params * params, const ggml_tensor * src1, ggml_type type, size_t stride) {
    const auto    from_float = ggml_get_type_traits_cpu(type)->from_float;
    const int64_t n_block    = ggml_blck_size(type);
    const int64_t n_blocks   = src1->ne[0] / n_block;
    const int64_t begin      = n_blocks * params->ith / params->nth;
    const int64_t end        = n_blocks * (params->ith + 1) / params->nth;
    for (int64_t c = 0; begin < end && c < src1->ne[1]; c++) {
        const float * in  = (const float *) ((const char *) src1->data + c * src1->nb[1]);
        char *        out = (char *) params->wdata + c * stride;
        from_float(in + begin * n_block, out + begin * ggml_type_size(type), (end - begin) * n_block);
    }
}

// The columns as the kernel wants them: as they are, or prepared. Each thread prepares its own copy: that takes
// less time than another barrier.
template <typename kernel>
const typename kernel::prepared * prepared_columns(const void * data, int64_t n) {
    const auto * columns = (const typename kernel::column *) data;
    if constexpr (std::is_same_v<typename kernel::column, typename kernel::prepared>) {
        return columns;
    } else {
        static thread_local std::vector<typename kernel::prepared> copy; // kept between products
        copy.clear();
        for (int64_t i = 0; i < n; i++) {
            copy.push_back(kernel::prepare(columns[i]));
        }
        return copy.data();
    }
}

template <typename kernel>
void multiply(const ggml_compute_params * params, ggml_tensor * dst, ggml_type column_type) {
    const ggml_tensor * src0      = dst->src[0];
    const ggml_tensor * src1      = dst->src[1];
    const size_t        stride    = ggml_row_size(column_type, src1->ne[0]);
    const int64_t       n_blocks  = src0->ne[0] / ggml_blck_size(src0->type);
    const int64_t       n_groups  = src0->ne[1] / kernel::rows;
    const size_t        group     = src0->nb[1] * kernel::rows;
    const int           n_columns = (int) src1->ne[1];

    constexpr bool as_they_are = std::is_same_v<typename kernel::column, float>;
    if (!as_they_are) {
        quantize_columns(params, src1, column_type, stride);
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const auto * columns = prepared_columns<kernel>(as_they_are ? src1->data : params->wdata, n_columns * n_blocks);

    // Several chunks a thread, so that others can take the share of a thread that was held up. But no chunk is
    // so short that most of what it prefetches belongs to another thread.
    const int64_t n_long   = n_groups * (int64_t) group / (32 * (int64_t) AHEAD);
    const int64_t n_chunks = std::min<int64_t>(n_groups, std::clamp<int64_t>(n_long, params->nth, 8 * params->nth));
    for (int64_t chunk = params->ith; chunk < n_chunks;
         chunk         = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t end = n_groups * (chunk + 1) / n_chunks;
        for (int64_t i = n_groups * chunk / n_chunks; i < end; i++) {
            const auto * x = (const typename kernel::weights *) ((const char *) src0->data + i * group);
            multiply_group<kernel>(n_blocks, x, columns, n_columns, (float *) dst->data + i * kernel::rows, dst->nb[1] / sizeof(float));
        }
    }
}

bool is_plain_product(const ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    return src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && src1->ne[1] > 0 &&
            src0->ne[2] == 1 && src0->ne[3] == 1 && src1->ne[2] == 1 &&
            src1->ne[3] == 1 && dst->nb[0] == sizeof(float) &&
            src0->nb[1] == ggml_row_size(src0->type, src0->ne[0]);
}

} // namespace

bool swift_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block) {
    if (!is_plain_product(dst)) {
        return false;
    }
    const bool is_wide = dst->src[1]->ne[1] > SWIFT_NARROW_MAX;
    if (params->swift_prompts) {
        return is_wide && swift_mul_mat_wide(params, dst, n_interleaved, n_block);
    }
    if (!params->use_ref || is_wide) {
        return false;
    }
    const ggml_tensor * src0 = dst->src[0];
    if (n_interleaved == 8 && n_block == 8 && src0->ne[1] % 8 == 0) {
        switch (src0->type) {
            case GGML_TYPE_Q4_0:
                multiply<q4_0_8x8>(params, dst, GGML_TYPE_Q8_0);
                return true;
            case GGML_TYPE_Q4_K:
                multiply<q4_K_8x8>(params, dst, GGML_TYPE_Q8_K);
                return true;
            default:
                return false;
        }
    }
    if (n_interleaved != 1) {
        return false;
    }
    const bool has_whole_steps = src0->ne[0] % floats<float>::step == 0;
    switch (src0->type) {
        case GGML_TYPE_F32:
            if (has_whole_steps && ggml_is_contiguous(dst->src[1])) {
                multiply<floats<float>>(params, dst, GGML_TYPE_F32);
                return true;
            }
            return false;
        case GGML_TYPE_F16:
            if (has_whole_steps) {
                multiply<floats<ggml_fp16_t>>(params, dst, GGML_TYPE_F16);
                return true;
            }
            return false;
        case GGML_TYPE_Q5_K:
            multiply<q5_K>(params, dst, GGML_TYPE_Q8_K);
            return true;
        case GGML_TYPE_Q6_K:
            multiply<q6_K>(params, dst, GGML_TYPE_Q8_K);
            return true;
        default:
            break;
    }
    if (src0->ne[1] % four_rows<q8_0>::rows != 0) {
        return false;
    }
    switch (src0->type) {
        case GGML_TYPE_Q8_0:
            multiply<four_rows<q8_0>>(params, dst, GGML_TYPE_Q8_0);
            return true;
        case GGML_TYPE_Q5_0:
            multiply<four_rows<q5_0>>(params, dst, GGML_TYPE_Q8_0);
            return true;
        case GGML_TYPE_Q4_1:
            multiply<four_rows<q4_1>>(params, dst, GGML_TYPE_Q8_1);
            return true;
        case GGML_TYPE_Q5_1:
            multiply<four_rows<q5_1>>(params, dst, GGML_TYPE_Q8_1);
            return true;
        default:
            return false;
    }
}

#else // SWIFT_NARROW_AVX2

bool swift_mul_mat(const ggml_compute_params *, ggml_tensor *, int64_t, int64_t) {
    return false;
}

#endif // SWIFT_NARROW_AVX2
