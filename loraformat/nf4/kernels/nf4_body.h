/* The loops around the vector code, compiled once per instruction set.
 *
 * The including file defines TARGET (a function attribute), ISA(name), and four primitives for n
 * elements, n a multiple of 32, `dtype` a constant after inlining:
 *   block_absmax  bits of max |x|; NaN and infinity stay above 0x7f7fffff
 *   block_codes   x * inv -> packed codes
 *   block_values  packed codes -> level * scale, rounded to dtype
 *   block_widen   x -> float
 * and LANES, the doubles in a vector register.
 */

INLINE int64_t quantize_any(const nf4_tables *t, const void *x, int64_t blocks,
                            int64_t block_size, uint8_t *packed, float *absmax, int dtype) {
    const char *block = x;
    for (int64_t b = 0; b < blocks; b++) {
        uint32_t bits = block_absmax(block, block_size, dtype);
        if (bits >= 0x7f800000) return b;
        float largest = nf4_float(bits);
        float inverse = 1.0f / (largest < NF4_TINY ? NF4_TINY : largest);
        nf4_store(absmax, b, NF4_F32, largest);
        block_codes(t, block, block_size, dtype, inverse, packed);
        block += block_size * (int64_t)nf4_size(dtype);
        packed += block_size / 2;
    }
    return -1;
}

/* Part of one block, wherever it starts: only the two ends of a range come here. */
INLINE void part_values(const nf4_tables *t, const uint8_t *packed, float scale, int64_t start,
                        int64_t stop, void *out, int dtype) {
    for (int64_t i = start; i < stop; i++) {
        int code = i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4;
        nf4_store(out, i - start, dtype, t->levels[code] * scale);
    }
}

INLINE void dequantize_any(const nf4_tables *t, const uint8_t *packed, const float *scales,
                           int64_t block_size, int64_t start, int64_t stop, void *out,
                           int dtype, int streaming) {
    char *to = out;
    for (int64_t i = start, end, block = 0; i < stop; i = end, block++) {
        end = (i | (block_size - 1)) + 1;
        if (end > stop) end = stop;
        float scale = nf4_load(scales, block, NF4_F32);
        if (end - i == block_size)
            block_values(t, packed + i / 2, block_size, scale, to, dtype, streaming);
        else
            part_values(t, packed, scale, i, end, to, dtype);
        to += (end - i) * (int64_t)nf4_size(dtype);
    }
}

typedef double wide_vector __attribute__((vector_size(8 * LANES)));
typedef float float_vector __attribute__((vector_size(4 * LANES)));

/* 16 lanes, element i in lane i % 16: the squares of four neighbours in a lane in pairs, these sums
 * in order; then the lanes folded in halves. The difference is rounded to float, so that every
 * square is exact in double. */
INLINE void sum_squares(const float *x, const float *value, int64_t n, double *error,
                        double *square) {
    wide_vector e[16 / LANES] = {{0}}, s[16 / LANES] = {{0}};
    for (int64_t i = 0; i < n; i += 64)
        for (int k = 0; k < 16 / LANES; k++) {
            wide_vector d[4], w[4];
            for (int row = 0; row < 4; row++) {
                float_vector from, to;
                memcpy(&from, x + i + 16 * row + LANES * k, sizeof from);
                memcpy(&to, value + i + 16 * row + LANES * k, sizeof to);
                d[row] = __builtin_convertvector(from - to, wide_vector);
                w[row] = __builtin_convertvector(from, wide_vector);
            }
            e[k] += (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]);
            s[k] += (w[0] * w[0] + w[1] * w[1]) + (w[2] * w[2] + w[3] * w[3]);
        }
    double sums[2][16];
    memcpy(sums[0], e, sizeof e);
    memcpy(sums[1], s, sizeof s);
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) {
            sums[0][j] += sums[0][j + half];
            sums[1][j] += sums[1][j + half];
        }
    *error = sums[0][0];
    *square = sums[1][0];
}

INLINE void error_any(const nf4_tables *t, const void *x, const uint8_t *packed,
                      const float *scales, int64_t block_size, int64_t start, int64_t stop,
                      double *error, double *square, int dtype) {
    float wide[NF4_ERROR_CHUNK], value[NF4_ERROR_CHUNK];
    for (int64_t i = start, chunk = 0; i < stop; i += NF4_ERROR_CHUNK, chunk++) {
        int64_t n = stop - i < NF4_ERROR_CHUNK ? stop - i : NF4_ERROR_CHUNK, whole = n & ~31LL;
        const char *from = (const char *)x + (i - start) * (int64_t)nf4_size(dtype);
        block_widen(from, whole, dtype, wide);
        for (int64_t j = whole; j < n; j++) wide[j] = nf4_load(from, j, dtype);
        dequantize_any(t, packed, scales + (i - start) / block_size, block_size, i, i + n, value,
                       NF4_F32, 0);
        for (; n & 63; n++) wide[n] = value[n] = 0;
        sum_squares(wide, value, n, error + chunk, square + chunk);
    }
}

