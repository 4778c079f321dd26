/* Merging with AVX2 and F16C. */
#include "nf4.h"
#ifdef NF4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))
#define LANES 8
#define ISA(name) name##_avx2
#define LOAD_HALVES(halves) (floats)_mm256_cvtph_ps((__m128i)halves)
#define STORE_HALVES(values) (shorts)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT)

#include "merge_body.h"
#endif
