/* The exported functions of the interval code: run-time dispatch. */
#include "interval.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Raised whenever interval_tile or a signature changes: interval_native.py refuses another. */
EXPORT int interval_interface(void) { return 1; }

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
