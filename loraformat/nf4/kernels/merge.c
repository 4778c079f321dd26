/* The exported function of merging: run-time dispatch. */
#include "merge.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Raised whenever merge_job or a signature changes: merge_tile.py refuses another. */
EXPORT int merge_interface(void) { return 1; }

EXPORT void merge_tile(int isa, int from, int to, merge_job *job) {
    const merge_ops *ops = &merge_ops_scalar;
#ifdef NF4_X86
    if (isa == NF4_AVX2 || isa == NF4_AVX512) ops = &merge_ops_avx2;
#endif
    (void)isa; /* on ARM the compiler's own target has NEON */
    ops->merge[from][to](job);
}
