/* Compare every instruction set with the scalar kernel, bit for bit, without Python.
 *
 * Usage: compare_kernels TABLES, where TABLES holds an `nf4_tables`. Meant for processors that the
 * developer does not have: cross-compile and run under an emulator. Buffers are allocated to the
 * byte, so that a sanitizer sees every step past an end.
 */
#include <stdio.h>
#include <stdlib.h>

#include "nf4.h"

int nf4_supported(int isa);
int nf4_quantize(const nf4_tables *t, int isa, int dtype, const void *x, int64_t count,
                 int64_t block_size, uint8_t *packed, float *absmax);
void nf4_dequantize(const nf4_tables *t, int isa, int dtype, const uint8_t *packed,
                    const float *scales, int64_t block_size, int64_t start, int64_t stop, void *out,
                    int streaming);
void nf4_dequantize_rows(const nf4_tables *t, int isa, int dtype, const uint8_t *packed,
                         const void *absmax, const float *nested_absmax, float offset,
                         int64_t block_size, int64_t start, int64_t stride, int64_t rows,
                         int64_t columns, void *out);
void nf4_multiply_rows(const nf4_tables *t, int isa, int dtype, const uint8_t *packed,
                       const void *absmax, const float *nested_absmax, float offset,
                       int64_t block_size, int64_t start, int64_t rows, int64_t columns,
                       const float *x, int64_t tokens, float *out, int64_t out_stride);
void nf4_error(const nf4_tables *t, int isa, int dtype, const void *x, const uint8_t *packed,
               const float *scales, int64_t block_size, int64_t start, int64_t stop, double *error,
               double *square);

static const char *const NAMES[] = {"scalar", "avx2", "avx512", "neon"};
static nf4_tables tables;
static int compared;
static uint64_t state = 88172645463325252u;

static uint32_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

/* Finite numbers: uniform, near a threshold, zero, tiny or huge. */
static float number(void) {
    uint32_t kind = next() % 16;
    float uniform = (float)(int32_t)next() * 0x1p-31f;
    if (kind < 4) return nf4_float(nf4_bits(tables.thresholds[next() % 15]) + next() % 5 - 2);
    if (kind == 4) return 0.0f * uniform;
    if (kind == 5) return uniform * 1e-38f;
    return uniform;
}

static void check(int same, const char *what, int isa, int dtype, int64_t block, int64_t count) {
    compared++;
    if (same) return;
    printf("%s: %s differs, dtype %d, block %lld, count %lld\n", NAMES[isa], what, dtype,
           (long long)block, (long long)count);
    exit(1);
}

static void *get(size_t bytes) {
    void *memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) exit(2);
    return memory;
}

