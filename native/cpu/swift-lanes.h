// Vectors as wide as the processor has them, and what the kernels do with them: x86 with AVX2, faster with
// AVX-VNNI, twice as wide with AVX-512 VNNI.
//
// Compiled once for each CPU backend, by its flags: no two of them may share any of it, so all of it has
// internal linkage.

#pragma once

#include "ggml-cpu-impl.h"

#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC 12's own headers, for AVX-512
#    pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

// Called once for each block of rows, vectors would go through memory; and GCC would drop calls that only prefetch, as
// having no effect.
#define SWIFT_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#    define SWIFT_AVX512
#endif

#ifdef SWIFT_AVX512

constexpr int LANES = 16; // rows of a panel: one in each lane
constexpr int TILE  = 8;  // columns that are multiplied with two panels at once, while all sums stay in registers

using ints  = __m512i; // [LANES] of 32 bits
using reals = __m512;

inline ints  load(const void * from) { return _mm512_loadu_si512(from); }
inline void  store(void * to, ints x) { _mm512_storeu_si512(to, x); }
inline ints  everywhere(int32_t x) { return _mm512_set1_epi32(x); }
inline ints  add(ints a, ints b) { return _mm512_add_epi32(a, b); }
inline ints  multiply(ints a, ints b) { return _mm512_mullo_epi32(a, b); }
inline reals load(const float * from) { return _mm512_loadu_ps(from); }
inline reals load(const float * from, int n) { return _mm512_maskz_loadu_ps((__mmask16) ((1 << n) - 1), from); }
inline void  store(float * to, reals x) { _mm512_storeu_ps(to, x); }
inline void  store(float * to, reals x, int n) { _mm512_mask_storeu_ps(to, (__mmask16) ((1 << n) - 1), x); }
inline reals everywhere(float x) { return _mm512_set1_ps(x); }
inline reals multiply(reals a, reals b) { return _mm512_mul_ps(a, b); }
inline reals add(reals a, reals b) { return _mm512_add_ps(a, b); }
inline reals subtract(reals a, reals b) { return _mm512_sub_ps(a, b); }
inline reals multiply_add(reals a, reals b, reals c) { return _mm512_fmadd_ps(a, b, c); }
inline reals to_reals(ints x) { return _mm512_cvtepi32_ps(x); }
inline ints  widen_unsigned(__m128i bytes) { return _mm512_cvtepu8_epi32(bytes); }
inline reals maximum(reals a, reals b) { return _mm512_max_ps(a, b); }
inline reals absolute(reals x) { return _mm512_abs_ps(x); }
inline float largest_of(reals x) { return _mm512_reduce_max_ps(x); }
inline bool  has_nan(reals x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
inline reals as_reals(ints x) { return _mm512_castsi512_ps(x); }
// Where a is b, x, else y
inline reals where_equal(reals a, reals b, reals x, reals y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), x); }
inline ints  and_words(ints x, int mask) { return _mm512_and_si512(x, _mm512_set1_epi32(mask)); }
inline ints  shift_right_32(ints x, int bits) { return _mm512_srli_epi32(x, bits); }
inline ints  shift_left_32(ints x, int bits) { return _mm512_slli_epi32(x, bits); }
inline ints  arithmetic_right_32(ints x, int bits) { return _mm512_srai_epi32(x, bits); }
inline ints  arithmetic_right_16(ints x, int bits) { return _mm512_srai_epi16(x, bits); }
inline ints  subtract_bytes(ints x, char y) { return _mm512_sub_epi8(x, _mm512_set1_epi8(y)); }
inline ints  multiply_16(ints x, int16_t y) { return _mm512_mullo_epi16(x, _mm512_set1_epi16(y)); }
inline ints  multiply_16(ints x, ints y) { return _mm512_mullo_epi16(x, y); }
inline ints  subtract_16(ints x, int16_t y) { return _mm512_sub_epi16(x, _mm512_set1_epi16(y)); }
inline ints  shift_right_16(ints x, int bits) { return _mm512_srli_epi16(x, bits); }
inline ints  shift_left_16(ints x, int bits) { return _mm512_slli_epi16(x, bits); }
// Every other byte of each
inline ints where_odd(ints even, ints odd) { return _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, even, odd); }
inline ints unpack_low_32(ints a, ints b) { return _mm512_unpacklo_epi32(a, b); }
inline ints unpack_high_32(ints a, ints b) { return _mm512_unpackhi_epi32(a, b); }
inline ints unpack_low_64(ints a, ints b) { return _mm512_unpacklo_epi64(a, b); }
inline ints unpack_high_64(ints a, ints b) { return _mm512_unpackhi_epi64(a, b); }

