// One kernel for each type of weights. It unpacks a few rows once and multiplies them with every column.
//
// kernel::weights         the type of a block of weights
// kernel::rows            how many rows it reads at a time
// kernel::column          the format that columns are quantised to
// kernel::prepared        what is computed once for a column's block and serves all rows, by kernel::prepare;
//                         the column itself where there is nothing to compute
// kernel::tile            how many columns it multiplies at once, by kernel::multiply_tile<1 .. tile>

#pragma once

#include "ggml-impl.h"
#include "ggml-quants.h" // before repack.h, which would name the parts of blocks otherwise
#include "repack.h"
#include "simd-mappings.h"
#include "swift-simd.h"
#include "vec.h"

#include <cmath>
#include <type_traits>

namespace {

// -- repacked Q4_K: eight rows at a time, as ggml_gemv_q4_K_8x8_q8_K --------------------------------

struct q4_K_8x8 {
    using weights  = block_q4_Kx8;
    using column   = block_q8_K;
    using prepared = block_q8_K; // columns are read as they are

    static constexpr int64_t rows = 8;
    static constexpr int     tile = TILE / 2;

    // The 6-bit scales and minimums of a block: 12 bytes for each sub-block of 32 weights, eight of each.
    struct factors {
        alignas(32) uint8_t scales[8][8]; // [sub-block][row]
        alignas(32) uint8_t mins[8][8];
    };

    static factors unpack_factors(const weights & block) {
        // three words of each sub-block, taken apart: eight of each kind in a vector
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
};

// -- repacked Q4_0: eight rows at a time, as ggml_gemv_q4_0_8x8_q8_0 --------------------------------

struct q4_0_8x8 {
    using weights = block_q4_0x8;
    using column  = block_q8_0;

    static constexpr int64_t rows = 8;
    static constexpr int     tile = TILE;

    // Repacked nibbles are two's complement. 8 is added to make them unsigned; later 8 times the sum of the
    // column's quants is subtracted.
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
};

// -- Q6_K: as ggml_vec_dot_q6_K_q8_K ----------------------------------------------------------------

struct q6_K {
    using weights  = block_q6_K;
    using column   = block_q8_K;
    using prepared = block_q8_K;

    static constexpr int64_t rows = 1;
    static constexpr int     tile = TILE;

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
};

// -- Q5_K: as ggml_vec_dot_q5_K_q8_K ----------------------------------------------------------------

struct q5_K {
    using weights  = block_q5_K;
    using column   = block_q8_K;
    using prepared = block_q8_K;

    static constexpr int64_t rows = 1;
    static constexpr int     tile = TILE;

    struct unpacked {
        __m256i quants[8]; // 32 each, unsigned
        __m256i scales[8]; // 16 bits
        __m256i mins;      // 16 bits, twice each: as many as the column has sums
        float   d, dmin;
    };

    static unpacked unpack(const weights & block) {
        const __m256i low = _mm256_set1_epi8(0x0F), fifth = _mm256_set1_epi8(0x10);
        const __m256i high = _mm256_loadu_si256((const __m256i *) block.qh);
        unpacked      out;
        out.d    = GGML_CPU_FP16_TO_FP32(block.d);
        out.dmin = GGML_CPU_FP16_TO_FP32(block.dmin);
        for (int pair = 0; pair < QK_K / 64; pair++) {
            const __m256i nibbles = _mm256_loadu_si256((const __m256i *) block.qs + pair);
            const auto    join    = [&](__m256i four, int bit) {
                // the bit of every byte, to its fifth place
                const __m256i at = bit < 4 ? _mm256_slli_epi16(high, 4 - bit) : _mm256_srli_epi16(high, bit - 4);
                return _mm256_or_si256(_mm256_and_si256(four, low), _mm256_and_si256(at, fifth));
            };
            out.quants[2 * pair]     = join(nibbles, 2 * pair);
            out.quants[2 * pair + 1] = join(_mm256_srli_epi16(nibbles, 4), 2 * pair + 1);
        }
        uint8_t scales[8], mins[8];
        for (int i = 0; i < 4; i++) { // 6 bits each, the last four's upper two with the first four
            const uint8_t first = block.scales[i], second = block.scales[i + 4], both = block.scales[i + 8];
            scales[i]     = first & 63;
            mins[i]       = second & 63;
            scales[i + 4] = (both & 15) | (first >> 6 << 4);
            mins[i + 4]   = (both >> 4) | (second >> 6 << 4);
        }
        for (int i = 0; i < 8; i++) {
            out.scales[i] = _mm256_set1_epi16(scales[i]);
        }
        const __m128i eight = _mm_loadl_epi64((const __m128i *) mins);
        out.mins            = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(eight, eight));
        return out;
    }

