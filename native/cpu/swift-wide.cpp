// Products of a matrix with many columns, as prompts have them. A few rows of weights are unpacked once and
// multiplied with every column, in the same float operations whatever the number of columns.

#include "swift-wide.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define SWIFT_AVX2
#endif

#ifdef SWIFT_AVX2

#    include "swift-panels.h"

namespace {

// -- columns ------------------------------------------------------------------------------------------

// As quantize_row_q8_K, which is written for no vectors.
void quantize(const float * x, block_q8_K & to) {
    reals largest = everywhere(0.0f), zeros = everywhere(0.0f);
    for (int i = 0; i < QK_K; i += LANES) {
        const reals some = load(x + i);
        largest          = maximum(largest, absolute(some));
        zeros            = add(zeros, subtract(some, some)); // NaN where one is not finite
    }
    const float most = largest_of(largest);
    if (has_nan(zeros) || most == 0.0f) {
        memset(&to, 0, sizeof(to));
        to.d = has_nan(zeros) ? NAN : 0.0f;
        return;
    }
    const float * first = std::find_if(x, x + QK_K, [&](float each) { return std::fabs(each) == most; });
    const float   scale = -127.0f / *first;
    for (int i = 0; i < QK_K; i += 16) {
        const __m128i bytes = rounded_16(x + i, scale);
        _mm_storeu_si128((__m128i *) (to.qs + i), bytes);
        const __m256i words = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), _mm256_set1_epi16(1));
        to.bsums[i / 16]    = (int16_t) sum_of(words);
    }
    to.d = 1 / scale;
}

template <typename type>
void prepare(block_q8_K & y) {
    if constexpr (type::panel::N_SUB == 8) { // sums of 32 numbers
        for (int i = 0; i < 8; i++) {
            y.bsums[i] = (int16_t) (y.bsums[2 * i] + y.bsums[2 * i + 1]);
        }
    }
}

// A block of 32 with RAISE added
template <typename type, typename block>
void prepare(block & y) {
    const __m256i numbers = _mm256_loadu_si256((const __m256i *) y.qs);
    _mm256_storeu_si256((__m256i *) y.qs, _mm256_xor_si256(numbers, _mm256_set1_epi8((char) RAISE)));
}

// The columns in the format that the kernels read, shared out to the threads in pieces of blocks.
template <typename type>
void quantize_columns(const ggml_compute_params * params, const ggml_tensor * src1, ggml_type column_type) {
    using block              = typename type::column;
    const auto    from_float = ggml_get_type_traits_cpu(column_type)->from_float;
    const int64_t n_block    = ggml_blck_size(column_type);
    const int64_t n_blocks   = src1->ne[0] / n_block;
    const int64_t begin      = n_blocks * params->ith / params->nth;
    const int64_t end        = n_blocks * (params->ith + 1) / params->nth;
    for (int64_t c = 0; begin < end && c < src1->ne[1]; c++) {
        const float * in  = (const float *) ((const char *) src1->data + c * src1->nb[1]);
        block *       out = (block *) params->wdata + c * n_blocks;
        if constexpr (std::is_same_v<block, block_q8_K>) {
            for (int64_t b = begin; b < end; b++) {
                quantize(in + b * n_block, out[b]);
            }
        } else {
            from_float(in + begin * n_block, out + begin, (end - begin) * n_block);
        }
        for (int64_t b = begin; b < end; b++) {
            prepare<type>(out[b]);
        }
    }
}

// What is 16 bits in blocks of 32, as floats: each thread's own, which takes less time than to wait for one
// another once more
template <typename block>
columns<block> with_scales(const block * blocks, int64_t n_blocks, int n_columns) {
    static thread_local std::vector<float> scales, sums; // kept: asked for with every product
    columns<block>                         out = { blocks, nullptr, nullptr, n_blocks };
    if constexpr (!std::is_same_v<block, block_q8_K>) {
        const int64_t n = n_blocks * n_columns;
        scales.resize(n);
        for (int64_t i = 0; i < n; i++) {
            scales[i] = GGML_CPU_FP16_TO_FP32(blocks[i].d);
        }
        out.scales = scales.data();
        if constexpr (std::is_same_v<block, block_q8_1>) {
            sums.resize(n);
            for (int64_t i = 0; i < n; i++) {
                sums[i] = GGML_CPU_FP16_TO_FP32(blocks[i].s);
            }
            out.sums = sums.data();
        }
    }
    return out;
}