static void compare(int isa, int dtype, int64_t block, int64_t count) {
    size_t size = nf4_size(dtype), half = (size_t)(count + 1) / 2;
    size_t blocks = (size_t)((count + block - 1) / block), chunks = (size_t)(count + 4095) / 4096;
    void *x = get((size_t)count * size), *out[2];
    uint8_t *packed[2];
    float *absmax[2];
    double *sums[2];
    float magnitude = next() % 8 ? 1.0f : dtype == NF4_F16 ? 6e4f : 3e38f;
    for (int64_t i = 0; i < count; i++) nf4_store(x, i, dtype, number() * magnitude);
    for (int k = 0; k < 2; k++) {
        packed[k] = get(half);
        absmax[k] = get(blocks * 4);
        sums[k] = get(chunks * 16);
        int which = k ? isa : NF4_SCALAR;
        check(nf4_quantize(&tables, which, dtype, x, count, block, packed[k], absmax[k]),
              "finiteness", which, dtype, block, count);
        nf4_error(&tables, which, dtype, x, packed[0], absmax[0], block, 0, count, sums[k],
                  sums[k] + chunks);
    }
    check(!memcmp(packed[0], packed[1], half), "codes", isa, dtype, block, count);
    check(!memcmp(absmax[0], absmax[1], blocks * 4), "absmax", isa, dtype, block, count);
    check(!memcmp(sums[0], sums[1], chunks * 16), "error", isa, dtype, block, count);
    for (int to = 0; to < NF4_DTYPES; to++)
        for (int part = 0; part < 3; part++) {
            int64_t start = part ? next() % count : 0;
            int64_t stop = part ? start + 1 + next() % (count - start) : count;
            size_t bytes = (size_t)(stop - start) * nf4_size(to);
            for (int k = 0; k < 2; k++) {
                out[k] = get(bytes);
                nf4_dequantize(&tables, k ? isa : NF4_SCALAR, to, packed[0],
                               absmax[0] + start / block, block, start, stop, out[k], part != 1);
            }
            check(!memcmp(out[0], out[1], bytes), "values", isa, to, block, count);
            free(out[0]);
            free(out[1]);
        }
    for (int to = 0; to < NF4_DTYPES; to++) {
        int64_t columns = 1 + next() % count, stride = columns + next() % 40;
        int64_t rows = 1 + (count - columns) / stride;
        int64_t start = next() % (count - (rows - 1) * stride - columns + 1);
        size_t bytes = (size_t)(rows * columns) * nf4_size(to), row = bytes / (size_t)rows;
        for (int k = 0; k < 2; k++) out[k] = get(bytes);
        nf4_dequantize_rows(&tables, isa, to, packed[0], absmax[0], NULL, 0, block, start, stride,
                            rows, columns, out[1]);
        for (int64_t r = 0; r < rows; r++)
            nf4_dequantize(&tables, NF4_SCALAR, to, packed[0],
                           absmax[0] + (start + r * stride) / block, block, start + r * stride,
                           start + r * stride + columns, (char *)out[0] + (size_t)r * row, 0);
        check(!memcmp(out[0], out[1], bytes), "rows", isa, to, block, count);
        free(out[0]);
        free(out[1]);
        int64_t tokens = 1 + next() % NF4_DOT_TOKENS;
        float *vectors = get((size_t)(tokens * columns) * 4);
        for (int64_t i = 0; i < tokens * columns; i++) vectors[i] = number();
        rows = (count - start) / columns;
        bytes = (size_t)(rows * tokens) * 4;
        for (int k = 0; k < 2; k++) {
            out[k] = get(bytes);
            nf4_multiply_rows(&tables, k ? isa : NF4_SCALAR, to, packed[0], absmax[0], NULL, 0,
                              block, start, rows, columns, vectors, tokens, out[k], rows);
        }
        check(!memcmp(out[0], out[1], bytes), "products", isa, to, block, count);
        free(vectors);
        free(out[0]);
        free(out[1]);
    }
    for (int k = 0; k < 2; k++) {
        free(packed[k]);
        free(absmax[k]);
        free(sums[k]);
    }
    nf4_store(x, next() % count, dtype, nf4_float(next() % 2 ? 0x7f800000 : 0xffc00000));
    packed[1] = get(half);
    absmax[1] = get(blocks * 4);
    check(!nf4_quantize(&tables, isa, dtype, x, count, block, packed[1], absmax[1]),
          "refusal of NaN and infinity", isa, dtype, block, count);
    free(packed[1]);
    free(absmax[1]);
    free(x);
}

int main(int argc, char **argv) {
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!file || fread(&tables, sizeof tables, 1, file) != 1) return 2;
    fclose(file);
    for (int isa = 0; isa < NF4_ISAS; isa++)
        for (int dtype = 0; nf4_supported(isa) && dtype < NF4_DTYPES; dtype++)
            for (int64_t block = 32; block <= 4096; block *= 2) {
                int64_t counts[] = {1, 2, 33, block - 1, block, block + 7, 4096, 9000, 16385};
                for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
                    compare(isa, dtype, block, counts[k]);
            }
    printf("compared %d", compared);
    for (int isa = 0; isa < NF4_ISAS; isa++)
        if (nf4_supported(isa)) printf(" %s", NAMES[isa]);
    puts("");
    return 0;
}
