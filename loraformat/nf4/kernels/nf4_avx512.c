/* NF4 with AVX-512 (F, BW): 16 elements at a time, tables held in registers. */
#include "nf4.h"
#ifdef NF4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw")))
#define ISA(name) name##_avx512
#define LANES 8

INLINE void streaming_fence(void) { _mm_sfence(); }

INLINE __m512 load16(const void *x, int64_t i, int dtype) {
    if (dtype == NF4_F32) return _mm512_loadu_ps((const char *)x + 4 * i);
    __m256i h = _mm256_loadu_si256((const __m256i *)((const char *)x + 2 * i));
    if (dtype == NF4_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

INLINE uint32_t block_absmax(const void *x, int64_t n, int dtype) {
    __m512i sign = _mm512_set1_epi32(0x7fffffff), largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        __m512i bits = _mm512_castps_si512(load16(x, i, dtype));
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, sign));
    }
    return _mm512_reduce_max_epu32(largest);
}

INLINE __m512i codes16(const nf4_tables *t, __m512 s) {
    __m512 half = _mm512_set1_ps(15.5f);
    __m512i bin = _mm512_cvttps_epi32(_mm512_fmadd_ps(s, half, half));
    __m512 threshold = _mm512_permutex2var_ps(_mm512_loadu_ps(t->bin_threshold), bin,
                                              _mm512_loadu_ps(t->bin_threshold + 16));
    __m512i code = _mm512_permutex2var_epi32(_mm512_loadu_si512(t->bin_code), bin,
                                             _mm512_loadu_si512(t->bin_code + 16));
    __mmask16 above = _mm512_cmp_ps_mask(s, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
}

INLINE void block_codes(const nf4_tables *t, const void *x, int64_t n, int dtype, float inverse,
                        uint8_t *packed) {
    __m512 scale = _mm512_set1_ps(inverse);
    for (int64_t i = 0; i < n; i += 16) {
        __m512i code = codes16(t, _mm512_mul_ps(load16(x, i, dtype), scale));
        /* a 64-bit lane holds (low: first, high: second) of a pair */
        __m512i pair = _mm512_or_si512(_mm512_slli_epi32(code, 4), _mm512_srli_epi64(code, 32));
        _mm_storel_epi64((__m128i *)(packed + i / 2), _mm512_cvtepi64_epi8(pair));
    }
}

INLINE void put(void *to, __m512i value, int streaming) {
    if (streaming)
        _mm512_stream_si512(to, value);
    else
        _mm512_storeu_si512(to, value);
}

/* The 16 products rounded to 16 bits, twice: the look-up then ignores the fifth index bit. */
INLINE __m512i table16(__m512 product, int dtype) {
    __m256i half;
    if (dtype == NF4_F16) {
        half = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        __m512i u = _mm512_castps_si512(product);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
        __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
    }
    return _mm512_broadcast_i64x4(half);
}

INLINE void block_values(const nf4_tables *t, const uint8_t *packed, int64_t n, float scale,
                         void *out, int dtype, int streaming) {
    __m512 product = _mm512_mul_ps(_mm512_loadu_ps(t->levels), _mm512_set1_ps(scale));
    if (dtype == NF4_F32) {
        for (int64_t i = 0; i < n; i += 16) {
            __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
            __m512 value = _mm512_permutexvar_ps(index, product);
            put((float *)out + i, _mm512_castps_si512(value), streaming);
        }
        return;
    }
    __m512i table = table16(product, dtype);
    for (int64_t i = 0; i < n; i += 32) {
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        put((uint16_t *)out + i, _mm512_permutexvar_epi16(index, table), streaming);
    }
}

INLINE void block_widen(const void *x, int64_t n, int dtype, float *out) {
    for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(out + i, load16(x, i, dtype));
}

#include "nf4_body.h"
#endif
