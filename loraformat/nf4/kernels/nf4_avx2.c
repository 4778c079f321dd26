/* NF4 with AVX2 and F16C: byte shuffles decode, a four-step search encodes. */
#include "nf4.h"
#ifdef NF4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define ISA(name) name##_avx2
#define LANES 4

INLINE void streaming_fence(void) { _mm_sfence(); }

INLINE __m256 load8(const void *x, int64_t i, int dtype) {
    if (dtype == NF4_F32) return _mm256_loadu_ps((const float *)((const char *)x + 4 * i));
    __m128i h = _mm_loadu_si128((const __m128i *)((const char *)x + 2 * i));
    if (dtype == NF4_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

INLINE uint32_t block_absmax(const void *x, int64_t n, int dtype) {
    __m256i sign = _mm256_set1_epi32(0x7fffffff), largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        __m256i bits = _mm256_castps_si256(load8(x, i, dtype));
        largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, sign));
    }
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

/* One step down the tree of thresholds; a comparison that holds is the integer -1. */
INLINE __m256i descend(__m256i code, __m256 s, __m256 thresholds) {
    __m256 threshold = _mm256_permutevar8x32_ps(thresholds, code);
    __m256i above = _mm256_castps_si256(_mm256_cmp_ps(s, threshold, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(code, code), above);
}

typedef struct {
    __m256 at7, at3, at1, at0; /* thresholds of the search, level by level */
} search;

INLINE search search_tree(const nf4_tables *t) {
    const float *h = t->thresholds;
    return (search){_mm256_set1_ps(h[7]), _mm256_setr_ps(h[3], h[11], 0, 0, 0, 0, 0, 0),
                    _mm256_setr_ps(h[1], h[5], h[9], h[13], 0, 0, 0, 0),
                    _mm256_setr_ps(h[0], h[2], h[4], h[6], h[8], h[10], h[12], h[14])};
}

INLINE __m256i codes8(search tree, __m256 s) {
    __m256i above = _mm256_castps_si256(_mm256_cmp_ps(s, tree.at7, _CMP_GT_OQ));
    __m256i code = descend(_mm256_srli_epi32(above, 31), s, tree.at3);
    return descend(descend(code, s, tree.at1), s, tree.at0);
}

INLINE void block_codes(const nf4_tables *t, const void *x, int64_t n, int dtype, float inverse,
                        uint8_t *packed) {
    search tree = search_tree(t);
    __m256 scale = _mm256_set1_ps(inverse);
    for (int64_t i = 0; i < n; i += 32) {
        __m256i c0 = codes8(tree, _mm256_mul_ps(load8(x, i, dtype), scale));
        __m256i c1 = codes8(tree, _mm256_mul_ps(load8(x, i + 8, dtype), scale));
        __m256i c2 = codes8(tree, _mm256_mul_ps(load8(x, i + 16, dtype), scale));
        __m256i c3 = codes8(tree, _mm256_mul_ps(load8(x, i + 24, dtype), scale));
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c0, c1), _mm256_packs_epi32(c2, c3));
        __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
        __m256i both = _mm256_packus_epi16(pairs, pairs);
        /* the packs work within 128-bit lanes: put the 16-bit pieces back in order */
        __m128i low = _mm256_castsi256_si128(both), high = _mm256_extracti128_si256(both, 1);
        _mm_storeu_si128((__m128i *)(packed + i / 2), _mm_unpacklo_epi16(low, high));
    }
}

INLINE void put(void *to, __m256i value, int streaming) {
    if (streaming)
        _mm256_stream_si256(to, value);
    else
        _mm256_storeu_si256(to, value);
}

/* 16 bytes -> 32 codes in order: the high nibble comes first. */
INLINE __m256i nibbles(const uint8_t *packed) {
    __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)packed));
    __m256i both = _mm256_or_si256(_mm256_srli_epi16(w, 4), _mm256_slli_epi16(w, 8));
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

/* 16 bytes as a table for the byte shuffle of both 128-bit lanes. */
INLINE __m256i plane(__m128i bytes) { return _mm256_broadcastsi128_si256(bytes); }

