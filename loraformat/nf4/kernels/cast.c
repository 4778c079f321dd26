/* float16 to float32 and back, to nearest even; NaN stays NaN. */
#include "nf4.h"

#ifdef NF4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))

TARGET static int64_t widen_eights(const uint16_t *x, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    return i;
}

TARGET static int64_t narrow_eights(const float *x, uint16_t *out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return i;
}
#endif

EXPORT void cast_half_to_float(int isa, const uint16_t *x, float *out, int64_t n) {
    int64_t i = 0;
#ifdef NF4_X86
    if (isa == NF4_AVX2 || isa == NF4_AVX512) i = widen_eights(x, out, n);
#endif
    (void)isa;
    for (; i < n; i++) out[i] = nf4_half_to_float(x[i]);
}

EXPORT void cast_float_to_half(int isa, const float *x, uint16_t *out, int64_t n) {
    int64_t i = 0;
#ifdef NF4_X86
    if (isa == NF4_AVX2 || isa == NF4_AVX512) i = narrow_eights(x, out, n);
#endif
    (void)isa;
    for (; i < n; i++) out[i] = nf4_float_to_half(x[i]);
}
