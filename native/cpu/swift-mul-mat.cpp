// ggml multiplies a matrix with one column by a kernel that unpacks the quantised weights as it goes.
// With two or three columns it runs that kernel for each of them, with more it switches (for some
// types, on some machines) to kernels made for long prompts, which round differently. Verifying drafts
// needs neither: here weights are unpacked once and multiplied with every column, in just the float
// operations of the one-column kernel, in their order. What a token's logits are then does not depend
// on how many tokens are decoded beside it, to the bit, and further tokens cost little.
//
// All that may differ from the one-column kernels is the order of integer additions, which is exact.

#include "swift-mul-mat.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "repack.h"
#include "simd-mappings.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    define SWIFT_NARROW_AVX2
#endif

#ifdef SWIFT_NARROW_AVX2

#    include <immintrin.h>

namespace {

constexpr int MAX_COLUMNS = SWIFT_NARROW_MAX;

// Weights unpacked once serve so many columns while all sums stay in registers.
#    if defined(__AVX512VL__)
constexpr int TILE = 8;
#    else
constexpr int TILE = 4;
#    endif

// sums + u * s, added up by fours; u of at most 7 bits (or 128) where pairs have to fit 16 bits
inline __m256i dot(__m256i sums, __m256i u, __m256i s) {
#    if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, u, s);
#    elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, u, s);
#    else
    const __m256i pairs = _mm256_maddubs_epi16(u, s);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#    endif
}

// x * y by fours, both signed bytes, where the instructions want one side unsigned
struct signed_dot {
#    if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
    // 128 is added to each x, and 128 times the sum of y taken off
    __m256i y, start;

    explicit signed_dot(__m256i y) :
        y(y) {
        start = _mm256_sub_epi32(_mm256_setzero_si256(), dot(_mm256_setzero_si256(), _mm256_set1_epi8(-128), y));
    }

    __m256i operator()(__m256i x) const { return dot(start, _mm256_xor_si256(x, _mm256_set1_epi8(-128)), y); }
#    else
    // the sign of x goes to y; sums of two stay within 16 bits
    __m256i y;

    explicit signed_dot(__m256i y) :
        y(y) {}

    __m256i operator()(__m256i x) const {
        return dot(_mm256_setzero_si256(), _mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
    }
#    endif
};

// sums + a * b, added up by twos
inline __m256i dot_16(__m256i sums, __m256i a, __m256i b) {
#    if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sums, a, b);
#    elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sums, a, b);
#    else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#    endif
}

inline __m256i eight_bytes(const int8_t * bytes) {
    int64_t eight;
    memcpy(&eight, bytes, sizeof(eight));
    return _mm256_set1_epi64x(eight);
}

// In repacked blocks eight bytes of a row follow eight of the row before. Multiplied with the same eight
// of a column, each row has two sums beside each other, in one vector for rows 0-3 and one for 4-7.
inline __m256i join_pairs(__m256i rows_0123, __m256i rows_4567) {
    const __m256i rows_01452367 = _mm256_hadd_epi32(rows_0123, rows_4567);
    return _mm256_permute4x64_epi64(rows_01452367, _MM_SHUFFLE(3, 1, 2, 0));
}

inline __m256 halves(const ggml_half * eight) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) eight));
}

// ggml's hsum_float_8: the order of these additions is part of the result
inline float add_up(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_extractf128_ps(lanes, 1), _mm256_castps256_ps128(lanes));
    sum        = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Weights are read once and faster than the hardware's own prefetching expects while each is multiplied with
// many columns: ask for what comes this far behind. To the second cache: the first has to hold the columns,
// whose rows may be long (measured, docs/benchmarks.md).
constexpr size_t AHEAD = 16384;

inline void prefetch(const void * bytes, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        _mm_prefetch((const char *) bytes + AHEAD + i, _MM_HINT_T1);
    }
}

// kernel::multiply_tile for the columns left, of which it does N at most
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

// -- repacked Q4_K: eight rows at a time, as ggml_gemv_q4_K_8x8_q8_K --------------------------------

struct q4_K_8x8 {
    using weights  = block_q4_Kx8;
    using column   = block_q8_K;
    using prepared = block_q8_K; // columns are read as they are

    static constexpr int64_t rows = 8;

    // The 6-bit scales and minimums of a block: 12 bytes for each sub-block of 32 weights, eight of each.
    struct factors {
        alignas(32) uint8_t scales[8][8]; // [sub-block][row]
        alignas(32) uint8_t mins[8][8];
    };

