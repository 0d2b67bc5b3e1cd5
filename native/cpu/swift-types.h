// What is particular to each type of weights: how a block becomes codes of 8 bits, and what those are multiplied with.
// A type has
//
//   weights       its block, of one row or of eight
//   layout        in_rows or by_eights
//   column        the format that columns are quantised to
//   factors       factors_32 or factors_256
//   SUB           how many weights share a scale, of the block or within it
//   HAS_MINIMUM   weights are scale * code + minimum (blocks of 32) or scale * code - minimum (blocks of 256)
//   OFFSET        how much too large codes are, which are unsigned
//   BITS          how many bits they have
//   decode        the blocks of LANES rows to codes: to[k] has those of weights 4k to 4k + 3 of every row
//   get_factors   the blocks of LANES rows to their factors, a lane for each row
//
// Bytes of all rows are brought beside each other first, four of every row in a vector; what is done to them then is
// done for all rows at once, and is the same whether ggml has repacked them or not.

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

// -- how rows lie in memory ---------------------------------------------------------------------------
//
//   load_32(offset, i)   the i-th 32 bytes of a block's field
//   nibbles(offset, i)   32 numbers of four bits: the lower ones of the i-th 16 bytes, then the upper ones

constexpr int N = 8; // vectors for 32 bytes of each row

struct words {
    ints each[N];

    ints   operator[](int k) const { return each[k]; }
    ints & operator[](int k) { return each[k]; }
};

// Of four vectors the lower four bits of each byte, then the upper ones
inline words both_nibbles(const ints (&bytes)[4]) {
    words to;
    for (int k = 0; k < 4; k++) {
        to[k]     = and_bytes(bytes[k], 0x0F);
        to[k + 4] = and_bytes(shift_right(bytes[k], 4), 0x0F);
    }
    return to;
}

// One after the other
struct in_rows {
    static constexpr int ROWS = 1; // of a block

    const rows & x;

    words load_32(int offset, int i) const {
        words to;
        load_words(x, offset + 32 * i, to.each);
        return to;
    }
    words nibbles(int offset, int i) const {
        ints four[4];
        load_words(x, offset + 16 * i, four);
        return both_nibbles(four);
    }
    ints load_word(int offset) const {
        ints four[4];
        load_words<4, false>(x, offset, four);
        return four[0];
    }
};

// Interleaved by eights, as ggml's repacking does
struct by_eights {
    static constexpr int ROWS = 8;

    const rows & groups;

    words load_32(int offset, int i) const {
        words to;
        for (int k = 0; k < N; k += 2) {
            load_eights(groups, offset + 256 * i + 32 * k, to[k], to[k + 1]);
        }
        return to;
    }
    words nibbles(int offset, int i) const {
        ints four[4];
        for (int k = 0; k < 4; k += 2) {
            load_eights(groups, offset + 128 * i + 32 * k, four[k], four[k + 1]);
        }
        return both_nibbles(four);
    }
};

// -- blocks of 32 -------------------------------------------------------------------------------------

struct factors_32 {
    reals scales, minimums;
};

template <typename block, int offset, typename layout_ = in_rows>
struct type_of_32 {
    using weights = block;
    using layout  = layout_;
    using column  = block_q8_0;
    using factors = factors_32;

    static constexpr int  SUB         = 32;
    static constexpr bool HAS_MINIMUM = false;
    static constexpr int  OFFSET      = offset;

    static void get_factors(const rows & x, factors & to) { to.scales = low_halves(layout { x }.load_word(0)); }
};

template <typename block>
struct type_of_32_with_minimum : type_of_32<block, 0> {
    using column = block_q8_1;

    static constexpr bool HAS_MINIMUM = true;

    static void get_factors(const rows & x, factors_32 & to) {
        const ints both = in_rows { x }.load_word(0);
        to              = { low_halves(both), high_halves(both) };
    }
};

struct q8_0 : type_of_32<block_q8_0, 128> {
    static constexpr int BITS = 8;

    static void decode(const layout & x, ints * to) {
        const auto bytes = x.load_32(offsetof(weights, qs), 0);
        for (int k = 0; k < N; k++) {
            to[k] = flip_bytes(bytes[k], (char) 128);
        }
    }
};

// Four bits each
template <typename base>
struct four_bits : base {
    using typename base::layout;
    using typename base::weights;

    static constexpr int BITS = 4;

    static void decode(const layout & x, ints * to) {
        const auto four = x.nibbles(offsetof(weights, qs), 0);
        for (int k = 0; k < N; k++) {
            to[k] = four[k];
        }
    }
};

using q4_0 = four_bits<type_of_32<block_q4_0, 8>>;
using q4_1 = four_bits<type_of_32_with_minimum<block_q4_1>>;

