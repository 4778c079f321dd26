/* NF4 in plain C: every machine, and the ends of ranges for the vector kernels. */
#include "nf4.h"

#define TARGET
#define ISA(name) name##_scalar
#define LANES 2

INLINE void streaming_fence(void) {}

INLINE uint32_t block_absmax(const void *x, int64_t n, int dtype) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = nf4_bits(nf4_load(x, i, dtype)) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

INLINE void block_codes(const nf4_tables *t, const void *x, int64_t n, int dtype, float inverse,
                        uint8_t *packed) {
    for (int64_t i = 0; i < n; i += 2) {
        int high = nf4_code(t, nf4_load(x, i, dtype) * inverse);
        int low = nf4_code(t, nf4_load(x, i + 1, dtype) * inverse);
        packed[i / 2] = (uint8_t)(high << 4 | low);
    }
}

/* 16 products per block, then look-ups: no multiplication and no rounding per element. Taking the
 * codes from a word keeps compilers from vectorizing the look-ups, which is slower. */
INLINE void block_values(const nf4_tables *t, const uint8_t *packed, int64_t n, float scale,
                         void *out, int dtype, int streaming) {
    char table[16 * 4], *to = out;
    const int64_t size = (int64_t)nf4_size(dtype);
    (void)streaming;
    for (int k = 0; k < 16; k++) nf4_store(table, k, dtype, t->levels[k] * scale);
    for (int64_t i = 0; i < n / 2; i += 4) {
        uint32_t word = packed[i] | (uint32_t)packed[i + 1] << 8 | (uint32_t)packed[i + 2] << 16 |
                        (uint32_t)packed[i + 3] << 24;
        for (int byte = 0; byte < 4; byte++, word >>= 8, to += 2 * size) {
            memcpy(to, table + size * (word >> 4 & 15), (size_t)size);
            memcpy(to + size, table + size * (word & 15), (size_t)size);
        }
    }
}

INLINE void block_widen(const void *x, int64_t n, int dtype, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = nf4_load(x, i, dtype);
}

#include "nf4_body.h"