    static factors unpack_factors(const weights & block) {
        // three words of each sub-block: apart, eight beside each other
        const __m256i every_third = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
        const int *   words       = (const int *) block.scales;
        const __m256i in[3]       = {
            _mm256_i32gather_epi32(words, every_third, 4),
            _mm256_i32gather_epi32(words + 1, every_third, 4),
            _mm256_i32gather_epi32(words + 2, every_third, 4),
        };
        const __m256i six  = _mm256_set1_epi8(0x3f);
        const __m256i four = _mm256_set1_epi8(0x0f);
        const __m256i two  = _mm256_set1_epi8(0x30);

        const __m256i scales_0 = _mm256_and_si256(in[0], six);
        const __m256i mins_0   = _mm256_and_si256(in[1], six);
        const __m256i scales_4 = _mm256_or_si256(
                _mm256_and_si256(in[2], four), _mm256_and_si256(_mm256_srli_epi32(in[0], 2), two));
        const __m256i mins_4 = _mm256_or_si256(
                _mm256_and_si256(_mm256_srli_epi32(in[2], 4), four), _mm256_and_si256(_mm256_srli_epi32(in[1], 2), two));

        factors out;
        store_beside(out.scales, scales_0, scales_4);
        store_beside(out.mins, mins_0, mins_4);
        return out;
    }

    // Words of rows 0-3 and of rows 4-7, eight each, to eight rows at a time
    static void store_beside(uint8_t (*to)[8], __m256i rows_0123, __m256i rows_4567) {
        const __m256i even = _mm256_unpacklo_epi32(rows_0123, rows_4567); // sub-blocks 0 1 | 4 5
        const __m256i odd  = _mm256_unpackhi_epi32(rows_0123, rows_4567); // sub-blocks 2 3 | 6 7
        _mm256_store_si256((__m256i *) to[0], _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_store_si256((__m256i *) to[4], _mm256_permute2x128_si256(even, odd, 0x31));
    }

    template <int N>
    static void multiply_tile(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        const __m256i low     = _mm256_set1_epi8(0x0F);
        __m256        sums[N] = {}, min_sums[N] = {};
        for (int64_t b = 0; b < n_blocks; b++) {
            prefetch(x + b, sizeof(weights));
            const factors w = unpack_factors(x[b]);

            // sums of 32 quants of the columns, both of a pair of sub-blocks beside each other
            alignas(16) int32_t pair_sums[N][4];
            for (int c = 0; c < N; c++) {
                const __m128i * s = (const __m128i *) columns[c * n_blocks + b].bsums;
                _mm_store_si128((__m128i *) pair_sums[c], _mm_hadd_epi16(_mm_loadu_si128(s), _mm_loadu_si128(s + 1)));
            }

            __m256i dots[N][2] = {}, min_dots[N] = {};
            for (int pair = 0; pair < QK_K / 64; pair++) {
                __m256i sub[N][2][2] = {};
                for (int i = 0; i < 4; i++) {
                    __m256i quants[2][2];
                    for (int half = 0; half < 2; half++) {
                        const uint8_t * bytes   = x[b].qs + pair * 256 + i * 64 + half * 32;
                        const __m256i   nibbles = _mm256_loadu_si256((const __m256i *) bytes);
                        quants[0][half]         = _mm256_and_si256(nibbles, low);
                        quants[1][half]         = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low);
                    }
                    for (int c = 0; c < N; c++) {
                        const int8_t * y = columns[c * n_blocks + b].qs + 64 * pair + 8 * i;
                        for (int k = 0; k < 2; k++) {
                            const __m256i q8 = eight_bytes(y + 32 * k);
                            sub[c][k][0]     = dot(sub[c][k][0], quants[k][0], q8);
                            sub[c][k][1]     = dot(sub[c][k][1], quants[k][1], q8);
                        }
                    }
                }
                for (int k = 0; k < 2; k++) {
                    const __m128i rows      = _mm_loadl_epi64((const __m128i *) w.scales[2 * pair + k]);
                    const __m128i twice     = _mm_unpacklo_epi8(rows, rows); // each row has two sums
                    const __m256i scales[2] = { _mm256_cvtepu8_epi32(twice), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(twice, twice)) };
                    for (int c = 0; c < N; c++) {
                        for (int half = 0; half < 2; half++) {
                            dots[c][half] = _mm256_add_epi32(dots[c][half], _mm256_mullo_epi32(sub[c][k][half], scales[half]));
                        }
                    }
                }
                const __m128i mins_0 = _mm_loadl_epi64((const __m128i *) w.mins[2 * pair]);
                const __m128i mins_1 = _mm_loadl_epi64((const __m128i *) w.mins[2 * pair + 1]);
                const __m256i mins   = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(mins_0, mins_1));
                for (int c = 0; c < N; c++) {
                    min_dots[c] = _mm256_add_epi32(min_dots[c], _mm256_madd_epi16(_mm256_set1_epi32(pair_sums[c][pair]), mins));
                }
            }
            const __m256 d = halves(x[b].d), dmin = halves(x[b].dmin);
            for (int c = 0; c < N; c++) {
                const __m256  dy    = _mm256_set1_ps(columns[c * n_blocks + b].d);
                const __m256i total = join_pairs(dots[c][0], dots[c][1]);
                sums[c]             = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(d, dy), sums[c]);
                min_sums[c]         = _mm256_fmadd_ps(_mm256_cvtepi32_ps(min_dots[c]), _mm256_mul_ps(dmin, dy), min_sums[c]);
            }
        }
        for (int c = 0; c < N; c++) {
            _mm256_storeu_ps(out + c * out_stride, _mm256_sub_ps(sums[c], min_sums[c]));
        }
    }

    static constexpr int tile = TILE / 2;
};

