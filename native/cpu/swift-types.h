// What is particular to each type of weights: how a panel of it is unpacked.
//
// A panel is one block of LANES rows: codes of 8 bits, and what they are multiplied with. Once it is unpacked,
// every column is multiplied with it in the same way (swift-panels.h). A type has
//
//   weights       its block, of one row or of eight
//   column        the format that columns are quantised to
//   panel         panel_32 or panel_256
//   HAS_MINIMUM   weights are scale * code + minimum (blocks of 32) or scale * code - minimum (blocks of 256)
//   unpack        the blocks of LANES rows to a panel
//
// Bytes of all rows are brought beside each other first, four of every row in a vector; what is done to them then
// is done for all rows at once.

#pragma once

#include "ggml-impl.h"
#include "ggml-quants.h" // before repack.h, which would name the parts of blocks otherwise
#include "repack.h"
#include "simd-mappings.h"

#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h" // tables
#include "swift-lanes.h"

#include <cstddef>
#include <type_traits>

namespace {

// -- blocks of 32 -------------------------------------------------------------------------------------

// Columns have RAISE added, and codes are signed.
struct panel_32 {
    alignas(64) int8_t codes[8][LANES][4]; // [k / 4][row][k % 4]
    alignas(64) int32_t start[LANES];      // -RAISE times the sum of the row's codes
    alignas(64) float scales[LANES];
    alignas(64) float minimums[LANES];

    void set(const ints (&all)[8]) {
        ints sums = everywhere(0);
        for (int k = 0; k < 8; k++) {
            store(codes[k], all[k]);
            if constexpr (RAISE != 0) {
                sums = dot_unsigned(sums, everywhere(0x01010101), all[k]);
            }
        }
        store(start, multiply(sums, everywhere(-RAISE)));
    }
};

// Four bits each: the lower ones of 16 bytes, then the upper ones
inline void nibbles(const ints (&bytes)[4], ints (&codes)[8]) {
    for (int k = 0; k < 4; k++) {
        codes[k]     = and_bytes(bytes[k], 0x0F);
        codes[k + 4] = and_bytes(shift_right(bytes[k], 4), 0x0F);
    }
}

template <typename block>
struct type_of_32 {
    using weights = block;
    using column  = block_q8_0;
    using panel   = panel_32;

    static constexpr bool HAS_MINIMUM = false;
};

struct q8_0 : type_of_32<block_q8_0> {
    static void unpack(const rows & x, panel & to) {
        ints codes[8], first[4];
        load_words(x, offsetof(weights, qs), codes);
        load_words(x, 0, first);
        to.set(codes);
        store(to.scales, low_halves(first[0]));
    }
};

struct q5_0 : type_of_32<block_q5_0> {
    static void unpack(const rows & x, panel & to) {
        ints first[4], bytes[4], codes[8];
        load_words(x, 0, first); // scale, fifth bits
        load_words(x, offsetof(weights, qs), bytes);
        nibbles(bytes, codes);
        const ints fifths = or_(shift_right_32(first[0], 16), shift_left_32(first[1], 16));
        for (int k = 0; k < 8; k++) {
            codes[k] = subtract_bytes(or_(codes[k], where_set(fifths, k, 0x10)), 16);
        }
        to.set(codes);
        store(to.scales, low_halves(first[0]));
    }
};

// With minimums
template <typename block>
struct type_of_32_with_minimum : type_of_32<block> {
    using column = block_q8_1;

    static constexpr bool HAS_MINIMUM = true;

