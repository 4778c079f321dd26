/* The interval code on every machine: four lanes, which compilers turn into SSE2, NEON or none. */
#include "interval.h"

#define TARGET
#define ISA(name) name##_scalar
#define LANES 4
#define INLINE static inline __attribute__((always_inline))

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
