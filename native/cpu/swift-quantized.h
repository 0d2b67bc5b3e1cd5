// The kernel for quantised weights: columns are quantised, and rows multiplied with them (swift-panels.h).

#pragma once

#include "swift-kernel.h"
#include "swift-panels.h"
#include "swift-tiles.h"

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

// -- ways to multiply ---------------------------------------------------------------------------------

// N_COLUMNS: multiplied at once, while all sums stay in registers
template <typename type, int N_PANELS, int N_COLUMNS>
struct by_lanes {
    using panel = ::panel<type>;
    using input = columns<typename type::column>;

    static constexpr int PANELS  = N_PANELS;
    static constexpr int AT_ONCE = 64; // columns, so that they and their sums stay in the second cache

    static void add(const panel (*w)[PANELS], int n, const input & y, int c, int64_t b, int n_columns, sums (*to)[PANELS]) {
        for (int i = 0; i < n_columns; i += N_COLUMNS) {
            add_up_to<type, N_COLUMNS>(w, n, y.at(c + i, b), n_columns - i, to + i);
        }
    }
};

#ifdef SWIFT_TILES
template <typename type>
struct by_tiles {
    using panel = tiled_panel<type>;

    using block = tiled_columns<typename type::column>;

    struct input {
        const block * blocks; // of each group of columns n_blocks
        int64_t       n_blocks;
    };

    static constexpr int PANELS  = TILE_PANELS;
    static constexpr int AT_ONCE = 128; // more, as more is done to a panel before

    static void add(const panel (*w)[PANELS], int n, const input & y, int c, int64_t b, int n_columns, sums (*to)[PANELS]) {
        // Tiles take their time. Meanwhile those before are added up, which have arrived in memory by then.
        constexpr int       BEFORE = 2;
        tiled_numbers<type> numbers[BEFORE + 1];
        const int           n_all = n_columns / TILE_COLUMNS * n;
        const block *       first = y.blocks + c / TILE_COLUMNS * y.n_blocks + b;
        for (int i = 0; i < n_all + BEFORE; i++) {
            if (i < n_all) {
                tiled_numbers<type>::multiply(w[i % n], first[i / n * y.n_blocks + i % n]);
            }
            if (const int done = i - BEFORE; done >= 0) {
                const block & of = first[done / n * y.n_blocks + done % n];
                numbers[done % (BEFORE + 1)].add_to_sums(w[done % n], of, to + done / n * TILE_COLUMNS);
            }
            if (i < n_all) {
                numbers[i % (BEFORE + 1)].store();
            }
        }
    }
};
#endif

template <typename type>
struct quantized {
    using column = typename type::column;
    using block  = typename type::weights;

    static constexpr bool IS_Q8_K = std::is_same_v<column, block_q8_K>;
    static constexpr int  ROWS    = 2 * LANES;
    static constexpr int  FEW     = 1; // column that takes less time with one panel: fewer rows are read from memory at once

    // Columns as multiply() wants them
    struct input {
        columns<column> plain;   // those that fill no tile
        const char *    tiled;   // blocks of TILE_COLUMNS columns, group after group
        int             n_tiled; // columns
    };

    // How many of so many columns are multiplied by tiles
    static int n_tiled(int64_t n_columns) {
#ifdef SWIFT_TILES
        return has_tiles() ? (int) (n_columns / TILE_COLUMNS * TILE_COLUMNS) : 0;
#else
        (void) n_columns;
        return 0;
#endif
    }

    // Quantises the columns into the work buffer, shared out to the threads in pieces of blocks.
    static void prepare(const ggml_compute_params * params, const ggml_tensor * src1, int n_tiled) {
        const int64_t n_block  = ggml_blck_size(TYPE_OF_COLUMN);
        const int64_t n_blocks = src1->ne[0] / n_block;
        const int64_t begin    = n_blocks * params->ith / params->nth;
        const int64_t end      = n_blocks * (params->ith + 1) / params->nth;
        column *      to       = (column *) params->wdata;
        for (int64_t c = 0; begin < end && c < src1->ne[1] * src1->ne[2]; c++) {
            const float * in = column_of(src1, c) + begin * n_block;
            if (c < n_tiled) {
                static thread_local std::vector<column> blocks;
                blocks.resize(end - begin);
                quantize_column(in, blocks.data(), end - begin);
                place_in_tiles((char *) to, blocks.data(), c, begin, end, n_blocks);
            } else {
                quantize_column(in, to + c * n_blocks + begin, end - begin);
            }
        }
    }

    // The columns of these numbers, which prepare() has quantised; all if `which` is null.
    static input gather(
            const ggml_compute_params * params, const ggml_tensor * src1, const int64_t * which, int n_columns, int n_tiled) {
        static thread_local std::vector<column> copies; // kept: asked for with every product

        const int64_t  n_blocks = src1->ne[0] / ggml_blck_size(TYPE_OF_COLUMN);
        const column * blocks   = (const column *) params->wdata;
        if (which) {
            copies.resize(n_blocks * n_columns);
            for (int c = 0; c < n_columns; c++) {
                const column * from = blocks + which[c] * n_blocks;
                if (c < n_tiled) {
                    place_in_tiles((char *) copies.data(), from, c, 0, n_blocks, n_blocks);
                } else {
                    std::copy_n(from, n_blocks, copies.data() + c * n_blocks);
                }
            }
            blocks = copies.data();
        }
        return { gather_plain(blocks + n_tiled * n_blocks, n_blocks, n_columns - n_tiled), (const char *) blocks, n_tiled };
    }