// The fifth bits of all together
template <typename base>
struct five_bits : base {
    using typename base::layout;
    using typename base::weights;

    static constexpr int BITS = 5;

    static void decode(const layout & x, ints * to) {
        const auto fifths = x.load_word(offsetof(weights, qh));
        const auto four   = x.nibbles(offsetof(weights, qs), 0);
        for (int k = 0; k < N; k++) {
            to[k] = or_(four[k], where_set(fifths, k, 0x10));
        }
    }
};

using q5_0 = five_bits<type_of_32<block_q5_0, 16>>;
using q5_1 = five_bits<type_of_32_with_minimum<block_q5_1>>;

// Tables of signed codes, made unsigned by `offset`
struct table {
    alignas(16) uint8_t codes[16];

    table(const int8_t (&of)[16], int offset) :
        codes() {
        for (int i = 0; i < 16; i++) {
            codes[i] = (uint8_t) (of[i] + offset);
        }
    }
};

const table IQ4_NL(kvalues_iq4nl, 128), MXFP4(kvalues_mxfp4, 12);

template <typename base, const table & codes>
struct by_table : base {
    using typename base::layout;
    using typename base::weights;

    static constexpr int BITS = base::OFFSET == 128 ? 8 : 5;

    static void decode(const layout & x, ints * to) {
        const auto four = x.nibbles(offsetof(weights, qs), 0);
        for (int k = 0; k < N; k++) {
            to[k] = look_up(codes.codes, four[k]);
        }
    }
};

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

using iq4_nl = by_table<type_of_32<block_iq4_nl, 128>, IQ4_NL>;

struct mxfp4 : by_table<type_of_32<block_mxfp4, 12>, MXFP4> {
    static void get_factors(const rows & x, factors & to) {
        to.scales = scales_of_exponents(and_words(in_rows { x }.load_word(0), 0xFF));
    }
};

// The same, as ggml repacks it
template <typename block, int offset>
struct repacked_32 : type_of_32<block, offset, by_eights> {
    static void get_factors(const rows & groups, factors_32 & to) { to.scales = load_halves(groups, 0); }
};

struct q4_0_8x8 : repacked_32<block_q4_0x8, 8> {
    static constexpr int BITS = 4;

    static void decode(const layout & x, ints * to) {
        const auto four = x.nibbles(offsetof(weights, qs), 0);
        for (int k = 0; k < N; k++) {
            to[k] = flip_bytes(four[k], 8); // ggml's repacking turns the uppermost bit over
        }
    }
};

using iq4_nl_8x8 = by_table<repacked_32<block_iq4_nlx8, 128>, IQ4_NL>;

struct mxfp4_8x8 : by_table<repacked_32<block_mxfp4x8, 12>, MXFP4> {
    static void get_factors(const rows & groups, factors & to) {
        to.scales = scales_of_exponents(widen_unsigned(load_bytes(groups, 0)));
    }
};

// -- blocks of 256: each SUB weights have a whole number as scale of their own -------------------------

template <int SUB>
struct factors_256 {
    static constexpr int N_SUB = QK_K / SUB;

    // of two sub-blocks each, 16 bits beside each other
    ints sub_scales[N_SUB / 2];
    // what the sums of SUB numbers of a column are multiplied with: minimums, or the scale of the offset, negative
    ints  sub_minimums[N_SUB / 2];
    reals scales, minimums;

    // Of four sub-blocks, from byte to byte of `words`
    void set_unsigned(int i, ints scale_words, ints minimum_words) {
        for (int n = 0; n < 2; n++) {
            sub_scales[i / 2 + n]   = two_unsigned(scale_words, 2 * n);
            sub_minimums[i / 2 + n] = two_unsigned(minimum_words, 2 * n);
        }
    }

    void set_signed(int i, ints scale_words, int offset) {
        for (int n = 0; n < 2; n++) {
            sub_scales[i / 2 + n]   = two_signed(scale_words, 2 * n);
            sub_minimums[i / 2 + n] = multiply_16(sub_scales[i / 2 + n], (int16_t) -offset);
        }
    }
};

template <typename block, int sub, bool has_minimum, int offset, typename layout_ = in_rows>
struct type_of_256 {
    using weights = block;
    using layout  = layout_;
    using column  = block_q8_K;
    using factors = factors_256<sub>;

    static constexpr int  SUB         = sub;
    static constexpr bool HAS_MINIMUM = has_minimum;
    static constexpr int  OFFSET      = offset;
};

// Q4_K and Q5_K begin with scale and minimum of the block, and eight scales and minimums of six bits in 12 bytes, of
// which the last four's upper two bits are with the first four.
inline ints six(ints words) { return and_bytes(words, 0x3F); }
inline ints last(ints four, ints two) { return or_(and_bytes(four, 0x0F), and_bytes(shift_right(two, 2), 0x30)); }