#else

constexpr int LANES = 8;
constexpr int TILE  = 4;

using ints  = __m256i;
using reals = __m256;

inline ints  load(const void * from) { return _mm256_loadu_si256((const __m256i *) from); }
inline void  store(void * to, ints x) { _mm256_storeu_si256((__m256i *) to, x); }
inline ints  everywhere(int32_t x) { return _mm256_set1_epi32(x); }
inline ints  add(ints a, ints b) { return _mm256_add_epi32(a, b); }
inline ints  multiply(ints a, ints b) { return _mm256_mullo_epi32(a, b); }
inline ints  first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline reals load(const float * from) { return _mm256_loadu_ps(from); }
inline reals load(const float * from, int n) { return _mm256_maskload_ps(from, first_lanes(n)); }
inline void  store(float * to, reals x) { _mm256_storeu_ps(to, x); }
inline void  store(float * to, reals x, int n) { _mm256_maskstore_ps(to, first_lanes(n), x); }
inline reals everywhere(float x) { return _mm256_set1_ps(x); }
inline reals multiply(reals a, reals b) { return _mm256_mul_ps(a, b); }
inline reals add(reals a, reals b) { return _mm256_add_ps(a, b); }
inline reals subtract(reals a, reals b) { return _mm256_sub_ps(a, b); }
inline reals multiply_add(reals a, reals b, reals c) { return _mm256_fmadd_ps(a, b, c); }
inline reals to_reals(ints x) { return _mm256_cvtepi32_ps(x); }
inline ints  widen_unsigned(__m128i bytes) { return _mm256_cvtepu8_epi32(bytes); }
inline reals maximum(reals a, reals b) { return _mm256_max_ps(a, b); }
inline reals absolute(reals x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline reals as_reals(ints x) { return _mm256_castsi256_ps(x); }
inline reals where_equal(reals a, reals b, reals x, reals y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline bool  has_nan(reals x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
inline float largest_of(reals x) {
    __m128 most = _mm_max_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    most        = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
inline ints and_words(ints x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi32(mask)); }
inline ints shift_right_32(ints x, int bits) { return _mm256_srli_epi32(x, bits); }
inline ints shift_left_32(ints x, int bits) { return _mm256_slli_epi32(x, bits); }
inline ints arithmetic_right_32(ints x, int bits) { return _mm256_srai_epi32(x, bits); }
inline ints arithmetic_right_16(ints x, int bits) { return _mm256_srai_epi16(x, bits); }
inline ints subtract_bytes(ints x, char y) { return _mm256_sub_epi8(x, _mm256_set1_epi8(y)); }
inline ints multiply_16(ints x, int16_t y) { return _mm256_mullo_epi16(x, _mm256_set1_epi16(y)); }
inline ints add_16(ints a, ints b) { return _mm256_add_epi16(a, b); }
inline ints unpack_low_32(ints a, ints b) { return _mm256_unpacklo_epi32(a, b); }
inline ints unpack_high_32(ints a, ints b) { return _mm256_unpackhi_epi32(a, b); }
inline ints unpack_low_64(ints a, ints b) { return _mm256_unpacklo_epi64(a, b); }
inline ints unpack_high_64(ints a, ints b) { return _mm256_unpackhi_epi64(a, b); }

#endif

// -- bytes, whatever the lanes mean -------------------------------------------------------------------

using bytes_16 = __m128i;
using bytes_32 = __m256i;

inline bytes_32 and_bytes(bytes_32 x, char mask) { return _mm256_and_si256(x, _mm256_set1_epi8(mask)); }
inline bytes_32 flip_bytes(bytes_32 x, char bits) { return _mm256_xor_si256(x, _mm256_set1_epi8(bits)); }
inline bytes_32 or_(bytes_32 a, bytes_32 b) { return _mm256_or_si256(a, b); }
inline bytes_32 shift_right(bytes_32 x, int bits) { return _mm256_srli_epi16(x, bits); } // of 16 bits: mask them
inline bytes_32 shift_left(bytes_32 x, int bits) { return _mm256_slli_epi16(x, bits); }
// What a table of 16 has for each byte below 16
inline bytes_32 look_up(const uint8_t * table, bytes_32 x) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table)), x);
}

