// Panels multiplied with columns. Each row of weights has a lane of its own, so that nothing is ever added up
// across lanes, and what is added up for a row does not depend on how many columns there are:
//
//   within a block   whole numbers, exact in any order
//   block by block   sum = fma(scale of the row * scale of the column, number, sum), minimums in a sum of their own

#pragma once

#include "swift-types.h"

namespace {

constexpr int PANELS = 2; // beside each other: each number of a column that is loaded serves both
constexpr int ROWS   = PANELS * LANES;

// Columns in the format that their type of weights wants, block after block, one column after the other
template <typename block>
struct columns {
    const block * blocks;
    const float * scales; // of blocks of 32: block after block, as the blocks
    const float * sums;   // scale * sum of a block's numbers, of Q8_1
    int64_t       n_blocks;

    columns at(int64_t column, int64_t b) const {
        const int64_t i = column * n_blocks + b;
        return { blocks + i, scales ? scales + i : nullptr, sums ? sums + i : nullptr, n_blocks };
    }
};

// What is added up, for so many rows of each column
struct sums {
    float plain[ROWS];
    float minimums[ROWS];
};

inline ints four_bytes(const int8_t * from) {
    int32_t four;
    memcpy(&four, from, sizeof(four));
    return everywhere(four);
}

// -- blocks of 32 -------------------------------------------------------------------------------------

// Adds n blocks of N columns.
template <typename type, int N, typename block>
void add_products(const panel_32 (*w)[PANELS], int n, const columns<block> & y, sums * to) {
    for (int b = 0; b < n; b++) {
        ints numbers[N][PANELS];
        for (int p = 0; p < PANELS; p++) {
            const ints start = load(w[b][p].start);
            for (int c = 0; c < N; c++) {
                numbers[c][p] = start;
            }
        }
        for (int k = 0; k < 8; k++) {
            const ints codes[PANELS] = { load(w[b][0].codes[k]), load(w[b][1].codes[k]) };
            for (int c = 0; c < N; c++) {
                const ints four = four_bytes(y.blocks[c * y.n_blocks + b].qs + 4 * k);
                for (int p = 0; p < PANELS; p++) {
                    numbers[c][p] = dot_raised(numbers[c][p], four, codes[p]);
                }
            }
        }
        for (int p = 0; p < PANELS; p++) {
            const reals scales = load(w[b][p].scales);
            for (int c = 0; c < N; c++) {
                float *     sum   = to[c].plain + p * LANES;
                const reals scale = multiply(scales, everywhere(y.scales[c * y.n_blocks + b]));
                store(sum, multiply_add(to_reals(numbers[c][p]), scale, load(sum)));
            }
            if constexpr (type::HAS_MINIMUM) {
                const reals minimums = load(w[b][p].minimums);
                for (int c = 0; c < N; c++) {
                    float * sum = to[c].minimums + p * LANES;
                    store(sum, multiply_add(minimums, everywhere(y.sums[c * y.n_blocks + b]), load(sum)));
                }
            }
        }
    }
}

// -- blocks of 256 ------------------------------------------------------------------------------------

template <typename type>
ints dot_codes(ints numbers, ints codes, ints four) {
    if constexpr (type::SIGNED_CODES) {
        return dot_raised(numbers, four, codes);
    } else {
        return dot_unsigned(numbers, codes, four);
    }
}

template <typename type, int N, int SUB>
void add_products(const panel_256<SUB> (*w)[PANELS], int n, const columns<block_q8_K> & y, sums * to) {
    for (int b = 0; b < n; b++) {
        const block_q8_K * blocks = y.blocks + b;
        ints               totals[N][PANELS];
        for (int c = 0; c < N; c++) {
            for (int p = 0; p < PANELS; p++) {
                totals[c][p] = everywhere(0);
            }
        }
        for (int i = 0; i < QK_K / SUB; i++) {
            ints numbers[N][PANELS];
            for (int c = 0; c < N; c++) {
                for (int p = 0; p < PANELS; p++) {
                    numbers[c][p] = everywhere(0);
                }
            }
#pragma GCC unroll 8
            for (int k = i * SUB / 4; k < (i + 1) * SUB / 4; k++) {
                const ints codes[PANELS] = { load(w[b][0].codes[k]), load(w[b][1].codes[k]) };
                for (int c = 0; c < N; c++) {
                    const ints four = four_bytes(blocks[c * y.n_blocks].qs + 4 * k);
                    for (int p = 0; p < PANELS; p++) {
                        numbers[c][p] = dot_codes<type>(numbers[c][p], codes[p], four);
                    }
                }
            }
            for (int p = 0; p < PANELS; p++) {
                const ints scales = load(w[b][p].sub_scales[i]);
                for (int c = 0; c < N; c++) {
                    totals[c][p] = add(totals[c][p], multiply(numbers[c][p], scales));
                }
            }
        }
        for (int p = 0; p < PANELS; p++) {
            const reals scales = load(w[b][p].scales);
            for (int c = 0; c < N; c++) {
                const block_q8_K & block    = blocks[c * y.n_blocks];
                const reals        scale    = everywhere(block.d);
                ints               minimums = everywhere(0);
                for (int i = 0; i < QK_K / SUB / 2; i++) { // of each sub-block: what prepare() has left there
                    const ints two = four_bytes((const int8_t *) (block.bsums + 2 * i));
                    minimums       = dot_words(minimums, load(w[b][p].sub_minimums[i]), two);
                }
                float * sum = to[c].plain + p * LANES;
                if constexpr (type::HAS_MINIMUM) {
                    float * min = to[c].minimums + p * LANES;
                    store(min, multiply_add(to_reals(minimums), multiply(load(w[b][p].minimums), scale), load(min)));
                } else {
                    totals[c][p] = add(totals[c][p], minimums);
                }
                store(sum, multiply_add(to_reals(totals[c][p]), multiply(scales, scale), load(sum)));
            }
        }
    }
}

} // namespace