// -- rows ---------------------------------------------------------------------------------------------

// add_products for the columns left, of which it does N at most
template <typename type, int N, typename panel, typename block>
void add_up_to(const panel (*w)[PANELS], int n, const columns<block> & y, int n_columns, sums * to) {
    if (n_columns >= N) {
        add_products<type, N>(w, n, y, to);
    } else if constexpr (N > 1) {
        add_up_to<type, N - 1>(w, n, y, n_columns, to);
    }
}

// Columns at once, so that they and their sums stay in the second cache. In prompts a few groups of rows are
// multiplied with so many columns, then with the next ones.
constexpr int    AT_ONCE      = 64;
constexpr size_t ROWS_AT_ONCE = 512 * 1024; // bytes

// ROWS rows, the first of which begins at x, with AT_ONCE columns at most: out[column][row] of the first n_rows
// is_first: the rows come from memory, and so do those after them
template <typename type>
void multiply_group(
        const rows & x, int n_rows, int64_t n_blocks, const columns<typename type::column> & y, int n_columns,
        float * out, size_t out_stride, bool is_first) {
    using panel = typename type::panel;

    constexpr bool IS_32 = std::is_same_v<panel, panel_32>;
    constexpr int  PIECE = IS_32 ? 8 : 1; // blocks that are unpacked at once: what the first cache holds

    sums results[AT_ONCE] = {};
    for (int c = 0; c < n_columns; c++) { // written at the end: asked for in time
        __builtin_prefetch(out + c * out_stride, 1);
        __builtin_prefetch(out + c * out_stride + ROWS - 1, 1);
    }
    const size_t ahead = is_first ? ROWS * x.stride / n_blocks : 0;
    for (int64_t b = 0; b < n_blocks; b += PIECE) {
        const int n = (int) std::min<int64_t>(PIECE, n_blocks - b);
        panel     w[PIECE][PANELS];
        for (int i = 0; i < n; i++) {
            prefetch(x.first + ROWS * x.stride + (b + i) * ahead, ahead);
            for (int p = 0; p < PANELS; p++) {
                type::unpack({ x.at(p * LANES, (int) ((b + i) * sizeof(typename type::weights))), x.stride }, w[i][p]);
            }
        }
        for (int c = 0; c < n_columns; c += TILE) {
            add_up_to<type, TILE>(w, n, y.at(c, b), n_columns - c, results + c);
        }
    }
    for (int c = 0; c < n_columns; c++) {
        sums & result = results[c];
        if constexpr (type::HAS_MINIMUM) {
            for (int r = 0; r < ROWS; r++) {
                result.plain[r] += IS_32 ? result.minimums[r] : -result.minimums[r];
            }
        }
        memcpy(out + c * out_stride, result.plain, n_rows * sizeof(float));
    }
}

