/* The interval code with AVX2 and F16C: eight lanes. */
#include "interval.h"
#ifdef NF4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define ISA(name) name##_avx2
#define LANES 8

#include "interval_body.h"

INLINE floats widen_halves(ints bits) {
    __m256i b = (__m256i)bits;
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    return (floats)_mm256_cvtph_ps(h);
}

INLINE ints narrow_halves(floats x) {
    return (ints)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE uint32_t negative_lanes(ints mask) {
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
}
#endif