    template <int N>
    static void multiply_tile(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        __m256 sums[N]     = {};
        float  min_sums[N] = {};
        for (int64_t b = 0; b < n_blocks; b++) {
            prefetch(x + b, sizeof(weights));
            const unpacked w = unpack(x[b]);
            for (int c = 0; c < N; c++) {
                const column & y = columns[c * n_blocks + b];
                sums[c]          = _mm256_fmadd_ps(_mm256_set1_ps(y.d * w.d), _mm256_cvtepi32_ps(dots(w, y)), sums[c]);

                const __m256i bsums = _mm256_loadu_si256((const __m256i *) y.bsums);
                min_sums[c]         = std::fma(-y.d * w.dmin, (float) add_up(_mm256_madd_epi16(bsums, w.mins)), min_sums[c]);
            }
        }
        for (int c = 0; c < N; c++) {
            out[c * out_stride] = add_up(sums[c]) + min_sums[c];
        }
    }

    static __m256i dots(const unpacked & w, const column & y) {
        __m256i sums = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            const __m256i q8 = _mm256_loadu_si256((const __m256i *) y.qs + i);
            sums             = dot_16(sums, w.scales[i], _mm256_maddubs_epi16(w.quants[i], q8));
        }
        return sums;
    }
};

// -- blocks of 32: as ggml_vec_dot_q8_0_q8_0, _q5_0_q8_0, _q4_1_q8_1 and _q5_1_q8_1 -----------------

// Columns for blocks of scale * quants, signed.
struct prepared_q8_0 {
    signed_dot dot_with;
    float      d;

    explicit prepared_q8_0(const block_q8_0 & y) :
        dot_with(_mm256_loadu_si256((const __m256i *) y.qs)),
        d(GGML_CPU_FP16_TO_FP32(y.d)) {}
};

// Columns for blocks of scale * quants + minimum, the quants unsigned.
struct prepared_q8_1 {
    unsigned_dot dot_with;
    float        d, sum;

    explicit prepared_q8_1(const block_q8_1 & y) :
        dot_with { _mm256_loadu_si256((const __m256i *) y.qs) },
        d(GGML_CPU_FP16_TO_FP32(y.d)),
        sum(GGML_CPU_FP16_TO_FP32(y.s)) {}
};

// Four rows at a time, so that the work on a column serves all four.
//
// type::weights, column   the blocks of both
// type::quants            32 quants of a block, as the prepared column's dot_with takes them
template <typename type>
struct four_rows {
    using weights = typename type::weights;
    using column  = typename type::column;

    static constexpr bool HAS_MIN = std::is_same_v<column, block_q8_1>;

    using prepared = std::conditional_t<HAS_MIN, prepared_q8_1, prepared_q8_0>;

    static constexpr int64_t rows = 4;
    static constexpr int     tile = TILE / 2;

    static prepared prepare(const column & y) { return prepared(y); }

    // The hardware does not foresee reads of four rows at once. So the next four rows are prefetched in order,
    // a piece with every block, into the first cache if it has room for them beside the columns.
    static constexpr size_t FIRST_CACHE = 16384; // bytes of it for four rows