#ifdef SWIFT_AVX512
inline ints and_bytes(ints x, char mask) { return _mm512_and_si512(x, _mm512_set1_epi8(mask)); }
inline ints flip_bytes(ints x, char bits) { return _mm512_xor_si512(x, _mm512_set1_epi8(bits)); }
inline ints or_(ints a, ints b) { return _mm512_or_si512(a, b); }
inline ints shift_right(ints x, int bits) { return _mm512_srli_epi16(x, bits); }
inline ints shift_left(ints x, int bits) { return _mm512_slli_epi16(x, bits); }
inline ints look_up(const uint8_t * table, ints x) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table)), x);
}
#endif

// -- products of bytes, added up by fours ------------------------------------------------------------

#if defined(SWIFT_AVX512) || defined(__AVXVNNI__)
constexpr bool HAS_VNNI = true;
#else
constexpr bool HAS_VNNI = false;
#endif

// sums + u * s, u unsigned and s signed; without VNNI u has at most 7 bits, so that pairs fit 16
inline __m256i dot_unsigned(__m256i sums, __m256i u, __m256i s) {
#if defined(SWIFT_AVX512)
    return _mm256_dpbusd_epi32(sums, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, u, s);
#else
    const __m256i pairs = _mm256_maddubs_epi16(u, s);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// u * s, added up by twos, 16 bits each
inline __m256i pairs_unsigned(__m256i u, __m256i s) { return _mm256_maddubs_epi16(u, s); }
// a * b, both signed: the sign of one goes to the other
inline __m256i pairs_signed(__m256i a, __m256i b) { return _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a)); }

#ifdef SWIFT_AVX512
inline ints dot_unsigned(ints sums, ints u, ints s) { return _mm512_dpbusd_epi32(sums, u, s); }
#endif