// work(begin, end) for all groups of `group` bytes, shared out to the threads
template <typename function>
void share_out(const ggml_compute_params * params, int64_t n_groups, size_t group, const function & work) {
    // several chunks a thread: one that was held up leaves its share to the others; but none so short that
    // what is fetched ahead of it were mostly another thread's
    const int64_t n_long   = n_groups * (int64_t) group / (int64_t) ROWS_AT_ONCE;
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

// The rows from `first` on with columns from `column` on
template <typename type>
void multiply_rows(
        const ggml_tensor * src0, int64_t first, int64_t n_blocks, const columns<typename type::column> & y, int n_columns,
        ggml_tensor * dst, int64_t column) {
    const size_t stride = src0->nb[1];
    const int    n_rows = (int) std::min<int64_t>(ROWS, src0->ne[1] - first);
    rows         x      = { (const char *) src0->data + first * stride, stride };
    if (n_rows < ROWS) { // nothing is read beyond the last row
        static thread_local std::vector<char> copy;
        copy.assign(ROWS * stride, 0);
        memcpy(copy.data(), x.first, n_rows * stride);
        x.first = copy.data();
    }
    float * out = (float *) ((char *) dst->data + column * dst->nb[1]) + first;
    multiply_group<type>(x, n_rows, n_blocks, y, n_columns, out, dst->nb[1] / sizeof(float), column == 0);
}

template <typename type>
void multiply(const ggml_compute_params * params, ggml_tensor * dst, ggml_type column_type) {
    const ggml_tensor * src0      = dst->src[0];
    const ggml_tensor * src1      = dst->src[1];
    const int64_t       n_rows    = src0->ne[1];
    const int64_t       n_blocks  = src0->ne[0] / ggml_blck_size(src0->type);
    const int           n_columns = (int) src1->ne[1];

    quantize_columns<type>(params, src1, column_type);
    start_sharing(params);
    const auto y = with_scales((const typename type::column *) params->wdata, n_blocks, n_columns);

    const size_t  stride    = src0->nb[1];
    const int64_t n_at_once = std::max<int64_t>(1, ROWS_AT_ONCE / (ROWS * stride));
    share_out(params, (n_rows + ROWS - 1) / ROWS, stride * ROWS, [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += n_at_once) {
            for (int c = 0; c < n_columns; c += AT_ONCE) {
                for (int64_t i = begin; i < std::min(end, begin + n_at_once); i++) {
                    multiply_rows<type>(src0, i * ROWS, n_blocks, y.at(c, 0), std::min(AT_ONCE, n_columns - c), dst, c);
                }
            }
        }
    });
}

// -- which kernel -------------------------------------------------------------------------------------

bool multiply_repacked(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: multiply<q4_0_8x8>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_IQ4_NL: multiply<iq4_nl_8x8>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_MXFP4: multiply<mxfp4_8x8>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_Q4_K: multiply<q4_K_8x8>(params, dst, GGML_TYPE_Q8_K); return true;
        case GGML_TYPE_Q2_K: multiply<q2_K_8x8>(params, dst, GGML_TYPE_Q8_K); return true;
        default: return false;
    }
}

bool multiply_plain(const ggml_compute_params * params, ggml_tensor * dst) {
    // without VNNI, ggml's are faster where sixteen weights share a scale (docs/lab/kernels.md)
    if (RAISE == 0 && (dst->src[0]->type == GGML_TYPE_Q2_K || dst->src[0]->type == GGML_TYPE_Q3_K || dst->src[0]->type == GGML_TYPE_Q6_K)) {
        return false;
    }
    switch (dst->src[0]->type) {
        case GGML_TYPE_Q4_0: multiply<q4_0>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_Q5_0: multiply<q5_0>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_Q8_0: multiply<q8_0>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_IQ4_NL: multiply<iq4_nl>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_MXFP4: multiply<mxfp4>(params, dst, GGML_TYPE_Q8_0); return true;
        case GGML_TYPE_Q4_1: multiply<q4_1>(params, dst, GGML_TYPE_Q8_1); return true;
        case GGML_TYPE_Q5_1: multiply<q5_1>(params, dst, GGML_TYPE_Q8_1); return true;
        case GGML_TYPE_Q2_K: multiply<q2_K>(params, dst, GGML_TYPE_Q8_K); return true;
        case GGML_TYPE_Q3_K: multiply<q3_K>(params, dst, GGML_TYPE_Q8_K); return true;
        case GGML_TYPE_Q4_K: multiply<q4_K>(params, dst, GGML_TYPE_Q8_K); return true;
        case GGML_TYPE_Q5_K: multiply<q5_K>(params, dst, GGML_TYPE_Q8_K); return true;
        case GGML_TYPE_Q6_K: multiply<q6_K>(params, dst, GGML_TYPE_Q8_K); return true;
        case GGML_TYPE_IQ4_XS: multiply<iq4_xs>(params, dst, GGML_TYPE_Q8_K); return true;
        default: return false;
    }
}

} // namespace

bool swift_mul_mat_wide(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block) {
    if (n_interleaved == 8 && n_block == 8) {
        return multiply_repacked(params, dst);
    }
    return n_interleaved == 1 && multiply_plain(params, dst);
}

#else // SWIFT_AVX2

bool swift_mul_mat_wide(const ggml_compute_params *, ggml_tensor *, int64_t, int64_t) {
    return false;
}

#endif // SWIFT_AVX2