// -- repacked Q4_0: eight rows at a time, as ggml_gemv_q4_0_8x8_q8_0 --------------------------------

struct q4_0_8x8 {
    using weights = block_q4_0x8;
    using column  = block_q8_0;

    static constexpr int64_t rows = 8;

    // Repacked nibbles are two's complement; with 8 added they are unsigned, and 8 times the sum of the
    // column's quants is taken off again.
    struct prepared {
        float   d;
        int32_t excess;
        int8_t  qs[QK8_0];
    };

    static prepared prepare(const column & y) {
        prepared out = { GGML_CPU_FP16_TO_FP32(y.d), 0, {} };
        for (int i = 0; i < QK8_0; i++) {
            out.excess += 8 * y.qs[i];
            out.qs[i] = y.qs[i];
        }
        return out;
    }

    template <int N>
    static void multiply_tile(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        const __m256i low = _mm256_set1_epi8(0x0F), eight = _mm256_set1_epi8(8);
        __m256        sums[N] = {};
        for (int64_t b = 0; b < n_blocks; b++) {
            prefetch(x + b, sizeof(weights));
            __m256i quants[4][2];
            for (int i = 0; i < 2; i++) {
                for (int half = 0; half < 2; half++) {
                    const __m256i nibbles = _mm256_loadu_si256((const __m256i *) x[b].qs + 2 * i + half);
                    const __m256i high    = _mm256_srli_epi16(nibbles, 4);
                    quants[i][half]       = _mm256_xor_si256(_mm256_and_si256(nibbles, low), eight);
                    quants[i + 2][half]   = _mm256_xor_si256(_mm256_and_si256(high, low), eight);
                }
            }
            const __m256 d = halves(x[b].d);
            for (int c = 0; c < N; c++) {
                const prepared & y       = columns[c * n_blocks + b];
                __m256i          dots[2] = {};
                for (int i = 0; i < 4; i++) {
                    const __m256i q8 = eight_bytes(y.qs + 8 * i);
                    dots[0]          = dot(dots[0], quants[i][0], q8);
                    dots[1]          = dot(dots[1], quants[i][1], q8);
                }
                const __m256i total = _mm256_sub_epi32(join_pairs(dots[0], dots[1]), _mm256_set1_epi32(y.excess));
                sums[c]             = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(d, _mm256_set1_ps(y.d)), sums[c]);
            }
        }
        for (int c = 0; c < N; c++) {
            _mm256_storeu_ps(out + c * out_stride, sums[c]);
        }
    }

    static constexpr int tile = TILE;
};

// -- Q6_K: as ggml_vec_dot_q6_K_q8_K ----------------------------------------------------------------

struct q6_K {
    using weights  = block_q6_K;
    using column   = block_q8_K;
    using prepared = block_q8_K;

    static constexpr int64_t rows = 1;

