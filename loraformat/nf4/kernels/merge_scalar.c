/* Merging with what every machine of the compiler's target has: SSE2, NEON. */
#include "nf4.h"

#define LANES 4
#define ISA(name) name##_scalar
#define INLINE static inline __attribute__((always_inline))
#define FUNCTION static void

#include "merge_body.h"