INLINE __m256i round_bf16(__m256 product) {
    __m256i u = _mm256_castps_si256(product), one = _mm256_set1_epi32(1);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(product, product, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}

/* The 16 products rounded to 16 bits: low bytes, then high bytes. */
INLINE void planes16(__m256 low, __m256 high, int dtype, __m256i planes[2]) {
    __m128i a, b, byte = _mm_set1_epi16(0xff);
    if (dtype == NF4_F16) {
        a = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        b = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m256i both = _mm256_packus_epi32(round_bf16(low), round_bf16(high));
        both = _mm256_permute4x64_epi64(both, 0xd8);
        a = _mm256_castsi256_si128(both);
        b = _mm256_extracti128_si256(both, 1);
    }
    planes[0] = plane(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    planes[1] = plane(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
}

/* Byte k of each of the 16 products, k = 0 to 3: a 4 x 4 transposition, twice. */
INLINE void planes32(__m256 low, __m256 high, __m256i planes[4]) {
    __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i a = _mm256_shuffle_epi8(_mm256_castps_si256(low), order);
    __m256i b = _mm256_shuffle_epi8(_mm256_castps_si256(high), order);
    __m128i a0 = _mm256_castsi256_si128(a), a1 = _mm256_extracti128_si256(a, 1);
    __m128i b0 = _mm256_castsi256_si128(b), b1 = _mm256_extracti128_si256(b, 1);
    __m128i al = _mm_unpacklo_epi32(a0, a1), ah = _mm_unpackhi_epi32(a0, a1);
    __m128i bl = _mm_unpacklo_epi32(b0, b1), bh = _mm_unpackhi_epi32(b0, b1);
    planes[0] = plane(_mm_unpacklo_epi64(al, bl));
    planes[1] = plane(_mm_unpackhi_epi64(al, bl));
    planes[2] = plane(_mm_unpacklo_epi64(ah, bh));
    planes[3] = plane(_mm_unpackhi_epi64(ah, bh));
}

INLINE void put_pairs(char *to, __m256i first, __m256i second, int streaming) {
    put(to, _mm256_permute2x128_si256(first, second, 0x20), streaming);
    put(to + 32, _mm256_permute2x128_si256(first, second, 0x31), streaming);
}

INLINE void block_values(const nf4_tables *t, const uint8_t *packed, int64_t n, float scale,
                         void *out, int dtype, int streaming) {
    __m256 factor = _mm256_set1_ps(scale);
    __m256 low = _mm256_mul_ps(_mm256_loadu_ps(t->levels), factor);
    __m256 high = _mm256_mul_ps(_mm256_loadu_ps(t->levels + 8), factor);
    __m256i p[4];
    char *to = out;
    if (dtype != NF4_F32) {
        planes16(low, high, dtype, p);
        for (int64_t i = 0; i < n; i += 32, to += 64) {
            __m256i index = nibbles(packed + i / 2);
            __m256i b0 = _mm256_shuffle_epi8(p[0], index), b1 = _mm256_shuffle_epi8(p[1], index);
            put_pairs(to, _mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1), streaming);
        }
        return;
    }
    planes32(low, high, p);
    for (int64_t i = 0; i < n; i += 32, to += 128) {
        __m256i index = nibbles(packed + i / 2);
        __m256i b0 = _mm256_shuffle_epi8(p[0], index), b1 = _mm256_shuffle_epi8(p[1], index);
        __m256i b2 = _mm256_shuffle_epi8(p[2], index), b3 = _mm256_shuffle_epi8(p[3], index);
        __m256i l01 = _mm256_unpacklo_epi8(b0, b1), h01 = _mm256_unpackhi_epi8(b0, b1);
        __m256i l23 = _mm256_unpacklo_epi8(b2, b3), h23 = _mm256_unpackhi_epi8(b2, b3);
        __m256i v0 = _mm256_unpacklo_epi16(l01, l23), v1 = _mm256_unpackhi_epi16(l01, l23);
        __m256i v2 = _mm256_unpacklo_epi16(h01, h23), v3 = _mm256_unpackhi_epi16(h01, h23);
        put(to, _mm256_permute2x128_si256(v0, v1, 0x20), streaming);
        put(to + 32, _mm256_permute2x128_si256(v2, v3, 0x20), streaming);
        put(to + 64, _mm256_permute2x128_si256(v0, v1, 0x31), streaming);
        put(to + 96, _mm256_permute2x128_si256(v2, v3, 0x31), streaming);
    }
}

INLINE void block_widen(const void *x, int64_t n, int dtype, float *out) {
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, load8(x, i, dtype));
}

#include "nf4_body.h"
#endif
