/* Merging with what every machine of the compiler's target has (SSE2, NEON), and the exported
 * function: run-time dispatch. */
#include "nf4.h"

#define TARGET
#define LANES 4
#define ISA(name) name##_scalar

#include "merge_body.h"

EXPORT void merge_tile(int isa, int from, int to, merge_job *job) {
    const merge_ops *ops = &merge_ops_scalar;
#ifdef NF4_X86
    if (isa == NF4_AVX2 || isa == NF4_AVX512) ops = &merge_ops_avx2;
#endif
    (void)isa; /* on ARM the compiler's own target has NEON */
    ops->merge[from][to](job);
}