    struct unpacked {
        __m256i quants[8]; // 32 each, unsigned: 32 too large
        __m256i scales[8]; // 16 bits
        __m256i all_scales;
        float   d;
    };

    static unpacked unpack(const weights & block) {
        const __m256i low = _mm256_set1_epi8(0x0F), high = _mm256_set1_epi8(0x30);
        const __m128i scales = _mm_loadu_si128((const __m128i *) block.scales);
        unpacked      out;
        out.d          = GGML_CPU_FP16_TO_FP32(block.d);
        out.all_scales = _mm256_cvtepi8_epi16(scales);
        for (int half = 0; half < 2; half++) {
            const __m256i * ql     = (const __m256i *) block.ql + 2 * half;
            const __m256i   first  = _mm256_loadu_si256(ql);
            const __m256i   second = _mm256_loadu_si256(ql + 1);
            const __m256i   top    = _mm256_loadu_si256((const __m256i *) block.qh + half);
            const auto      join   = [&](__m256i nibbles, __m256i bits) {
                return _mm256_or_si256(_mm256_and_si256(nibbles, low), _mm256_and_si256(bits, high));
            };
            out.quants[4 * half]     = join(first, _mm256_slli_epi16(top, 4));
            out.quants[4 * half + 1] = join(second, _mm256_slli_epi16(top, 2));
            out.quants[4 * half + 2] = join(_mm256_srli_epi16(first, 4), top);
            out.quants[4 * half + 3] = join(_mm256_srli_epi16(second, 4), _mm256_srli_epi16(top, 2));
        }
        for (int i = 0; i < 8; i++) { // of sixteen weights each
            const __m128i pair = _mm_set_epi64x(0x0101010101010101 * (2 * i + 1), 0x0101010101010101 * (2 * i));
            out.scales[i]      = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, pair));
        }
        return out;
    }

    template <int N>
    static void multiply_tile(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        __m256 sums[N] = {};
        for (int64_t b = 0; b < n_blocks; b++) {
            prefetch(x + b, sizeof(weights));
            const unpacked w = unpack(x[b]);
            for (int c = 0; c < N; c++) {
                sums[c] = add_product(sums[c], w, columns[c * n_blocks + b]);
            }
        }
        for (int c = 0; c < N; c++) {
            out[c * out_stride] = add_up(sums[c]);
        }
    }

    static __m256 add_product(__m256 sum, const unpacked & w, const column & y) {
        __m256i dots = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            const __m256i q8 = _mm256_loadu_si256((const __m256i *) y.qs + i);
            dots             = dot_16(dots, w.scales[i], _mm256_maddubs_epi16(w.quants[i], q8));
        }
        const __m256i bsums = _mm256_loadu_si256((const __m256i *) y.bsums);
        dots                = _mm256_sub_epi32(dots, _mm256_slli_epi32(_mm256_madd_epi16(bsums, w.all_scales), 5));
        return _mm256_fmadd_ps(_mm256_set1_ps(y.d * w.d), _mm256_cvtepi32_ps(dots), sum);
    }

    static constexpr int tile = TILE;
};

// -- Q8_0: as ggml_vec_dot_q8_0_q8_0 ----------------------------------------------------------------

struct q8_0 {
    using weights = block_q8_0;
    using column  = block_q8_0;

    static constexpr int64_t rows = 4; // at a time, so that what is done for a column serves all

    struct prepared {
        signed_dot dot_with;
        float      d;
    };

    static prepared prepare(const column & y) {
        return { signed_dot(_mm256_loadu_si256((const __m256i *) y.qs)), GGML_CPU_FP16_TO_FP32(y.d) };
    }

    // Four rows at once are no order that the hardware foresees: the next four are asked for in order
    // instead, a piece with every block. To the first cache, where that holds them beside the columns.
    static constexpr size_t FIRST_CACHE = 16384;

    template <int hint>
    static void prefetch_in_order(const weights * next) {
        for (size_t i = 0; i < rows * sizeof(weights); i += 64) {
            _mm_prefetch((const char *) next + i, (_mm_hint) hint);
        }
    }