typedef float dot_vector __attribute__((vector_size(8 * LANES)));

/* Adds value * x of elements [start, stop), at most NF4_DOT_CHUNK, to NF4_DOT_LANES sums for each of
 * some tokens, element i (from start) in lane i % NF4_DOT_LANES; rows of x are x_stride apart. */
INLINE void dot_any(const nf4_tables *t, const uint8_t *packed, const float *scales,
                    int64_t block_size, int64_t start, int64_t stop, const float *x,
                    int64_t x_stride, int64_t tokens, float *sums, int dtype) {
    char narrow[2 * NF4_DOT_CHUNK];
    float value[NF4_DOT_CHUNK], rest[NF4_DOT_LANES];
    int64_t n = stop - start, whole = n & ~(int64_t)(NF4_DOT_LANES - 1);
    void *decoded = dtype == NF4_F32 ? (void *)value : (void *)narrow;
    dequantize_any(t, packed, scales, block_size, start, stop, decoded, dtype, 0);
    if (dtype != NF4_F32) {
        block_widen(narrow, whole, dtype, value);
        for (int64_t i = whole; i < n; i++) value[i] = nf4_load(narrow, i, dtype);
    }
    for (int64_t i = n; i & (NF4_DOT_LANES - 1); i++) value[i] = 0;
    for (int64_t token = 0; token < tokens; token++, x += x_stride, sums += NF4_DOT_LANES) {
        dot_vector s[NF4_DOT_LANES / (2 * LANES)];
        memcpy(s, sums, sizeof s);
        for (int k = 0; k < NF4_DOT_LANES; k++) rest[k] = whole + k < n ? x[whole + k] : 0;
        for (int64_t i = 0; i < n; i += NF4_DOT_LANES) {
            const float *from = i < whole ? x + i : rest;
            for (int k = 0; k < NF4_DOT_LANES / (2 * LANES); k++) {
                dot_vector a, b;
                memcpy(&a, value + i + 2 * LANES * k, sizeof a);
                memcpy(&b, from + 2 * LANES * k, sizeof b);
                s[k] += a * b;
            }
        }
        memcpy(sums, s, sizeof s);
    }
}

#define NF4_DEFINE(suffix, dtype)                                                                  \
    static TARGET int64_t quantize_##suffix(const nf4_tables *t, const void *x, int64_t blocks,    \
                                            int64_t block_size, uint8_t *packed, float *absmax) {  \
        if (block_size == 64) return quantize_any(t, x, blocks, 64, packed, absmax, dtype);        \
        return quantize_any(t, x, blocks, block_size, packed, absmax, dtype);                      \
    }                                                                                              \
    static TARGET void dequantize_##suffix(const nf4_tables *t, const uint8_t *packed,             \
                                           const float *scales, int64_t block_size, int64_t start, \
                                           int64_t stop, void *out, int streaming) {               \
        /* streaming stores want aligned lines; every whole block then starts on one */            \
        int64_t head = -start & (block_size - 1);                                                  \
        uintptr_t first = (uintptr_t)out + (uintptr_t)head * nf4_size(dtype);                      \
        if (streaming && first % 64 == 0) {                                                        \
            dequantize_any(t, packed, scales, block_size, start, stop, out, dtype, 1);             \
            streaming_fence();                                                                     \
        } else if (block_size == 64) {                                                             \
            dequantize_any(t, packed, scales, 64, start, stop, out, dtype, 0);                     \
        } else {                                                                                   \
            dequantize_any(t, packed, scales, block_size, start, stop, out, dtype, 0);             \
        }                                                                                          \
    }                                                                                              \
    static TARGET void error_##suffix(const nf4_tables *t, const void *x, const uint8_t *packed,   \
                                      const float *scales, int64_t block_size, int64_t start,      \
                                      int64_t stop, double *error, double *square) {               \
        error_any(t, x, packed, scales, block_size, start, stop, error, square, dtype);            \
    }                                                                                              \
    static TARGET void dot_##suffix(const nf4_tables *t, const uint8_t *packed,                    \
                                    const float *scales, int64_t block_size, int64_t start,        \
                                    int64_t stop, const float *x, int64_t x_stride,                \
                                    int64_t tokens, float *sums) {                                 \
        if (block_size == 64)                                                                      \
            dot_any(t, packed, scales, 64, start, stop, x, x_stride, tokens, sums, dtype);         \
        else                                                                                       \
            dot_any(t, packed, scales, block_size, start, stop, x, x_stride, tokens, sums, dtype); \
    }

NF4_DEFINE(f32, NF4_F32)
NF4_DEFINE(f16, NF4_F16)
NF4_DEFINE(bf16, NF4_BF16)

const nf4_ops ISA(nf4_ops) = {
    {quantize_f32, quantize_f16, quantize_bf16},
    {dequantize_f32, dequantize_f16, dequantize_bf16},
    {error_f32, error_f16, error_bf16},
    {dot_f32, dot_f16, dot_bf16},
};
