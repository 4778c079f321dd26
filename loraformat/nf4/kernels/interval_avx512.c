/* The interval code with AVX-512 (F, BW): sixteen lanes. */
#include "interval.h"
#ifdef NF4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw")))
#define ISA(name) name##_avx512
#define LANES 16

#include "interval_body.h"

INLINE floats widen_halves(ints bits) {
    return (floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
}

INLINE ints narrow_halves(floats x) {
    return (ints)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE uint32_t negative_lanes(ints mask) {
    return _mm512_cmplt_epi32_mask((__m512i)mask, _mm512_setzero_si512());
}
#endif
