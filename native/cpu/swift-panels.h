// Panels multiplied with columns. A panel is one block of LANES rows, each of which has a lane of its own: nothing is
// ever added up across lanes, and what is added up for a row does not depend on how many columns there are:
//
//   within a block   whole numbers, exact in any order
//   block by block   sum = fma(number, scale of the row * scale of the column, sum), minimums in a sum of their own

#pragma once

#include "swift-types.h"

#include <algorithm>

namespace {

// Columns in the format that their type of weights wants, block after block, one column after the other
template <typename block>
struct columns {
    const block * blocks;
    const float * scales; // of blocks of 32: block after block, as the blocks
    const float * sums;   // scale * sum of a block's numbers, of Q8_1
    const int *   starts; // minus what the offset of codes adds to a block's numbers, of Q8_0
    int64_t       n_blocks;

    columns at(int64_t column, int64_t b) const {
        const int64_t i = column * n_blocks + b;
        return { blocks + i, scales ? scales + i : nullptr, sums ? sums + i : nullptr, starts ? starts + i : nullptr, n_blocks };
    }
};

// What is added up for LANES rows of a column
struct sums {
    reals plain, minimums;
};

inline ints four_bytes(const void * from) {
    int32_t four;
    memcpy(&four, from, sizeof(four));
    return everywhere(four);
}

template <typename type>
constexpr bool IS_256 = std::is_same_v<typename type::column, block_q8_K>;

// Without VNNI pairs of products have to fit 16 bits. So codes of eight bits are signed there, without an offset.
template <typename type>
constexpr bool IS_SIGNED = type::OFFSET == 128 && !HAS_VNNI;

template <typename type>
constexpr int OFFSET = IS_SIGNED<type> ? 0 : type::OFFSET;

// Without VNNI: of how many products the pairs can be added up in 16 bits
template <typename type>
constexpr int RUN = std::min(type::SUB / 4, type::BITS < 7 ? 1 << (7 - type::BITS) : 1);

// What an offset has added to the numbers of a column's block of 32, negative
template <typename type>
ints start_of(const columns<typename type::column> & y, int64_t i) {
    return IS_256<type> || OFFSET<type> == 0 ? everywhere(0) : everywhere(y.starts[i]);
}

// -- a block's numbers added to sums ------------------------------------------------------------------

template <typename type>
void add_to(sums & to, ints numbers, const factors_32 & w, float scale, [[maybe_unused]] const float * sum) {
    to.plain = multiply_add(to_reals(numbers), multiply(w.scales, everywhere(scale)), to.plain);
    if constexpr (type::HAS_MINIMUM) {
        to.minimums = multiply_add(w.minimums, everywhere(*sum), to.minimums);
    }
}

// The sums of a column's sub-blocks, times what prepare() wants them multiplied with
template <int SUB>
ints add_sub_sums(ints to, const factors_256<SUB> & w, const int16_t * sums) {
    for (int n = 0; n < w.N_SUB / 2; n++) {
        to = dot_words(to, w.sub_minimums[n], four_bytes(sums + 2 * n));
    }
    return to;
}

template <typename type, int SUB>
void add_to(sums & to, ints numbers, const factors_256<SUB> & w, float scale_of_column, const int16_t * sums_of_column) {
    const reals scale = everywhere(scale_of_column);
    if constexpr (type::HAS_MINIMUM) {
        const ints minimums = add_sub_sums(everywhere(0), w, sums_of_column);
        to.minimums         = multiply_add(to_reals(minimums), multiply(w.minimums, scale), to.minimums);
    }
    to.plain = multiply_add(to_reals(numbers), multiply(w.scales, scale), to.plain);
}

template <typename type>
reals total(const sums & of) {
    if constexpr (!type::HAS_MINIMUM) {
        return of.plain;
    } else if constexpr (IS_256<type>) {
        return subtract(of.plain, of.minimums);
    } else {
        return add(of.plain, of.minimums);
    }
}

// -- many columns: lanes are rows ---------------------------------------------------------------------

template <typename type>
struct panel {
    static constexpr int N     = IS_256<type> ? QK_K / 4 : 8;
    static constexpr int N_SUB = IS_256<type> ? N : 1;

    ints                   codes[N];
    ints                   sub_scales[N_SUB]; // of blocks of 256; without VNNI 16 bits each, twice
    typename type::factors factors;

