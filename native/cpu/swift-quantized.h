// The kernel for quantised weights: columns are quantised, and rows multiplied with them (swift-panels.h).

#pragma once

#include "swift-kernel.h"
#include "swift-panels.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>

namespace {

// -- columns ------------------------------------------------------------------------------------------

// As quantize_row_q8_K, which is written for no vectors.
inline void quantize(const float * x, block_q8_K & to) {
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
struct quantized {
    using column = typename type::column;
    using block  = typename type::weights;

    static constexpr bool IS_Q8_K = std::is_same_v<column, block_q8_K>;
    static constexpr int  ROWS    = PANELS * LANES;

    // Quantises the columns into the work buffer, shared out to the threads in pieces of blocks.
    static void prepare(const ggml_compute_params * params, const ggml_tensor * src1) {
        constexpr ggml_type type_of_column = IS_Q8_K ? GGML_TYPE_Q8_K : type::HAS_MINIMUM ? GGML_TYPE_Q8_1
                                                                                          : GGML_TYPE_Q8_0;

        const auto    from_float = ggml_get_type_traits_cpu(type_of_column)->from_float;
        const int64_t n_block    = ggml_blck_size(type_of_column);
        const int64_t n_blocks   = src1->ne[0] / n_block;
        const int64_t begin      = n_blocks * params->ith / params->nth;
        const int64_t end        = n_blocks * (params->ith + 1) / params->nth;
        for (int64_t c = 0; begin < end && c < src1->ne[1] * src1->ne[2]; c++) {
            const float * in  = column_of(src1, c);
            column *      out = (column *) params->wdata + c * n_blocks;
            if constexpr (IS_Q8_K) {
                for (int64_t b = begin; b < end; b++) {
                    quantize(in + b * n_block, out[b]);
                    if constexpr (type::SUB == 32) { // sums of 32 numbers
                        for (int i = 0; i < 8; i++) {
                            out[b].bsums[i] = (int16_t) (out[b].bsums[2 * i] + out[b].bsums[2 * i + 1]);
                        }
                    }
                }
            } else {
                from_float(in + begin * n_block, out + begin, (end - begin) * n_block);
            }
        }
    }

    // The columns of these numbers, which prepare() has quantised; all if `which` is null. What is 16 bits in blocks of
    // 32 becomes floats: each thread's own, which takes less time than to wait for one another once more.
    static columns<column> gather(
            const ggml_compute_params * params, const ggml_tensor * src1, const int64_t * which, int n_columns) {
        static thread_local std::vector<column> copies; // kept: asked for with every product
        static thread_local std::vector<float>  scales, sums;
        static thread_local std::vector<int>    starts;

        const int64_t  n_blocks = src1->ne[0] / (IS_Q8_K ? QK_K : QK8_0);
        const column * blocks   = (const column *) params->wdata;
        const int64_t  n        = n_blocks * n_columns;
        if (which) {
            copies.resize(n);
            for (int c = 0; c < n_columns; c++) {
                std::copy_n(blocks + which[c] * n_blocks, n_blocks, copies.data() + c * n_blocks);
            }
            blocks = copies.data();
        }
        columns<column> out = { blocks, nullptr, nullptr, nullptr, n_blocks };
        if constexpr (!IS_Q8_K) {
            scales.resize(n);
            for (int64_t i = 0; i < n; i++) {
                scales[i] = GGML_CPU_FP16_TO_FP32(blocks[i].d);
            }
            out.scales = scales.data();
        }
        if constexpr (type::HAS_MINIMUM && !IS_Q8_K) {
            sums.resize(n);
            for (int64_t i = 0; i < n; i++) {
                sums[i] = GGML_CPU_FP16_TO_FP32(blocks[i].s);
            }
            out.sums = sums.data();
        }
        if constexpr (!IS_Q8_K && OFFSET<type> != 0) {
            starts.resize(n);
            for (int64_t i = 0; i < n; i++) {
                const __m256i numbers = _mm256_loadu_si256((const __m256i *) blocks[i].qs);
                starts[i]             = -type::OFFSET * sum_of(dot_unsigned(_mm256_setzero_si256(), _mm256_set1_epi8(1), numbers));
            }
            out.starts = starts.data();
        }
        return out;
    }

    // Groups `begin` to `end` of ROWS rows with all columns: out[column][row]. In prompts a few groups of rows are
    // multiplied with AT_ONCE columns, then with the next ones.
    static void multiply(
            const matrix & w, int64_t begin, int64_t end, const columns<column> & y, int n_columns, float * const * out) {
        const int64_t n_at_once = std::max<int64_t>(1, BYTES_AT_ONCE / (ROWS * w.stride));
        for (; begin < end; begin += n_at_once) {
            for (int c = 0; c < n_columns; c += AT_ONCE) {
                for (int64_t i = begin; i < std::min(end, begin + n_at_once); i++) {
                    multiply_group(w, i * ROWS, y.at(c, 0), std::min(AT_ONCE, n_columns - c), out + c, c == 0 && i + 1 < end);
                }
            }
        }
    }

private:
    // is_first: the rows come from memory, and so do those after them
    static void multiply_group(
            const matrix & w, int64_t first, const columns<column> & y, int n_columns, float * const * out, bool is_first) {
        constexpr int PIECE = IS_Q8_K ? 1 : 8; // blocks that are unpacked at once: what the first cache holds

        const rows    x      = w.rows_from(first, ROWS);
        const int64_t n_rows = w.n_rows - first;

        sums results[AT_ONCE][PANELS];
        std::fill_n(results[0], n_columns * PANELS, sums {}); // not all: they would fill the first cache
        for (int c = 0; c < n_columns; c++) {                 // written at the end: asked for in time
            __builtin_prefetch(out[c] + first, 1);
            __builtin_prefetch(out[c] + first + LANES, 1);
        }
        for (int64_t b = 0; b < y.n_blocks; b += PIECE) {
            const int   n = (int) std::min<int64_t>(PIECE, y.n_blocks - b);
            panel<type> unpacked[PIECE][PANELS];
            for (int i = 0; i < n; i++) {
                for (int p = 0; p < PANELS; p++) {
                    const int64_t offset = (b + i) * (int64_t) sizeof(block);
                    // of the rows after these as much as of these, in the order in which they lie in memory
                    const char * ahead = x.at(is_first ? ROWS : 0, 0) + (offset * PANELS + p * sizeof(block)) * (LANES / type::layout::ROWS);
                    unpacked[i][p].unpack({ x.at(p * LANES, (int) offset), x.stride, ahead });
                }
            }
            for (int c = 0; c < n_columns; c += TILE) {
                add_up_to<type, TILE>(unpacked, n, y.at(c, b), n_columns - c, results + c);
            }
        }
        for (int c = 0; c < n_columns; c++) {
            for (int p = 0; p < PANELS && p * LANES < n_rows; p++) {
                const int64_t n_left = std::min<int64_t>(LANES, n_rows - p * LANES);
                store(out[c] + first + p * LANES, total<type>(results[c][p]), (int) n_left);
            }
        }
    }
};

} // namespace
