/* The exported functions: run-time dispatch, the tail block, and the codec of the scales. */
#include "nf4.h"

/* Raised whenever a signature or structure of this library changes: native.py refuses another. */
EXPORT int nf4_interface(void) { return 3; }

EXPORT int nf4_supported(int isa) {
    if (isa == NF4_SCALAR) return 1;
#ifdef NF4_X86
    if (isa == NF4_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (isa == NF4_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#endif
#ifdef NF4_ARM
    if (isa == NF4_NEON) return 1;
#endif
    return 0;
}

static const nf4_ops *ops(int isa) {
#ifdef NF4_X86
    if (isa == NF4_AVX2) return &nf4_ops_avx2;
    if (isa == NF4_AVX512) return &nf4_ops_avx512;
#endif
#ifdef NF4_ARM
    if (isa == NF4_NEON) return &nf4_ops_neon;
#endif
    (void)isa;
    return &nf4_ops_scalar;
}

/* The incomplete last block divides where whole blocks multiply by the reciprocal, and stores an
 * absmax of at least NF4_TINY, as bitsandbytes does. */
static int quantize_tail(const nf4_tables *t, int dtype, const void *x, int64_t n, uint8_t *packed,
                         float *absmax) {
    uint32_t bits = nf4_bits(NF4_TINY);
    for (int64_t i = 0; i < n; i++) {
        uint32_t b = nf4_bits(nf4_load(x, i, dtype)) & 0x7fffffff;
        bits = b > bits ? b : bits;
    }
    if (bits >= 0x7f800000) return 0;
    float largest = nf4_float(bits);
    nf4_store(absmax, 0, NF4_F32, largest);
    for (int64_t i = 0; i < n; i += 2) {
        int high = nf4_code(t, nf4_load(x, i, dtype) / largest);
        int low = i + 1 < n ? nf4_code(t, nf4_load(x, i + 1, dtype) / largest) : 7;
        packed[i / 2] = (uint8_t)(high << 4 | low);
    }
    return 1;
}

/* x[count] -> packed codes and one absmax per block; 0 when a value is not finite. */
EXPORT int nf4_quantize(const nf4_tables *t, int isa, int dtype, const void *x, int64_t count,
                        int64_t block_size, uint8_t *packed, float *absmax) {
    int64_t blocks = count / block_size, done = blocks * block_size;
    if (ops(isa)->quantize[dtype](t, x, blocks, block_size, packed, absmax) >= 0) return 0;
    if (done == count) return 1;
    return quantize_tail(t, dtype, (const char *)x + done * (int64_t)nf4_size(dtype), count - done,
                         packed + done / 2, absmax + blocks);
}

EXPORT void nf4_dequantize(const nf4_tables *t, int isa, int dtype, const uint8_t *packed,
                           const float *scales, int64_t block_size, int64_t start, int64_t stop,
                           void *out, int streaming) {
    ops(isa)->dequantize[dtype](t, packed, scales, block_size, start, stop, out, streaming);
}

EXPORT void nf4_error(const nf4_tables *t, int isa, int dtype, const void *x, const uint8_t *packed,
                      const float *scales, int64_t block_size, int64_t start, int64_t stop,
                      double *error, double *square) {
    ops(isa)->error[dtype](t, x, packed, scales, block_size, start, stop, error, square);
}

/* Sums of 256 absmax each, folded in halves (128 + 128, 64 + 64, ...), absent ones zero. */
EXPORT void nf4_sum_scales(const float *absmax, int64_t blocks, double *sums) {
    for (int64_t b = 0; b < blocks; b += NF4_NESTED_BLOCK) {
        double s[NF4_NESTED_BLOCK] = {0};
        int64_t n = blocks - b < NF4_NESTED_BLOCK ? blocks - b : NF4_NESTED_BLOCK;
        for (int64_t i = 0; i < n; i++) s[i] = nf4_load(absmax, b + i, NF4_F32);
        for (int half = NF4_NESTED_BLOCK / 2; half; half /= 2)
            for (int i = 0; i < half; i++) s[i] += s[i + half];
        *sums++ = s[0];
    }
}

/* absmax - offset -> 8-bit codes of the nearest map entry, and one absmax per 256 of them. */
EXPORT void nf4_quantize_scales(const nf4_tables *t, const float *absmax, float offset,
                                int64_t blocks, uint8_t *codes, float *nested_absmax) {
    for (int64_t b = 0; b < blocks; b += NF4_NESTED_BLOCK) {
        float d[NF4_NESTED_BLOCK];
        int32_t bits = 0; /* magnitudes compare as integers, which the compiler can vectorize */
        int64_t n = blocks - b < NF4_NESTED_BLOCK ? blocks - b : NF4_NESTED_BLOCK;
        for (int64_t i = 0; i < n; i++) {
            d[i] = nf4_load(absmax, b + i, NF4_F32) - offset;
            int32_t magnitude = (int32_t)(nf4_bits(d[i]) & 0x7fffffff);
            bits = magnitude > bits ? magnitude : bits;
        }
        float largest = nf4_float((uint32_t)bits);
        nf4_store(nested_absmax++, 0, NF4_F32, largest);
        if (largest < NF4_TINY) largest = NF4_TINY;
        float inverse = 1.0f / largest;
        for (int64_t i = 0; i < n; i++) {
            float s = n == NF4_NESTED_BLOCK ? d[i] * inverse : d[i] / largest;
            int base = t->nested_base[nf4_bits(s) >> 17];
            *codes++ = (uint8_t)(base + (s > t->nested_bounds[base]));
        }
    }
}

/* The decoded absmax of blocks [start, stop): product rounded, then sum rounded. */
EXPORT void nf4_decode_scales(const nf4_tables *t, const uint8_t *codes, const float *nested_absmax,
                              float offset, int64_t start, int64_t stop, float *out) {
    for (int64_t i = start, end; i < stop; i = end) {
        end = (i | (NF4_NESTED_BLOCK - 1)) + 1;
        if (end > stop) end = stop;
        float nested = nf4_load(nested_absmax, i / NF4_NESTED_BLOCK, NF4_F32);
        for (int64_t j = i; j < end; j++) {
            float product = t->nested_map[codes[j]] * nested;
            nf4_store(out, j - start, NF4_F32, product + offset);
        }
    }
}

typedef struct {
    const nf4_tables *t;
    const void *absmax; /* float scales; codes with nested_absmax */
    const float *nested_absmax;
    float offset;
    int64_t block_size;
} scale_source;

/* The scales of the blocks that hold elements [start, stop), maybe decoded into a buffer. */
static const float *scales_of(const scale_source *from, int64_t start, int64_t stop, float *buffer) {
    int64_t block = start / from->block_size;
    if (!from->nested_absmax) return (const float *)from->absmax + block;
    nf4_decode_scales(from->t, from->absmax, from->nested_absmax, from->offset, block,
                      (stop - 1) / from->block_size + 1, buffer);
    return buffer;
}

/* Where the blocks end of which so many scales, or `most` elements, from `start` on are needed. */
static int64_t end_of_part(int64_t start, int64_t stop, int64_t block_size, int64_t most) {
    int64_t end = (start / block_size + NF4_SCALES_AT_ONCE) * block_size;
    if (end > start + most) end = start + most;
    return end > stop ? stop : end;
}

/* Some columns of a matrix's rows, one row of `out` for each: elements start + r * stride on. Scales
 * are decoded on the way, a few at a time; without nested_absmax `absmax` holds them as floats. */
EXPORT void nf4_dequantize_rows(const nf4_tables *t, int isa, int dtype, const uint8_t *packed,
                                const void *absmax, const float *nested_absmax, float offset,
                                int64_t block_size, int64_t start, int64_t stride, int64_t rows,
                                int64_t columns, void *out) {
    const scale_source from = {t, absmax, nested_absmax, offset, block_size};
    float buffer[NF4_SCALES_AT_ONCE];
    char *to = out;
    if (columns == stride) {
        columns *= rows;
        rows = columns > 0;
    }
    int64_t ahead = NF4_ROWS_AHEAD * stride;
    for (int64_t row = 0; row < rows; row++) {
        int64_t first = start + row * stride, last = first + columns;
        /* A processor foresees the next bytes, not the next row. Rows often lie some 4 KiB apart and
         * compete for the same lines of the first cache: they come into the second. */
        if (row + NF4_ROWS_AHEAD < rows)
            for (int64_t i = first; i < last; i += 2 * NF4_CACHE_LINE)
                __builtin_prefetch(packed + (ahead + i) / 2, 0, 2);
        for (int64_t i = first, end; i < last; i = end) {
            end = end_of_part(i, last, block_size, last - i);
            const float *scales = scales_of(&from, i, end, buffer);
            ops(isa)->dequantize[dtype](t, packed, scales, block_size, i, end, to, 0);
            to += (end - i) * (int64_t)nf4_size(dtype);
        }
    }
}

/* out[token][row] = the sum of value * x[token] over a row of a matrix, for at most NF4_DOT_TOKENS
 * tokens: values rounded to dtype, products and sums float, in lanes that are folded in halves. */
EXPORT void nf4_multiply_rows(const nf4_tables *t, int isa, int dtype, const uint8_t *packed,
                              const void *absmax, const float *nested_absmax, float offset,
                              int64_t block_size, int64_t start, int64_t rows, int64_t columns,
                              const float *x, int64_t tokens, float *out, int64_t out_stride) {
    const scale_source from = {t, absmax, nested_absmax, offset, block_size};
    float buffer[NF4_SCALES_AT_ONCE];
    for (int64_t row = 0; row < rows; row++, start += columns) {
        float sums[NF4_DOT_TOKENS * NF4_DOT_LANES] = {0};
        for (int64_t i = start, end; i < start + columns; i = end) {
            end = end_of_part(i, start + columns, block_size, NF4_DOT_CHUNK);
            const float *scales = scales_of(&from, i, end, buffer);
            ops(isa)->dot[dtype](t, packed, scales, block_size, i, end, x + (i - start), columns,
                                 tokens, sums);
        }
        for (int64_t token = 0; token < tokens; token++) {
            float *s = sums + token * NF4_DOT_LANES;
            for (int half = NF4_DOT_LANES / 2; half; half /= 2)
                for (int k = 0; k < half; k++) s[k] += s[k + half];
            out[token * out_stride + row] = s[0];
        }
    }
}