template <typename block>
struct with_six_bits : type_of_256<block, 32, true, 0> {
    static void get_factors(const rows & x, factors_256<32> & to) {
        ints first[4];
        load_words(x, 0, first);
        to.set_unsigned(0, six(first[1]), six(first[2]));
        to.set_unsigned(4, last(first[3], first[1]), last(shift_right(first[3], 4), first[2]));
        to.scales   = low_halves(first[0]);
        to.minimums = high_halves(first[0]);
    }
};

// Of 32 bytes the lower four bits, then the upper four
template <typename base>
struct q4_K_codes : base {
    using typename base::layout;
    using typename base::weights;

    static constexpr int BITS = 4;

    static void decode(const layout & x, ints * to) {
        for (int i = 0; i < 4; i++, to += 2 * N) {
            const auto bytes = x.load_32(offsetof(weights, qs), i);
            for (int k = 0; k < N; k++) {
                to[k]     = and_bytes(bytes[k], 0x0F);
                to[N + k] = and_bytes(shift_right(bytes[k], 4), 0x0F);
            }
        }
    }
};

using q4_K = q4_K_codes<with_six_bits<block_q4_K>>;

struct q5_K : with_six_bits<block_q5_K> {
    static constexpr int BITS = 5;

    static void decode(const layout & x, ints * to) {
        const auto fifths = x.load_32(offsetof(weights, qh), 0);
        for (int i = 0; i < 4; i++, to += 2 * N) {
            const auto bytes = x.load_32(offsetof(weights, qs), i);
            for (int k = 0; k < N; k++) { // bits 2i and 2i + 1 of every byte
                const auto two = shift_right(fifths[k], 2 * i);
                to[k]          = or_(and_bytes(bytes[k], 0x0F), and_bytes(shift_left(two, 4), 0x10));
                to[N + k]      = or_(and_bytes(shift_right(bytes[k], 4), 0x0F), and_bytes(shift_left(two, 3), 0x10));
            }
        }
    }
};

struct q6_K : type_of_256<block_q6_K, 16, false, 32> {
    static constexpr int BITS = 6;

    static void decode(const layout & x, ints * to) {
        const auto join = [](auto low, auto high) { return or_(and_bytes(low, 0x0F), and_bytes(high, 0x30)); };
        for (int half = 0; half < 2; half++, to += 4 * N) {
            const auto first  = x.load_32(offsetof(weights, ql), 2 * half);
            const auto second = x.load_32(offsetof(weights, ql), 2 * half + 1);
            const auto two    = x.load_32(offsetof(weights, qh), half);
            for (int k = 0; k < N; k++) {
                to[k]         = join(first[k], shift_left(two[k], 4));
                to[N + k]     = join(second[k], shift_left(two[k], 2));
                to[2 * N + k] = join(shift_right(first[k], 4), two[k]);
                to[3 * N + k] = join(shift_right(second[k], 4), shift_right(two[k], 2));
            }
        }
    }

    static void get_factors(const rows & x, factors & to) {
        ints scales[4], last[4];
        load_words(x, offsetof(weights, scales), scales);
        for (int i = 0; i < 4; i++) {
            to.set_signed(4 * i, scales[i], OFFSET);
        }
        load_words(x, sizeof(weights) - 16, last);
        to.scales = high_halves(last[3]);
    }
};

// Two bits each: of 32 bytes the lowest, the next, ...
template <typename base>
struct q2_K_codes : base {
    using typename base::layout;
    using typename base::weights;

    static constexpr int BITS = 2;

    static void decode(const layout & x, ints * to) {
        for (int half = 0; half < 2; half++) {
            const auto bytes = x.load_32(offsetof(weights, qs), half);
            for (int i = 0; i < 4; i++, to += N) {
                for (int k = 0; k < N; k++) {
                    to[k] = and_bytes(shift_right(bytes[k], 2 * i), 3);
                }
            }
        }
    }
};

struct q2_K : q2_K_codes<type_of_256<block_q2_K, 16, true, 0>> {
    static void get_factors(const rows & x, factors & to) {
        ints both[4], last[4]; // scales and minimums of four bits
        load_words(x, offsetof(weights, scales), both);
        for (int i = 0; i < 4; i++) {
            to.set_unsigned(4 * i, and_bytes(both[i], 0x0F), and_bytes(shift_right(both[i], 4), 0x0F));
        }
        load_words(x, sizeof(weights) - 16, last);
        to.scales   = low_halves(last[3]);
        to.minimums = high_halves(last[3]);
    }
};

struct q3_K : q2_K_codes<type_of_256<block_q3_K, 16, false, 4>> {
    static constexpr int BITS = 3;