    // Groups `begin` to `end` of ROWS rows with all columns: out[column][row].
    static void multiply(const matrix & w, int64_t begin, int64_t end, const input & y, int n_columns, float * const * out) {
#ifdef SWIFT_TILES
        if (y.n_tiled > 0) {
            using way = by_tiles<type>;
            const tiles<IS_Q8_K ? 64 : 32> in_use;
            multiply_with<way>(w, begin, end, { (const typename way::block *) y.tiled, y.plain.n_blocks }, y.n_tiled, out);
        }
#endif
        const int n_left = n_columns - y.n_tiled;
        if (n_left > FEW) {
            multiply_with<by_lanes<type, 2, TILE>>(w, begin, end, y.plain, n_left, out + y.n_tiled);
        } else if (n_left > 0) {
            multiply_with<by_lanes<type, 1, FEW>>(w, begin, end, y.plain, n_left, out + y.n_tiled);
        }
    }

private:
    static constexpr ggml_type TYPE_OF_COLUMN = IS_Q8_K ? GGML_TYPE_Q8_K : type::HAS_MINIMUM ? GGML_TYPE_Q8_1
                                                                                             : GGML_TYPE_Q8_0;

    static void quantize_column(const float * in, column * out, int64_t n_blocks) {
        if constexpr (IS_Q8_K) {
            for (int64_t b = 0; b < n_blocks; b++) {
                quantize(in + b * QK_K, out[b]);
                if constexpr (type::SUB == 32) { // sums of 32 numbers
                    for (int i = 0; i < 8; i++) {
                        out[b].bsums[i] = (int16_t) (out[b].bsums[2 * i] + out[b].bsums[2 * i + 1]);
                    }
                }
            }
        } else {
            ggml_get_type_traits_cpu(TYPE_OF_COLUMN)->from_float(in, out, n_blocks * QK8_0);
        }
    }

    // Blocks `begin` to `end` of column c
#ifdef SWIFT_TILES
    static void place_in_tiles(char * to, const column * blocks, int64_t c, int64_t begin, int64_t end, int64_t n_blocks) {
        auto * group = (tiled_columns<column> *) to + c / TILE_COLUMNS * n_blocks;
        for (int64_t b = begin; b < end; b++) {
            group[b].set(c % TILE_COLUMNS, blocks[b - begin]);
        }
    }
#else
    static void place_in_tiles(char *, const column *, int64_t, int64_t, int64_t, int64_t) {}
#endif

    // What is 16 bits in blocks of 32 becomes floats: each thread's own, which takes less time than to wait for one
    // another once more.
    static columns<column> gather_plain(const column * blocks, int64_t n_blocks, int n_columns) {
        static thread_local std::vector<float> scales, sums;
        static thread_local std::vector<int>   starts;

        const int64_t   n   = n_blocks * n_columns;
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

    // In prompts a few groups of rows are multiplied with AT_ONCE columns, then with the next ones.
    template <typename way>
    static void multiply_with(
            const matrix & w, int64_t begin, int64_t end, const typename way::input & y, int n_columns, float * const * out) {
        const int64_t n_at_once = std::max<int64_t>(1, BYTES_AT_ONCE / (ROWS * w.stride));
        for (; begin < end; begin += n_at_once) {
            for (int c = 0; c < n_columns; c += way::AT_ONCE) {
                const int64_t n_rows = std::min(w.n_rows, end * ROWS);
                for (int64_t first = begin * ROWS; first < std::min(n_rows, (begin + n_at_once) * ROWS); first += way::PANELS * LANES) {
                    const bool is_first = c == 0 && first + way::PANELS * LANES < n_rows;
                    multiply_rows<way>(w, first, y, c, std::min(way::AT_ONCE, n_columns - c), out + c, is_first);
                }
            }
        }
    }

    // Columns c to c + n_columns. is_first: the rows come from memory, and so do those after them
    template <typename way>
    static void multiply_rows(
            const matrix & w, int64_t first, const typename way::input & y, int c, int n_columns, float * const * out, bool is_first) {
        constexpr int PANELS = way::PANELS;
        constexpr int PIECE  = IS_Q8_K ? 1 : 8; // blocks that are unpacked at once: what the first cache holds

        const rows    x      = w.rows_from(first, PANELS * LANES);
        const int64_t n_rows = w.n_rows - first;

        sums results[way::AT_ONCE][PANELS];
        std::fill_n(results[0], n_columns * PANELS, sums {}); // not all: they would fill the first cache
        for (int i = 0; i < n_columns; i++) {                 // written at the end: asked for in time
            __builtin_prefetch(out[i] + first, 1);
            __builtin_prefetch(out[i] + first + LANES, 1);
        }
        for (int64_t b = 0; b < y.n_blocks; b += PIECE) {
            const int           n = (int) std::min<int64_t>(PIECE, y.n_blocks - b);
            typename way::panel unpacked[PIECE][PANELS];
            for (int i = 0; i < n; i++) {
                for (int p = 0; p < PANELS; p++) {
                    const int64_t offset = (b + i) * (int64_t) sizeof(block);
                    // of the rows after these as much as of these, in the order in which they lie in memory
                    const char * ahead = x.at(is_first ? PANELS * LANES : 0, 0) + (offset * PANELS + p * sizeof(block)) * (LANES / type::layout::ROWS);
                    unpacked[i][p].unpack({ x.at(p * LANES, (int) offset), x.stride, ahead });
                }
            }
            way::add(unpacked, n, y, c, b, n_columns, results);
        }
        for (int i = 0; i < n_columns; i++) {
            for (int p = 0; p < PANELS && p * LANES < n_rows; p++) {
                const int64_t n_left = std::min<int64_t>(LANES, n_rows - p * LANES);
                store(out[i] + first + p * LANES, total<type>(results[i][p]), (int) n_left);
            }
        }
    }
};

} // namespace