    template <int N, cache to>
    static void multiply_rows(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        static_assert(N <= 4);
        __m256          sums[rows][N] = {};
        __m128          mins[rows]    = {}; // each column's
        const weights * next          = x + rows * n_blocks;
        for (int64_t b = 0; b < n_blocks; b++) {
            fetch<to>((const char *) (next + rows * b), rows * sizeof(weights));
            const auto   scale = [&](int c) { return c < N ? columns[c * n_blocks + b].d : 0.0f; };
            const __m128 dy    = _mm_setr_ps(scale(0), scale(1), scale(2), scale(3));

            __m256i           quants[rows];
            alignas(16) float scales[rows][4]; // a row's times each column's
            for (int r = 0; r < rows; r++) {
                const weights & block = x[r * n_blocks + b];
                quants[r]             = type::quants(block);
                _mm_store_ps(scales[r], _mm_mul_ps(_mm_set1_ps(GGML_CPU_FP16_TO_FP32(block.d)), dy));
            }
            if constexpr (HAS_MIN) {
                const auto   total = [&](int c) { return c < N ? columns[c * n_blocks + b].sum : 0.0f; };
                const __m128 sy    = _mm_setr_ps(total(0), total(1), total(2), total(3));
                for (int r = 0; r < rows; r++) {
                    mins[r] = _mm_fmadd_ps(_mm_set1_ps(GGML_CPU_FP16_TO_FP32(x[r * n_blocks + b].m)), sy, mins[r]);
                }
            }
            for (int c = 0; c < N; c++) {
                const auto dot_with = columns[c * n_blocks + b].dot_with;
                for (int r = 0; r < rows; r++) {
                    sums[r][c] = _mm256_fmadd_ps(_mm256_set1_ps(scales[r][c]), _mm256_cvtepi32_ps(dot_with(quants[r])), sums[r][c]);
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            alignas(16) float min[4];
            _mm_store_ps(min, mins[r]);
            for (int c = 0; c < N; c++) {
                out[c * out_stride + r] = HAS_MIN ? add_up(sums[r][c]) + min[c] : add_up(sums[r][c]);
            }
        }
    }

    // With one column there is nothing to share: rows are read one after the other.
    static void multiply_one(int64_t n_blocks, const weights * x, const prepared * y, float * out) {
        for (int r = 0; r < rows; r++, x += n_blocks) {
            __m256 sums = _mm256_setzero_ps();
            float  mins = 0.0f;
            for (int64_t b = 0; b < n_blocks; b++) {
                prefetch(x + b, sizeof(weights));
                const __m256i dots = y[b].dot_with(type::quants(x[b]));
                sums               = _mm256_fmadd_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(x[b].d) * y[b].d), _mm256_cvtepi32_ps(dots), sums);
                if constexpr (HAS_MIN) {
                    mins = std::fma(GGML_CPU_FP16_TO_FP32(x[b].m), y[b].sum, mins);
                }
            }
            out[r] = HAS_MIN ? add_up(sums) + mins : add_up(sums);
        }
    }

    template <int N>
    static void multiply_tile(int64_t n_blocks, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        if constexpr (N == 1) {
            multiply_one(n_blocks, x, columns, out);
        } else if (rows * n_blocks * sizeof(weights) <= FIRST_CACHE) {
            multiply_rows<N, cache::first>(n_blocks, x, columns, out, out_stride);
        } else {
            multiply_rows<N, cache::second>(n_blocks, x, columns, out, out_stride);
        }
    }
};

struct q8_0 {
    using weights = block_q8_0;
    using column  = block_q8_0;

    static __m256i quants(const weights & x) { return _mm256_loadu_si256((const __m256i *) x.qs); }
};

struct q5_0 {
    using weights = block_q5_0;
    using column  = block_q8_0;

    static __m256i quants(const weights & x) {
        const __m256i raised = _mm256_or_si256(nibbles_32(x.qs), where_set(x.qh, 0x10));
        return _mm256_sub_epi8(raised, _mm256_set1_epi8(16));
    }
};

struct q4_1 {
    using weights = block_q4_1;
    using column  = block_q8_1;

    static __m256i quants(const weights & x) { return nibbles_32(x.qs); }
};

struct q5_1 {
    using weights = block_q5_1;
    using column  = block_q8_1;

    static __m256i quants(const weights & x) { return _mm256_or_si256(nibbles_32(x.qs), where_set(x.qh, 0x10)); }
};

// -- F32 and F16: one row at a time, as ggml_vec_dot_f32 and ggml_vec_dot_f16 ------------------------

template <typename type>
struct floats {
    using weights  = type;
    using column   = type;
    using prepared = float;

    static constexpr int64_t rows = 1;
    static constexpr int     tile = TILE / 2;
    static constexpr int64_t step = GGML_F32_STEP; // rows must be of whole steps: ggml adds up a remainder in another way

    static prepared prepare(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }

    static GGML_F32_VEC load(const float * x) { return GGML_F32_VEC_LOAD(x); }

    static GGML_F32_VEC load(const ggml_fp16_t * x) { return GGML_F16_DOT_VEC_LOAD(x, 0); }

    template <int N>
    static void multiply_tile(int64_t n, const weights * x, const prepared * columns, float * out, size_t out_stride) {
        GGML_F32_VEC sums[N][GGML_F32_ARR] = {};
        for (int64_t i = 0; i < n; i += step) {
            prefetch(x + i, step * sizeof(weights));
            for (int j = 0; j < GGML_F32_ARR; j++) {
                const int64_t      k = i + j * GGML_F32_EPR;
                const GGML_F32_VEC w = load(x + k);
                for (int c = 0; c < N; c++) {
                    sums[c][j] = GGML_F32_VEC_FMA(sums[c][j], w, GGML_F32_VEC_LOAD(columns + c * n + k));
                }
            }
        }
        for (int c = 0; c < N; c++) {
            GGML_F32_VEC_REDUCE(out[c * out_stride], sums[c]);
        }
    }
};

} // namespace