    static void decode(const layout & x, ints * to) {
        q2_K_codes::decode(x, to);
        const auto thirds = x.load_32(offsetof(weights, hmask), 0);
        for (int i = 0; i < 8; i++, to += N) { // bit i of every byte
            for (int k = 0; k < N; k++) {
                to[k] = or_(to[k], and_bytes(i < 2 ? shift_left(thirds[k], 2 - i) : shift_right(thirds[k], i - 2), 4));
            }
        }
    }

    static void get_factors(const rows & x, factors & to) {
        ints last[4]; // with 16 scales of six bits, 32 too large: of 8 bytes four each, of four more two
        load_words(x, sizeof(weights) - 16, last);
        const ints a = joined(last[0], last[1]), b = joined(last[1], last[2]), c = joined(last[2], last[3]);
        const auto scales = [](ints four, ints two) {
            return subtract_bytes(or_(and_bytes(four, 0x0F), and_bytes(two, 0x30)), 32);
        };
        to.set_signed(0, scales(a, shift_left(c, 4)), OFFSET);
        to.set_signed(4, scales(b, shift_left(c, 2)), OFFSET);
        to.set_signed(8, scales(shift_right(a, 4), c), OFFSET);
        to.set_signed(12, scales(shift_right(b, 4), shift_right(c, 2)), OFFSET);
        to.scales = high_halves(last[3]);
    }

    // The two last bytes of one word and the two first of the next
    static ints joined(ints first, ints second) { return or_(shift_right_32(first, 16), shift_left_32(second, 16)); }
};

struct iq4_xs : type_of_256<block_iq4_xs, 32, false, 128> {
    static constexpr int BITS = 8;

    static void decode(const layout & x, ints * to) {
        for (int i = 0; i < 8; i++, to += N) {
            const auto four = x.nibbles(offsetof(weights, qs), i);
            for (int k = 0; k < N; k++) {
                to[k] = look_up(IQ4_NL.codes, four[k]);
            }
        }
    }

    static void get_factors(const rows & x, factors & to) {
        ints first[4]; // scale, eight times two bits, eight times four: scales of six bits, 32 too large
        load_words(x, 0, first);
        for (int i = 0; i < 8; i += 4) {
            ints words = everywhere(0);
            for (int n = 0; n < 4; n++) {
                const ints four = and_words(shift_right_32(first[1], 4 * (i + n)), 0x0F);
                const ints two  = and_words(shift_right_32(first[0], 16 + 2 * (i + n)), 3);
                words           = or_(words, shift_left_32(or_(four, shift_left_32(two, 4)), 8 * n));
            }
            to.set_signed(i, subtract_bytes(words, 32), OFFSET);
        }
        to.scales = low_halves(first[0]);
    }
};

// As ggml repacks them: codes in the same order, of eight rows
struct q4_K_8x8 : q4_K_codes<type_of_256<block_q4_Kx8, 32, true, 0, by_eights>> {
    static void get_factors(const rows & groups, factors & to) {
        // 12 bytes for each sub-block: as with_six_bits, of all sub-blocks at once
        ints words[3];
        load_thirds(groups, offsetof(weights, scales), words);
        alignas(64) uint8_t scales[8][LANES], minimums[8][LANES];
        store_eights(six(words[0]), last(words[2], words[0]), scales);
        store_eights(six(words[1]), last(shift_right(words[2], 4), words[1]), minimums);
        for (int i = 0; i < 8; i += 2) {
            to.sub_scales[i / 2]   = pairs(load_lanes(scales[i]), load_lanes(scales[i + 1]));
            to.sub_minimums[i / 2] = pairs(load_lanes(minimums[i]), load_lanes(minimums[i + 1]));
        }
        to.scales   = load_halves(groups, offsetof(weights, d));
        to.minimums = load_halves(groups, offsetof(weights, dmin));
    }
};

struct q2_K_8x8 : q2_K_codes<type_of_256<block_q2_Kx8, 16, true, 0, by_eights>> {
    static void get_factors(const rows & groups, factors & to) {
        for (int i = 0; i < 8; i++) { // of eight rows, two bytes: scales and minimums of four bits
            const ints two     = widen_pairs(groups, offsetof(weights, scales) + 16 * i);
            to.sub_scales[i]   = or_(and_words(two, 0x0F), and_words(shift_left_32(two, 8), 0x0F0000));
            to.sub_minimums[i] = or_(and_words(shift_right_32(two, 4), 0x0F), and_words(shift_left_32(two, 4), 0x0F0000));
        }
        to.scales   = load_halves(groups, offsetof(weights, d));
        to.minimums = load_halves(groups, offsetof(weights, dmin));
    }
};

} // namespace
