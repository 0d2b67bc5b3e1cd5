// AMX: products of a panel with 16 columns at once. A panel's codes lie in memory as a tile wants its right side, four
// numbers of every row beside each other, and columns lie as it wants its left side. What comes out is whole numbers,
// exact in any order: the same as swift-panels.h adds up, so the same bits.
//
// With its scales a code of a block of 256 has up to 16 bits. So each is two codes of 8 bits, and a block has one
// product for the lower ones and one for the upper ones. Blocks of 32 have no scales within.
//
// Written in assembly: the intrinsics of GCC 12 do not say what they read, and the optimiser drops it.

#pragma once

#include "swift-panels.h"

#if defined(SWIFT_AVX512) && defined(__linux__) && defined(__x86_64__)
#    define SWIFT_TILES

#    include <cpuid.h>
#    include <sys/syscall.h>
#    include <unistd.h>

namespace {

constexpr int TILE_COLUMNS = 16; // of a tile
constexpr int TILE_PANELS  = 2;  // multiplied with each tile of columns

// Linux wants to be asked, as a thread's state grows by 8 KB.
inline bool ask_for_tiles() {
    constexpr int      ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    constexpr unsigned AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;

    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_TILE) && (d & AMX_INT8) &&
            syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

inline bool has_tiles() {
    static const bool has = ask_for_tiles();
    return has;
}

// Tiles of this thread, while it lives: 0 to 3 for sums, 4 for columns, 5 to 7 for codes, of K numbers
template <int K>
struct tiles {
    tiles() {
        struct {
            uint8_t  palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t  rows[16]      = {};
        } shapes;
        for (int t = 0; t < 8; t++) {
            shapes.row_bytes[t] = t == 4 ? K : 64;
            shapes.rows[t]      = t > 4 ? K / 4 : 16;
        }
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~tiles() { asm volatile("tilerelease" ::); }

    tiles(const tiles &)             = delete;
    tiles & operator=(const tiles &) = delete;
};

template <int T>
SWIFT_INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
SWIFT_INLINE void load_tile(const void * from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
SWIFT_INLINE void store_tile(void * to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// sums + columns * codes
template <int SUMS, int CODES, bool IS_SIGNED>
SWIFT_INLINE void dot_tiles() {
    if constexpr (IS_SIGNED) {
        asm volatile("tdpbssd %%tmm%c1, %%tmm4, %%tmm%c0" ::"i"(SUMS), "i"(CODES));
    } else {
        asm volatile("tdpbsud %%tmm%c1, %%tmm4, %%tmm%c0" ::"i"(SUMS), "i"(CODES));
    }
}

// -- panels whose codes have no offset ----------------------------------------------------------------

template <typename type, bool = IS_256<type>>
struct tiled_panel {
    ints                   codes[8];
    typename type::factors factors;

    SWIFT_INLINE void unpack(const rows & x) {
        panel<type> from;
        from.unpack(x);
        for (int k = 0; k < 8; k++) {
            codes[k] = OFFSET<type> ? subtract_bytes(from.codes[k], (char) OFFSET<type>) : from.codes[k];
        }
        factors = from.factors;
    }
};

template <typename type>
struct tiled_panel<type, true> {
    ints                   low[QK_K / 4], high[QK_K / 4]; // of each code times its scale
    typename type::factors factors;

    SWIFT_INLINE void unpack(const rows & x) {
        panel<type> from;
        from.unpack(x);
        for (int i = 0; i < QK_K / type::SUB; i++) {
            const ints scales = twice_16(from.sub_scales[i]);
#    pragma GCC unroll 8
            for (int k = i * type::SUB / 4; k < (i + 1) * type::SUB / 4; k++) {
                const ints even = multiply_16(without_offset(and_words(from.codes[k], 0x00FF00FF)), scales);
                const ints odd  = multiply_16(without_offset(shift_right_16(from.codes[k], 8)), scales);
                low[k]          = where_odd(even, shift_left_16(odd, 8));
                high[k]         = where_odd(shift_right_16(even, 8), odd);
            }
        }
        factors = from.factors;
    }

    static ints without_offset(ints codes) { return OFFSET<type> ? subtract_16(codes, OFFSET<type>) : codes; }
};

// -- columns ------------------------------------------------------------------------------------------

// A block of each of TILE_COLUMNS columns, in as many bytes as they have
template <typename block>
struct tiled_columns;

template <>
struct tiled_columns<block_q8_0> {
    ggml_half scales[TILE_COLUMNS];
    int8_t    numbers[TILE_COLUMNS][QK8_0];

    void set(int column, const block_q8_0 & from) {
        scales[column] = from.d;
        memcpy(numbers[column], from.qs, sizeof(from.qs));
    }
};

template <>
struct tiled_columns<block_q8_1> {
    ggml_half scales[TILE_COLUMNS], sums[TILE_COLUMNS];
    int8_t    numbers[TILE_COLUMNS][QK8_1];

    void set(int column, const block_q8_1 & from) {
        scales[column] = from.d;
        sums[column]   = from.s;
        memcpy(numbers[column], from.qs, sizeof(from.qs));
    }
};

template <>
struct tiled_columns<block_q8_K> {
    float   scales[TILE_COLUMNS];
    int8_t  numbers[QK_K / 64][TILE_COLUMNS][64];
    int16_t sums[TILE_COLUMNS][QK_K / 16];

    void set(int column, const block_q8_K & from) {
        scales[column] = from.d;
        memcpy(sums[column], from.bsums, sizeof(from.bsums));
        for (int k = 0; k < QK_K / 64; k++) {
            memcpy(numbers[k][column], from.qs + 64 * k, 64);
        }
    }
};

// -- products -----------------------------------------------------------------------------------------

// What tiles have added up for a block
template <typename type>
struct tiled_numbers {
    using block = tiled_columns<typename type::column>;
    static_assert(sizeof(block) == TILE_COLUMNS * sizeof(typename type::column));

    alignas(64) ints numbers[IS_256<type> ? 2 * TILE_PANELS : TILE_PANELS][TILE_COLUMNS];

    // Until store() the tiles hold the numbers.
    static SWIFT_INLINE void multiply(const tiled_panel<type> (&w)[TILE_PANELS], const block & y) {
        clear_tile<0>();
        clear_tile<1>();
        if constexpr (IS_256<type>) {
            clear_tile<2>();
            clear_tile<3>();
            for (int k = 0; k < QK_K / 64; k++) {
                load_tile<4>(y.numbers[k], 64);
                load_tile<5>(w[0].low + 16 * k, 64);
                dot_tiles<0, 5, false>();
                load_tile<6>(w[0].high + 16 * k, 64);
                dot_tiles<1, 6, true>();
                load_tile<7>(w[1].low + 16 * k, 64);
                dot_tiles<2, 7, false>();
                load_tile<5>(w[1].high + 16 * k, 64);
                dot_tiles<3, 5, true>();
            }
        } else {
            load_tile<4>(y.numbers, QK8_0);
            load_tile<5>(w[0].codes, 64);
            dot_tiles<0, 5, true>();
            load_tile<6>(w[1].codes, 64);
            dot_tiles<1, 6, true>();
        }
    }

    SWIFT_INLINE void store() {
        store_tile<0>(numbers[0], 64);
        store_tile<1>(numbers[1], 64);
        if constexpr (IS_256<type>) {
            store_tile<2>(numbers[2], 64);
            store_tile<3>(numbers[3], 64);
        }
    }

    SWIFT_INLINE void add_to_sums(const tiled_panel<type> (&w)[TILE_PANELS], const block & y, sums (*to)[TILE_PANELS]) const {
        [[maybe_unused]] alignas(64) float scales[TILE_COLUMNS], sums_of[TILE_COLUMNS];
        if constexpr (!IS_256<type>) {
            ::store(scales, load_halves(y.scales));
            if constexpr (type::HAS_MINIMUM) {
                ::store(sums_of, load_halves(y.sums));
            }
        }
        for (int p = 0; p < TILE_PANELS; p++) {
#    pragma GCC unroll 4
            for (int c = 0; c < TILE_COLUMNS; c++) {
                if constexpr (IS_256<type>) {
                    const ints number = add(numbers[2 * p][c], shift_left_32(numbers[2 * p + 1][c], 8));
                    add_to<type>(to[c][p], number, w[p].factors, y.scales[c], y.sums[c]);
                } else {
                    add_to<type>(to[c][p], numbers[p][c], w[p].factors, scales[c], sums_of + c);
                }
            }
        }
    }
};

} // namespace

#endif