// sums + a * b, 16 bits each, added up by twos
inline __m256i dot_words(__m256i sums, __m256i a, __m256i b) {
#if defined(SWIFT_AVX512)
    return _mm256_dpwssd_epi32(sums, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

#ifdef SWIFT_AVX512
inline ints dot_words(ints sums, ints a, ints b) { return _mm512_dpwssd_epi32(sums, a, b); }
#endif

// -- from rows, as they lie in memory, to lanes -------------------------------------------------------

// To the second cache: the first has to hold panels and columns.
SWIFT_INLINE void prefetch(const char * bytes, int64_t n) {
    for (int64_t i = 0; i < n; i += 64) {
        _mm_prefetch(bytes + i, _MM_HINT_T1);
    }
}

// LANES rows, the first of which begins at `first`. Rows of a panel lie apart, an order that the hardware does not
// foresee. So with each piece that is loaded, as large a piece of what comes next is asked for, from `ahead` on.
struct rows {
    const char *         first;
    size_t               stride; // bytes from row to row
    mutable const char * ahead = nullptr;

    const char *      at(int row, int offset) const { return first + row * stride + offset; }
    SWIFT_INLINE void ask(int64_t n) const {
        prefetch(ahead, n);
        ahead += n;
    }
};

// N * 4 bytes of each row, from `offset` on, whole sixteens: to[i] has four bytes of every row. ASKS: unless others
// do that for these bytes.
template <int N, bool ASKS = true>
SWIFT_INLINE void load_words(const rows & x, int offset, ints (&to)[N]) {
    static_assert(N % 4 == 0);
    if constexpr (ASKS) {
        x.ask(LANES * 4 * N);
    }
    for (int n = 0; n < N; n += 4, offset += 16) {
        ints in[4]; // 16 bytes of the rows i, i + 4, ... beside each other
        for (int i = 0; i < 4; i++) {
#ifdef SWIFT_AVX512
            const auto sixteen = [&](int row) { return _mm_loadu_si128((const __m128i *) x.at(row, offset)); };
            in[i]              = _mm512_castsi128_si512(sixteen(i));
            in[i]              = _mm512_mask_broadcast_i32x4(in[i], 0x00F0, sixteen(i + 4));
            in[i]              = _mm512_mask_broadcast_i32x4(in[i], 0x0F00, sixteen(i + 8));
            in[i]              = _mm512_mask_broadcast_i32x4(in[i], 0xF000, sixteen(i + 12));
#else
            in[i] = _mm256_loadu2_m128i((const __m128i *) x.at(i + 4, offset), (const __m128i *) x.at(i, offset));
#endif
        }
        const ints low_01 = unpack_low_32(in[0], in[1]), high_01 = unpack_high_32(in[0], in[1]);
        const ints low_23 = unpack_low_32(in[2], in[3]), high_23 = unpack_high_32(in[2], in[3]);
        // rows 0, 1, 2, 3, then 4, 5, .. in the next 128 bits
        to[n]     = unpack_low_64(low_01, low_23);
        to[n + 1] = unpack_high_64(low_01, low_23);
        to[n + 2] = unpack_low_64(high_01, high_23);
        to[n + 3] = unpack_high_64(high_01, high_23);
    }
}

// ggml's repacking interleaves eight rows: eight bytes of a row follow eight of the row before. Of 64 such bytes of
// LANES / 8 groups, `first` gets the first four bytes of every row, `others` the others.
inline void load_eights(const rows & groups, int offset, ints & first, ints & others) {
    groups.ask(LANES / 8 * 64);
#ifdef SWIFT_AVX512
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd  = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i a = load(groups.at(0, offset)), b = load(groups.at(8, offset));
    first  = _mm512_permutex2var_epi32(a, even, b);
    others = _mm512_permutex2var_epi32(a, odd, b);
#else
    const __m256  a    = _mm256_loadu_ps((const float *) groups.at(0, offset));
    const __m256  b    = _mm256_loadu_ps((const float *) groups.at(0, offset + 32));
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));
    const __m256i odd  = _mm256_castps_si256(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
    first              = _mm256_permute4x64_epi64(even, _MM_SHUFFLE(3, 1, 2, 0));
    others             = _mm256_permute4x64_epi64(odd, _MM_SHUFFLE(3, 1, 2, 0));
#endif
}

// Of 24 words of each group every third, eight beside each other: to[0] has the first ones, to[1] the second, ..
inline void load_thirds(const rows & groups, int offset, ints (&to)[3]) {
#ifdef SWIFT_AVX512
    for (int i = 0; i < 3; i++) { // of words 0 to 15, and 8 to 23
        const __m512i third = _mm512_add_epi32(_mm512_set1_epi32(i), _mm512_setr_epi32(0, 3, 6, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0, 0, 0));
        __m256i       eight[2];
        for (int g = 0; g < 2; g++) {
            const ints low = load(groups.at(8 * g, offset)), high = load(groups.at(8 * g, offset + 32));
            eight[g] = _mm512_castsi512_si256(_mm512_permutex2var_epi32(low, third, high));
        }
        to[i] = _mm512_inserti64x4(_mm512_castsi256_si512(eight[0]), eight[1], 1);
    }
#else
    const __m256i third = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
    for (int i = 0; i < 3; i++) {
        to[i] = _mm256_i32gather_epi32((const int *) groups.at(0, offset) + i, third, 4);
    }
#endif
}

// Words of rows 0-3 and of rows 4-7 of each group, eight of each, to bytes of all rows
inline void store_eights(ints rows_0123, ints rows_4567, uint8_t (*to)[LANES]) {
#ifdef SWIFT_AVX512
    const __m512i first = _mm512_setr_epi32(0, 16, 8, 24, 1, 17, 9, 25, 2, 18, 10, 26, 3, 19, 11, 27);
    store(to[0], _mm512_permutex2var_epi32(rows_0123, first, rows_4567));
    store(to[4], _mm512_permutex2var_epi32(rows_0123, _mm512_add_epi32(first, _mm512_set1_epi32(4)), rows_4567));
#else
    const __m256i even = _mm256_unpacklo_epi32(rows_0123, rows_4567); // 0 1 | 4 5
    const __m256i odd  = _mm256_unpackhi_epi32(rows_0123, rows_4567); // 2 3 | 6 7
    store(to[0], _mm256_permute2x128_si256(even, odd, 0x20));
    store(to[4], _mm256_permute2x128_si256(even, odd, 0x31));
#endif
}

// A byte of every row
inline __m128i load_lanes(const uint8_t * bytes) {
    return LANES == 16 ? _mm_loadu_si128((const __m128i *) bytes) : _mm_loadl_epi64((const __m128i *) bytes);
}

// Two bytes of every row as 16 bits each
inline ints pairs(__m128i first, __m128i second) {
    return or_(widen_unsigned(first), shift_left_32(widen_unsigned(second), 16));
}

// Eight bytes of each group beside each other: one of every row
inline __m128i load_bytes(const rows & groups, int offset) {
    const __m128i first = _mm_loadl_epi64((const __m128i *) groups.at(0, offset));
#ifdef SWIFT_AVX512
    return _mm_unpacklo_epi64(first, _mm_loadl_epi64((const __m128i *) groups.at(8, offset)));
#else
    return first;
#endif
}

// Eight times two bytes of each group
inline ints widen_pairs(const rows & groups, int offset) {
    const __m128i first = _mm_loadu_si128((const __m128i *) groups.at(0, offset));
#ifdef SWIFT_AVX512
    return _mm512_cvtepu16_epi32(_mm256_set_m128i(_mm_loadu_si128((const __m128i *) groups.at(8, offset)), first));
#else
    return _mm256_cvtepu16_epi32(first);
#endif
}

// Eight halves of each group
inline reals load_halves(const rows & groups, int offset) {
    const __m128i first = _mm_loadu_si128((const __m128i *) groups.at(0, offset));
#ifdef SWIFT_AVX512
    return _mm512_cvtph_ps(_mm256_set_m128i(_mm_loadu_si128((const __m128i *) groups.at(8, offset)), first));
#else
    return _mm256_cvtph_ps(first);
#endif
}

// -- parts of words -----------------------------------------------------------------------------------

// The lower 16 bits as floats
inline reals low_halves(ints words) {
#ifdef SWIFT_AVX512
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
#else
    const __m256i halves = _mm256_packus_epi32(_mm256_and_si256(words, _mm256_set1_epi32(0xFFFF)), _mm256_setzero_si256());
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, _MM_SHUFFLE(3, 1, 2, 0))));
#endif
}

