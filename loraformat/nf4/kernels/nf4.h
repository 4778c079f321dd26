/* Shared by every NF4 kernel: element types, tables, and bit-exact scalar conversions.
 *
 * The numbers come from Python through `nf4_tables`, so that there is one copy of them. Input pointers may have any alignment: they come from memory-mapped files.
 */
#ifndef LORAFORMAT_NF4_H
#define LORAFORMAT_NF4_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Of one instruction set, whose file defines TARGET, a function attribute. */
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { NF4_F32 = 0, NF4_F16 = 1, NF4_BF16 = 2, NF4_DTYPES = 3 };
enum { NF4_SCALAR = 0, NF4_AVX2 = 1, NF4_AVX512 = 2, NF4_NEON = 3, NF4_ISAS = 4 };

#define NF4_NESTED_BLOCK 256
#define NF4_ERROR_CHUNK 4096
#define NF4_SCALES_AT_ONCE 64
#define NF4_DOT_CHUNK 4096
#define NF4_DOT_LANES 32
#define NF4_DOT_TOKENS 4 /* at most, at once */
#define NF4_ROWS_AHEAD 8
#define NF4_CACHE_LINE 64 /* bytes */
#define NF4_TINY 1e-38f /* the least absmax that a block is divided by */

/* Mirrored by native.Tables; what each table is: tables.py. */
typedef struct {
    float levels[16];
    float bin_threshold[32]; /* the threshold inside each of 32 equal bins of [-1, 1], or +inf */
    int32_t bin_code[32];    /* thresholds below that bin */
    float thresholds[16];    /* 15 midpoints, then +inf */
    float nested_map[256];
    float nested_bounds[256];    /* 255 midpoints, then +inf */
    uint8_t nested_base[32768];  /* bounds below all floats that share their 15 leading bits */
} nf4_tables;

/* Quantize whole blocks; the index of the first block that holds a non-finite value, or -1. */
typedef int64_t (*nf4_quantize_fn)(const nf4_tables *t, const void *x, int64_t blocks,
                                   int64_t block_size, uint8_t *packed, float *absmax);
/* Elements [start, stop) into out[0 ...]; scales[0] belongs to the block that holds `start`. */
typedef void (*nf4_dequantize_fn)(const nf4_tables *t, const uint8_t *packed, const float *scales,
                                  int64_t block_size, int64_t start, int64_t stop, void *out,
                                  int streaming);
/* Per chunk of 4096 elements: the sums of (x - value)^2 and of x^2. `start` begins a chunk. */
typedef void (*nf4_error_fn)(const nf4_tables *t, const void *x, const uint8_t *packed,
                             const float *scales, int64_t block_size, int64_t start, int64_t stop,
                             double *error, double *square);

/* value * x of elements [start, stop), added to NF4_DOT_LANES sums for each token. */
typedef void (*nf4_dot_fn)(const nf4_tables *t, const uint8_t *packed, const float *scales,
                           int64_t block_size, int64_t start, int64_t stop, const float *x,
                           int64_t x_stride, int64_t tokens, float *sums);

typedef struct {
    nf4_quantize_fn quantize[NF4_DTYPES];
    nf4_dequantize_fn dequantize[NF4_DTYPES];
    nf4_error_fn error[NF4_DTYPES];
    nf4_dot_fn dot[NF4_DTYPES];
} nf4_ops;

extern const nf4_ops nf4_ops_scalar;
#if defined(__x86_64__) || defined(_M_X64)
#define NF4_X86 1
extern const nf4_ops nf4_ops_avx2;
extern const nf4_ops nf4_ops_avx512;
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#define NF4_ARM 1
extern const nf4_ops nf4_ops_neon;
#endif

static inline float nf4_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint32_t nf4_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float nf4_half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return nf4_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return nf4_float(sign | ((rest << 13) + 0x38000000));
    return nf4_float(sign | nf4_bits((float)rest * 0x1p-24f));
}

/* Round to nearest even. */
static inline uint16_t nf4_float_to_half(float f) {
    uint32_t u = nf4_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (u >> 13 & 0x3ff));
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000) /* subnormal: adding 0.5 puts the last bit kept at 2^-24 */
        return (uint16_t)(sign | (nf4_bits(nf4_float(u) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((u + 0xc8000fff + (u >> 13 & 1)) >> 13));
}

/* Round to nearest even. */
static inline uint16_t nf4_float_to_bf16(float f) {
    uint32_t u = nf4_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline size_t nf4_size(int dtype) { return dtype == NF4_F32 ? 4 : 2; }

static inline float nf4_load(const void *x, int64_t i, int dtype) {
    uint16_t h;
    float f;
    if (dtype == NF4_F32) {
        memcpy(&f, (const char *)x + 4 * i, 4);
        return f;
    }
    memcpy(&h, (const char *)x + 2 * i, 2);
    return dtype == NF4_F16 ? nf4_half_to_float(h) : nf4_float((uint32_t)h << 16);
}

static inline void nf4_store(void *out, int64_t i, int dtype, float value) {
    uint16_t h;
    if (dtype == NF4_F32) {
        memcpy((char *)out + 4 * i, &value, 4);
        return;
    }
    h = dtype == NF4_F16 ? nf4_float_to_half(value) : nf4_float_to_bf16(value);
    memcpy((char *)out + 2 * i, &h, 2);
}

/* The code of a normalized value: thresholds below it (a tie goes to the lower code). The
 * thresholds lie further apart than the bins are wide and 1e-3 away from a bin edge, so one
 * comparison decides, and rounding in the choice of the bin cannot matter. */
static inline int nf4_code(const nf4_tables *t, float s) {
    int bin = (int)(s * 15.5f + 15.5f);
    return t->bin_code[bin] + (s > t->bin_threshold[bin]);
}

#endif
