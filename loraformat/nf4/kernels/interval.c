/* The interval code on every machine: four lanes, which compilers turn into SSE2, NEON or none; and
 * the exported functions: run-time dispatch. */
#include "interval.h"

#define TARGET
#define ISA(name) name##_scalar
#define LANES 4

#include "interval_body.h"

INLINE floats widen_halves(ints bits) {
    floats x;
    for (int k = 0; k < LANES; k++) x[k] = nf4_half_to_float((uint16_t)bits[k]);
    return x;
}

INLINE ints narrow_halves(floats x) {
    ints bits;
    for (int k = 0; k < LANES; k++) bits[k] = nf4_float_to_half(x[k]);
    return bits;
}

INLINE uint32_t negative_lanes(ints mask) {
    uint32_t lanes = 0;
    for (int k = 0; k < LANES; k++) lanes |= (uint32_t)(mask[k] < 0) << k;
    return lanes;
}

static const interval_ops *ops(int isa) {
#ifdef NF4_X86
    if (isa == NF4_AVX2) return &interval_ops_avx2;
    if (isa == NF4_AVX512) return &interval_ops_avx512;
#endif
    (void)isa; /* on ARM, four lanes are what NEON has */
    return &interval_ops_scalar;
}

EXPORT int interval_encode(int isa, int from, int to, interval_tile *tile) {
    return ops(isa)->encode[from][to](tile);
}

EXPORT int interval_decode(int isa, int from, int to, interval_tile *tile) {
    return ops(isa)->decode[from][to](tile);
}