    static void set_factors(ints both, panel_32 & to) {
        store(to.scales, low_halves(both));
        store(to.minimums, high_halves(both));
    }
};

struct q4_1 : type_of_32_with_minimum<block_q4_1> {
    static void unpack(const rows & x, panel & to) {
        ints first[4], bytes[4], codes[8];
        load_words(x, 0, first);
        load_words(x, offsetof(weights, qs), bytes);
        nibbles(bytes, codes);
        to.set(codes);
        set_factors(first[0], to);
    }
};

struct q5_1 : type_of_32_with_minimum<block_q5_1> {
    static void unpack(const rows & x, panel & to) {
        ints first[4], bytes[4], codes[8];
        load_words(x, 0, first); // scale and minimum, fifth bits
        load_words(x, offsetof(weights, qs), bytes);
        nibbles(bytes, codes);
        for (int k = 0; k < 8; k++) {
            codes[k] = or_(codes[k], where_set(first[1], k, 0x10));
        }
        to.set(codes);
        set_factors(first[0], to);
    }
};

alignas(16) constexpr int8_t FOUR_BITS[16] = { -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7 };
// ggml's repacking turns the uppermost bit over
alignas(16) constexpr int8_t FOUR_BITS_REPACKED[16] = { 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1 };

// MXFP4's scales: eight bits of exponent, for codes that are twice too large (GGML_E8M0_TO_FP32_HALF)
inline reals scales_of_exponents(ints e) {
    alignas(64) int32_t exponents[LANES];
    alignas(64) float   scales[LANES];
    store(exponents, e);
    for (int r = 0; r < LANES; r++) {
        scales[r] = GGML_E8M0_TO_FP32_HALF((uint8_t) exponents[r]);
    }
    return load(scales);
}

// Four bits, for which a table has the codes
template <typename block, const int8_t (&table)[16]>
struct by_table : type_of_32<block> {
    static void unpack(const rows & x, panel_32 & to) {
        ints first[4], bytes[4], codes[8];
        load_words(x, 0, first);
        load_words(x, offsetof(block, qs), bytes);
        nibbles(bytes, codes);
        for (ints & each : codes) {
            each = look_up(table, each);
        }
        to.set(codes);
        if constexpr (std::is_same_v<block, block_mxfp4>) {
            store(to.scales, scales_of_exponents(and_words(first[0], 0xFF)));
        } else {
            store(to.scales, low_halves(first[0]));
        }
    }
};

using q4_0   = by_table<block_q4_0, FOUR_BITS>;
using iq4_nl = by_table<block_iq4_nl, kvalues_iq4nl>;
using mxfp4  = by_table<block_mxfp4, kvalues_mxfp4>;

// The same, as ggml repacks it
template <typename block, const int8_t (&table)[16]>
struct by_table_8x8 : type_of_32<block> {
    static void unpack(const rows & groups, panel_32 & to) {
        ints bytes[4], codes[8];
        for (int i = 0; i < 2; i++) {
            ints eight[2];
            load_eights(groups, offsetof(block, qs) + 64 * i, eight);
            bytes[2 * i] = eight[0], bytes[2 * i + 1] = eight[1];
        }
        nibbles(bytes, codes);
        for (ints & each : codes) {
            each = look_up(table, each);
        }
        to.set(codes);
        if constexpr (std::is_same_v<block, block_mxfp4x8>) {
            store(to.scales, scales_of_exponents(widen_unsigned(load_bytes(groups, 0))));
        } else {
            store(to.scales, load_halves(groups, 0));
        }
    }
};

using q4_0_8x8   = by_table_8x8<block_q4_0x8, FOUR_BITS_REPACKED>;
using iq4_nl_8x8 = by_table_8x8<block_iq4_nlx8, kvalues_iq4nl>;
using mxfp4_8x8  = by_table_8x8<block_mxfp4x8, kvalues_mxfp4>;

// -- blocks of 256: each SUB weights have a whole number as scale of their own -------------------------

// Codes are unsigned, if need be by an offset.
template <int SUB>
struct panel_256 {
    static constexpr int N_SUB = QK_K / SUB;

    alignas(64) int8_t codes[QK_K / 4][LANES][4];
    alignas(64) int32_t sub_scales[N_SUB][LANES];
    // what the sums of SUB numbers of a column are multiplied with, two beside each other: minimums, or the scale
    // of the offset, negative
    alignas(64) int16_t sub_minimums[N_SUB / 2][LANES][2];
    alignas(64) float scales[LANES];
    alignas(64) float minimums[LANES];