inline reals high_halves(ints words) { return low_halves(shift_right_32(words, 16)); }

// Byte i
inline ints unsigned_byte(ints words, int i) { return and_words(shift_right_32(words, 8 * i), 0xFF); }
inline ints signed_byte(ints words, int i) { return arithmetic_right_32(shift_left_32(words, 24 - 8 * i), 24); }

// The lower 16 bits, twice
inline ints twice_16(ints words) { return or_(shift_left_32(words, 16), and_words(words, 0xFFFF)); }

// Bytes i and i + 1 as 16 bits each
inline ints two_unsigned(ints words, int i) {
    const ints two = shift_right_32(words, 8 * i);
    return or_(and_words(two, 0xFF), and_words(shift_left_32(two, 8), 0xFF0000));
}

inline ints two_signed(ints words, int i) { // each goes to the upper half of its 16 bits first
    const ints two = shift_right_32(words, 8 * i);
    return arithmetic_right_16(or_(and_words(shift_left_32(two, 8), 0xFF00), shift_left_32(shift_right_32(two, 8), 24)), 8);
}

// Byte i of each word, four times
inline ints every_byte(ints words, int i) {
    const __m128i four = _mm_add_epi8(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C), _mm_set1_epi8((char) i));
#ifdef SWIFT_AVX512
    return _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(four));
#else
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(four));
#endif
}

// `value` in each byte j of a word whose bit 4i + j is set, else 0
inline ints where_set(ints words, int i, char value) {
    const ints own  = everywhere(i % 2 ? (int) 0x80402010 : 0x08040201);
    const ints byte = every_byte(words, i / 2);
#ifdef SWIFT_AVX512
    return _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(byte, own), value);
#else
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(byte, own), own), _mm256_set1_epi8(value));
#endif
}

// -- floats -------------------------------------------------------------------------------------------

inline reals load_halves(const ggml_fp16_t * from) {
#ifdef SWIFT_AVX512
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) from));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) from));
#endif
}

inline reals load_halves(const ggml_bf16_t * from) { // the upper halves of floats
#ifdef SWIFT_AVX512
    return _mm512_castsi512_ps(shift_left_32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) from)), 16));
#else
    return _mm256_castsi256_ps(shift_left_32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) from)), 16));
#endif
}

// In a fixed order
inline float sum_of(reals x) {
#ifdef SWIFT_AVX512
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
#else
    const __m256 eight = x;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four        = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// -- quantising ---------------------------------------------------------------------------------------

// 16 floats times `scale`, rounded to bytes, at most 127
inline __m128i rounded_16(const float * x, float scale) {
    const __m256  factor = _mm256_set1_ps(scale);
    const __m256i low    = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_loadu_ps(x)));
    const __m256i high   = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_loadu_ps(x + 8)));
    const __m256i words  = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), _MM_SHUFFLE(3, 1, 2, 0));
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline int32_t sum_of(__m256i eight) {
    __m128i sum = _mm_add_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
    sum         = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(2, 3, 0, 1))));
}

} // namespace