    template <int N, int hint>
    static void multiply_rows(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        static_assert(N <= 4);
        __m256          sums[rows][N] = {};
        const weights * next          = x + rows * n_blocks;
        for (int64_t b = 0; b < n_blocks; b++) {
            prefetch_in_order<hint>(next + rows * b);
            const auto   scale = [&](int c) { return c < N ? columns[c * n_blocks + b].d : 0.0f; };
            const __m128 dy    = _mm_setr_ps(scale(0), scale(1), scale(2), scale(3));

            __m256i           quants[rows];
            alignas(16) float scales[rows][4]; // a row's times each column's
            for (int r = 0; r < rows; r++) {
                const weights & block = x[r * n_blocks + b];
                quants[r]             = _mm256_loadu_si256((const __m256i *) block.qs);
                _mm_store_ps(scales[r], _mm_mul_ps(_mm_set1_ps(GGML_CPU_FP16_TO_FP32(block.d)), dy));
            }
            for (int c = 0; c < N; c++) {
                const signed_dot dot_with = columns[c * n_blocks + b].dot_with;
                for (int r = 0; r < rows; r++) {
                    sums[r][c] = _mm256_fmadd_ps(_mm256_set1_ps(scales[r][c]), _mm256_cvtepi32_ps(dot_with(quants[r])), sums[r][c]);
                }
            }
        }
        for (int c = 0; c < N; c++) {
            for (int r = 0; r < rows; r++) {
                out[c * out_stride + r] = add_up(sums[r][c]);
            }
        }
    }

    // One column leaves nothing to share: row after row, as they lie.
    static void multiply_one(int64_t n_blocks, const weights * x, const prepared * y, float * out) {
        for (int r = 0; r < rows; r++, x += n_blocks) {
            __m256 sums = _mm256_setzero_ps();
            for (int64_t b = 0; b < n_blocks; b++) {
                prefetch(x + b, sizeof(weights));
                const __m256i dots = y[b].dot_with(_mm256_loadu_si256((const __m256i *) x[b].qs));
                sums               = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(x[b].d) * y[b].d), _mm256_cvtepi32_ps(dots), sums);
            }
            out[r] = add_up(sums);
        }
    }

    template <int N>
    static void multiply_tile(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        if constexpr (N == 1) {
            multiply_one(n_blocks, x, columns, out);
        } else if (rows * n_blocks * sizeof(weights) <= FIRST_CACHE) {
            multiply_rows<N, _MM_HINT_T0>(n_blocks, x, columns, out, out_stride);
        } else {
            multiply_rows<N, _MM_HINT_T1>(n_blocks, x, columns, out, out_stride);
        }
    }

    static constexpr int tile = TILE / 2;
};

// -- all types --------------------------------------------------------------------------------------

// The columns in the format the kernels read, shared out to the threads in pieces of blocks.
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

// Columns as the kernel wants them: as they are, or each thread's own copy, which takes less time than to
// wait for one another once more.
template <typename kernel>
const typename kernel::prepared * prepared_columns(const void * data, int64_t n) {
    const auto * columns = (const typename kernel::column *) data;
    if constexpr (std::is_same_v<typename kernel::column, typename kernel::prepared>) {
        return columns;
    } else {
        static thread_local std::vector<typename kernel::prepared> copy; // kept: asked for with every product
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

    quantize_columns(params, src1, column_type, stride);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // several chunks a thread: one that was held up leaves its share to the others; but none so short that
    // what is fetched ahead of it were mostly another thread's
    const auto *  columns  = prepared_columns<kernel>(params->wdata, n_columns * n_blocks);
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
            src1->ne[1] <= SWIFT_NARROW_MAX && src0->ne[2] == 1 && src0->ne[3] == 1 && src1->ne[2] == 1 &&
            src1->ne[3] == 1 && dst->nb[0] == sizeof(float) &&
            src0->nb[1] == ggml_row_size(src0->type, src0->ne[0]);
}

} // namespace

bool swift_mul_mat(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_interleaved, int64_t n_block) {
    if (!params->use_ref || !is_plain_product(dst)) {
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
    if (n_interleaved == 1 && src0->type == GGML_TYPE_Q6_K) {
        multiply<q6_K>(params, dst, GGML_TYPE_Q8_K);
        return true;
    }
    if (n_interleaved == 1 && src0->type == GGML_TYPE_Q8_0 && src0->ne[1] % q8_0::rows == 0) {
        multiply<q8_0>(params, dst, GGML_TYPE_Q8_0);
        return true;
    }
    return false;
}

#else // SWIFT_NARROW_AVX2

bool swift_mul_mat(const ggml_compute_params *, ggml_tensor *, int64_t, int64_t) {
    return false;
}

#endif // SWIFT_NARROW_AVX2