    SWIFT_INLINE void unpack(const rows & x) {
        const char * end = x.ahead + sizeof(typename type::weights) * LANES / type::layout::ROWS;
        type::decode({ x }, codes);
        if constexpr (IS_SIGNED<type>) {
            for (ints & each : codes) {
                each = flip_bytes(each, (char) 128);
            }
        }
        type::get_factors(x, factors);
        x.ask(end - x.ahead); // what was not loaded in whole pieces
        if constexpr (IS_256<type>) {
            for (int n = 0; n < factors.N_SUB / 2; n++) {
                const ints first = factors.sub_scales[n], second = shift_right_32(first, 16);
                sub_scales[2 * n]     = HAS_VNNI ? arithmetic_right_32(shift_left_32(first, 16), 16) : twice_16(first);
                sub_scales[2 * n + 1] = HAS_VNNI ? arithmetic_right_32(first, 16) : twice_16(second);
            }
        }
    }
};

// Adds n blocks of N columns. PANELS beside each other: each number of a column that is loaded serves all.
template <typename type, int N, int PANELS>
void add_products(const panel<type> (*w)[PANELS], int n, const columns<typename type::column> & y, sums (*to)[PANELS]) {
    for (int b = 0; b < n; b++) {
        ints numbers[N][PANELS];
        for (int c = 0; c < N; c++) {
            for (int p = 0; p < PANELS; p++) {
                numbers[c][p] = start_of<type>(y, c * y.n_blocks + b);
            }
        }
        const auto add_dots = [&](int k, ints(&to)[N][PANELS], const auto & dot) {
            for (int c = 0; c < N; c++) {
                const ints four = four_bytes(y.blocks[c * y.n_blocks + b].qs + 4 * k);
                for (int p = 0; p < PANELS; p++) {
                    to[c][p] = dot(to[c][p], w[b][p].codes[k], four);
                }
            }
        };
        const auto dot_bytes = [](ints sums, ints codes, ints four) { return dot_unsigned(sums, codes, four); };
        if constexpr (!HAS_VNNI) {
            for (int k = 0; k < w[b][0].N; k += RUN<type>) {
                ints pairs[N][PANELS] = {};
                for (int i = k; i < k + RUN<type>; i++) {
                    add_dots(i, pairs, [](auto pairs, auto codes, auto four) {
                        return add_16(pairs, IS_SIGNED<type> ? pairs_signed(codes, four) : pairs_unsigned(codes, four));
                    });
                }
                for (int p = 0; p < PANELS; p++) {
                    const ints scales = IS_256<type> ? w[b][p].sub_scales[4 * k / type::SUB] : twice_16(everywhere(1));
                    for (int c = 0; c < N; c++) {
                        numbers[c][p] = dot_words(numbers[c][p], pairs[c][p], scales);
                    }
                }
            }
        } else if constexpr (IS_256<type>) {
            for (int i = 0; i < QK_K / type::SUB; i++) {
                ints of_sub[N][PANELS];
                for (int c = 0; c < N; c++) {
                    for (int p = 0; p < PANELS; p++) {
                        of_sub[c][p] = everywhere(0);
                    }
                }
#pragma GCC unroll 8
                for (int k = i * type::SUB / 4; k < (i + 1) * type::SUB / 4; k++) {
                    add_dots(k, of_sub, dot_bytes);
                }
                for (int p = 0; p < PANELS; p++) {
                    const ints scales = w[b][p].sub_scales[i];
                    for (int c = 0; c < N; c++) {
                        numbers[c][p] = add(numbers[c][p], multiply(of_sub[c][p], scales));
                    }
                }
            }
        } else {
            for (int k = 0; k < 8; k++) {
                add_dots(k, numbers, dot_bytes);
            }
        }
        for (int p = 0; p < PANELS; p++) {
            for (int c = 0; c < N; c++) {
                const int64_t i = c * y.n_blocks + b;
                if constexpr (IS_256<type>) {
                    const auto & block = y.blocks[i];
                    if constexpr (!type::HAS_MINIMUM && OFFSET<type> != 0) {
                        numbers[c][p] = add_sub_sums(numbers[c][p], w[b][p].factors, block.bsums);
                    }
                    add_to<type>(to[c][p], numbers[c][p], w[b][p].factors, block.d, block.bsums);
                } else {
                    add_to<type>(to[c][p], numbers[c][p], w[b][p].factors, y.scales[i], type::HAS_MINIMUM ? y.sums + i : nullptr);
                }
            }
        }
    }
}

// add_products for the columns left, of which it does N at most
template <typename type, int N, int PANELS>
void add_up_to(const panel<type> (*w)[PANELS], int n, const columns<typename type::column> & y, int n_columns, sums (*to)[PANELS]) {
    if (n_columns >= N) {
        add_products<type, N>(w, n, y, to);
    } else if constexpr (N > 1) {
        add_up_to<type, N - 1>(w, n, y, n_columns, to);
    }
}

} // namespace