    // Of four sub-blocks, from byte to byte of `words`
    void set_unsigned(int i, ints scale_words, ints minimum_words) {
        for (int n = 0; n < 4; n++) {
            store(sub_scales[i + n], unsigned_byte(scale_words, n));
        }
        store(sub_minimums[i / 2], two_unsigned(minimum_words, 0));
        store(sub_minimums[i / 2 + 1], two_unsigned(minimum_words, 2));
    }

    void set_signed(int i, ints scale_words, int offset) {
        for (int n = 0; n < 4; n++) {
            store(sub_scales[i + n], signed_byte(scale_words, n));
        }
        store(sub_minimums[i / 2], two_signed_times(scale_words, 0, (int16_t) -offset));
        store(sub_minimums[i / 2 + 1], two_signed_times(scale_words, 2, (int16_t) -offset));
    }
};

template <typename block, int SUB, bool has_minimum>
struct type_of_256 {
    using weights = block;
    using column  = block_q8_K;
    using panel   = panel_256<SUB>;

    static constexpr bool HAS_MINIMUM  = has_minimum;
    static constexpr bool SIGNED_CODES = false;
};

// Q4_K and Q5_K begin with scale and minimum of the block, and eight scales and minimums of six bits in 12 bytes, of
// which the last four's upper two bits are with the first four.
inline ints six(ints words) { return and_bytes(words, 0x3F); }
inline ints last(ints four, ints two) { return or_(and_bytes(four, 0x0F), and_bytes(shift_right(two, 2), 0x30)); }

inline void set_six_bits(const ints (&first)[4], panel_256<32> & to) {
    to.set_unsigned(0, six(first[1]), six(first[2]));
    to.set_unsigned(4, last(first[3], first[1]), last(shift_right(first[3], 4), first[2]));
    store(to.scales, low_halves(first[0]));
    store(to.minimums, high_halves(first[0]));
}

struct q4_K : type_of_256<block_q4_K, 32, true> {
    static void unpack(const rows & x, panel & to) {
        for (int i = 0; i < 4; i++) {
            ints bytes[8];
            load_words(x, offsetof(weights, qs) + 32 * i, bytes);
            for (int k = 0; k < 8; k++) {
                store(to.codes[16 * i + k], and_bytes(bytes[k], 0x0F));
                store(to.codes[16 * i + 8 + k], and_bytes(shift_right(bytes[k], 4), 0x0F));
            }
        }
        ints first[4];
        load_words(x, 0, first);
        set_six_bits(first, to);
    }
};

struct q5_K : type_of_256<block_q5_K, 32, true> {
    static void unpack(const rows & x, panel & to) {
        ints fifths[8];
        load_words(x, offsetof(weights, qh), fifths);
        for (int i = 0; i < 4; i++) {
            ints bytes[8];
            load_words(x, offsetof(weights, qs) + 32 * i, bytes);
            for (int k = 0; k < 8; k++) { // bits 2i and 2i + 1 of every byte
                const ints two = shift_right(fifths[k], 2 * i);
                store(to.codes[16 * i + k], or_(and_bytes(bytes[k], 0x0F), and_bytes(shift_left(two, 4), 0x10)));
                store(to.codes[16 * i + 8 + k],
                      or_(and_bytes(shift_right(bytes[k], 4), 0x0F), and_bytes(shift_left(two, 3), 0x10)));
            }
        }
        ints first[4];
        load_words(x, 0, first);
        set_six_bits(first, to);
    }
};

struct q6_K : type_of_256<block_q6_K, 16, false> {
    static void unpack(const rows & x, panel & to) {
        for (int half = 0; half < 2; half++) {
            ints four[16], two[8];
            load_words(x, offsetof(weights, ql) + 64 * half, four);
            load_words(x, offsetof(weights, qh) + 32 * half, two);
            const auto join = [](ints low, ints high) { return or_(and_bytes(low, 0x0F), and_bytes(high, 0x30)); };
            for (int k = 0; k < 8; k++) {
                int8_t(*codes)[LANES][4] = to.codes + 32 * half + k;
                store(codes[0], join(four[k], shift_left(two[k], 4)));
                store(codes[8], join(four[8 + k], shift_left(two[k], 2)));
                store(codes[16], join(shift_right(four[k], 4), two[k]));
                store(codes[24], join(shift_right(four[8 + k], 4), shift_right(two[k], 2)));
            }
        }
        ints scales[4], last[4];
        load_words(x, offsetof(weights, scales), scales);
        for (int i = 0; i < 4; i++) {
            to.set_signed(4 * i, scales[i], 32);
        }
        load_words(x, sizeof(weights) - 16, last);
        store(to.scales, high_halves(last[3]));
    }
};

// Two bits each: of 32 bytes the lowest, the next, ...
template <int SUB, typename function>
void unpack_two_bits(const rows & x, int offset, panel_256<SUB> & to, const function & changed) {
    for (int half = 0; half < 2; half++) {
        ints bytes[8];
        load_words(x, offset + 32 * half, bytes);
        for (int i = 0; i < 4; i++) {
            for (int k = 0; k < 8; k++) {
                const ints codes = and_bytes(shift_right(bytes[k], 2 * i), 3);
                store(to.codes[32 * half + 8 * i + k], changed(codes, 4 * half + i, k));
            }
        }
    }
}

struct q3_K : type_of_256<block_q3_K, 16, false> {
    static void unpack(const rows & x, panel & to) {
        ints thirds[8];
        load_words(x, offsetof(weights, hmask), thirds);
        unpack_two_bits(x, offsetof(weights, qs), to, [&](ints codes, int i, int k) {
            return or_(codes, and_bytes(i < 2 ? shift_left(thirds[k], 2 - i) : shift_right(thirds[k], i - 2), 4));
        });
        ints last[4]; // with 16 scales of six bits, 32 too large: of 8 bytes four each, of four more two
        load_words(x, sizeof(weights) - 16, last);
        const ints a = joined(last[0], last[1]), b = joined(last[1], last[2]), c = joined(last[2], last[3]);
        const auto scales = [](ints four, ints two) {
            return subtract_bytes(or_(and_bytes(four, 0x0F), and_bytes(two, 0x30)), 32);
        };
        to.set_signed(0, scales(a, shift_left(c, 4)), 4);
        to.set_signed(4, scales(b, shift_left(c, 2)), 4);
        to.set_signed(8, scales(shift_right(a, 4), c), 4);
        to.set_signed(12, scales(shift_right(b, 4), shift_right(c, 2)), 4);
        store(to.scales, high_halves(last[3]));
    }

