// Building blocks of the kernels in swift-kernels.h, for x86 with AVX2 (faster with VNNI).
//
// Each CPU backend compiles this with its own flags. No two may share any of it, so all of it has internal
// linkage.

#pragma once

#include "ggml-cpu-impl.h"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

// How many columns unpacked weights serve while all sums stay in registers.
#if defined(__AVX512VL__)
constexpr int TILE = 8;
#else
constexpr int TILE = 4;
#endif

// sums + u * s, added up in groups of four; u has at most 7 bits (or is 128) where pairs have to fit 16 bits
inline __m256i dot(__m256i sums, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, u, s);
#else
    const __m256i pairs = _mm256_maddubs_epi16(u, s);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// x * y, added up in groups of four; both are signed bytes, though the instructions want one unsigned
struct signed_dot {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) || defined(__AVXVNNI__)
    // add 128 to each x, subtract 128 times the sum of y
    __m256i y, start;

    explicit signed_dot(__m256i y) :
        y(y) {
        start = _mm256_sub_epi32(_mm256_setzero_si256(), dot(_mm256_setzero_si256(), _mm256_set1_epi8(-128), y));
    }

    __m256i operator()(__m256i x) const { return dot(start, _mm256_xor_si256(x, _mm256_set1_epi8(-128)), y); }
#else
    // the sign of x goes to y; sums of two stay within 16 bits
    __m256i y;

    explicit signed_dot(__m256i y) :
        y(y) {}

    __m256i operator()(__m256i x) const {
        return dot(_mm256_setzero_si256(), _mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
    }
#endif
};

// x * y, added up in groups of four; x: unsigned bytes of at most 7 bits
struct unsigned_dot {
    __m256i y;

    __m256i operator()(__m256i x) const { return dot(_mm256_setzero_si256(), x, y); }
};

// sums + a * b, added up in pairs
inline __m256i dot_16(__m256i sums, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sums, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

// 32 numbers of four bits: the lower ones of 16 bytes, then the upper ones
inline __m256i nibbles_32(const uint8_t * bytes) {
    const __m128i both = _mm_loadu_si128((const __m128i *) bytes);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(0x0F));
}

// `value` in each of 32 bytes whose bit is set, else 0
inline __m256i where_set(const uint8_t * bits, char value) {
    uint32_t word;
    memcpy(&word, bits, sizeof(word));
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return _mm256_maskz_set1_epi8(word, value);
#else
    const __m256i of_eight = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bytes    = _mm256_shuffle_epi8(_mm256_set1_epi32((int) word), of_eight);
    const __m256i own      = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), own), _mm256_set1_epi8(value));
#endif
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

inline int32_t add_up(__m256i lanes) {
    __m128i sum = _mm_add_epi32(_mm256_extracti128_si256(lanes, 1), _mm256_castsi256_si128(lanes));
    sum         = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(2, 3, 0, 1))));
}

// How far ahead weights are prefetched: they are read faster than the hardware's own prefetching expects. They go
// to the second cache: the first has to hold the columns, which may be long (docs/lab/kernels.md).
constexpr size_t AHEAD = 16384;

enum class cache { first,
                   second };

template <cache to>
void fetch(const char * bytes, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        if constexpr (to == cache::first) { // the hint has to be a literal
            _mm_prefetch(bytes + i, _MM_HINT_T0);
        } else {
            _mm_prefetch(bytes + i, _MM_HINT_T1);
        }
    }
}

inline void prefetch(const void * bytes, size_t n) {
    fetch<cache::second>((const char *) bytes + AHEAD, n);
}

} // namespace