    // The two last bytes of one word and the two first of the next
    static ints joined(ints first, ints second) { return or_(shift_right_32(first, 16), shift_left_32(second, 16)); }
};

inline ints plain(ints codes, int, int) { return codes; }

struct q2_K : type_of_256<block_q2_K, 16, true> {
    static void unpack(const rows & x, panel & to) {
        unpack_two_bits(x, offsetof(weights, qs), to, plain);
        ints both[4], last[4]; // scales and minimums of four bits
        load_words(x, offsetof(weights, scales), both);
        for (int i = 0; i < 4; i++) {
            to.set_unsigned(4 * i, and_bytes(both[i], 0x0F), and_bytes(shift_right(both[i], 4), 0x0F));
        }
        load_words(x, sizeof(weights) - 16, last);
        store(to.scales, low_halves(last[3]));
        store(to.minimums, high_halves(last[3]));
    }
};

struct iq4_xs : type_of_256<block_iq4_xs, 32, false> {
    static constexpr bool SIGNED_CODES = RAISE == 0;

    static void unpack(const rows & x, panel & to) {
        for (int i = 0; i < 8; i++) {
            ints bytes[4], codes[8];
            load_words(x, offsetof(weights, qs) + 16 * i, bytes);
            nibbles(bytes, codes);
            for (int k = 0; k < 8; k++) {
                store(to.codes[8 * i + k], flip_bytes(look_up(kvalues_iq4nl, codes[k]), (char) RAISE));
            }
        }
        ints first[4]; // scale, eight times two bits, eight times four: scales of six bits, 32 too large
        load_words(x, 0, first);
        for (int i = 0; i < 8; i += 4) {
            ints words = everywhere(0);
            for (int n = 0; n < 4; n++) {
                const ints four = and_words(shift_right_32(first[1], 4 * (i + n)), 0x0F);
                const ints two  = and_words(shift_right_32(first[0], 16 + 2 * (i + n)), 3);
                words           = or_(words, shift_left_32(or_(four, shift_left_32(two, 4)), 8 * n));
            }
            to.set_signed(i, subtract_bytes(words, 32), RAISE);
        }
        store(to.scales, low_halves(first[0]));
    }
};

// As ggml repacks them: eight bytes of a row have codes of so many bits, each 32 weights further on
template <int bits, int SUB>
void unpack_eights(const rows & groups, int offset, panel_256<SUB> & to) {
    constexpr int per_byte = 8 / bits;
    for (int part = 0; part < QK_K / (32 * per_byte); part++) {
        for (int i = 0; i < 4; i++) {
            ints bytes[2];
            load_eights(groups, offset + 256 * part + 64 * i, bytes);
            for (int n = 0; n < per_byte; n++) {
                for (int k = 0; k < 2; k++) {
                    const ints codes = and_bytes(shift_right(bytes[k], bits * n), (1 << bits) - 1);
                    store(to.codes[8 * (per_byte * part + n) + 2 * i + k], codes);
                }
            }
        }
    }
}

struct q4_K_8x8 : type_of_256<block_q4_Kx8, 32, true> {
    static void unpack(const rows & groups, panel & to) {
        unpack_eights<4>(groups, offsetof(weights, qs), to);
        // 12 bytes for each sub-block: as set_six_bits, of all sub-blocks at once
        ints words[3];
        load_thirds(groups, offsetof(weights, scales), words);
        alignas(64) uint8_t scales[8][LANES], minimums[8][LANES];
        store_eights(six(words[0]), last(words[2], words[0]), scales);
        store_eights(six(words[1]), last(shift_right(words[2], 4), words[1]), minimums);
        for (int i = 0; i < 8; i++) {
            store(to.sub_scales[i], widen_unsigned(load_lanes(scales[i])));
        }
        for (int i = 0; i < 8; i += 2) {
            store(to.sub_minimums[i / 2], pairs(load_lanes(minimums[i]), load_lanes(minimums[i + 1])));
        }
        store(to.scales, load_halves(groups, offsetof(weights, d)));
        store(to.minimums, load_halves(groups, offsetof(weights, dmin)));
    }
};

struct q2_K_8x8 : type_of_256<block_q2_Kx8, 16, true> {
    static void unpack(const rows & groups, panel & to) {
        unpack_eights<2>(groups, offsetof(weights, qs), to);
        for (int i = 0; i < 8; i++) { // of eight rows, two bytes: scales and minimums of four bits
            ints pairs = widen_pairs(groups, offsetof(weights, scales) + 16 * i);
            store(to.sub_scales[2 * i], and_words(pairs, 0x0F));
            store(to.sub_scales[2 * i + 1], and_words(shift_right_32(pairs, 8), 0x0F));
            store(to.sub_minimums[i], or_(and_words(shift_right_32(pairs, 4), 0x0F), and_words(shift_left_32(pairs, 4), 0x0F0000)));
        }
        store(to.scales, load_halves(groups, offsetof(weights, d)));
        store(to.minimums, load_halves(groups, offsetof(weights, dmin)));
    }
};

} // namespace
