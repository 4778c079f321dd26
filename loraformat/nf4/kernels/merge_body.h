/* One tile: out = round(g (w + d)), and what rounding did to the change, in one pass.
 *
 * Every step is in float32 and rounded to nearest even; nothing is contracted, so every instruction
 * set gives the same bits. float16 saturates. With D = g (w + d) - w and E = out - w it sums w^2,
 * D^2, E D and (E - D)^2, and counts D != 0, those of them that come out as w does without an
 * adapter, and saturated values. Sums are of float32 over 512 elements, of double beyond.
 *
 * An including file defines ISA, TARGET and LANES, and if it has instructions for float16
 * LOAD_HALVES and STORE_HALVES. Vectors are those of GCC and Clang.
 */
#include "merge.h"

#define RUN (512 / LANES) /* vectors that are summed in float32 */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t masks __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

INLINE floats load_halves(shorts halves) {
#ifdef LOAD_HALVES
    return LOAD_HALVES(halves);
#else
    floats values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = nf4_half_to_float(halves[lane]);
    return values;
#endif
}

INLINE shorts store_halves(floats values) {
#ifdef STORE_HALVES
    return STORE_HALVES(values);
#else
    shorts halves;
    for (int lane = 0; lane < LANES; lane++) halves[lane] = nf4_float_to_half(values[lane]);
    return halves;
#endif
}

INLINE floats select(masks mask, floats yes, floats no) {
    return (floats)(((masks)yes & mask) | ((masks)no & ~mask));
}

INLINE floats load(const void *x, int64_t i, int dtype) {
    floats values;
    shorts halves;
    if (dtype == NF4_F32) {
        memcpy(&values, (const char *)x + 4 * i, sizeof values);
        return values;
    }
    memcpy(&halves, (const char *)x + 2 * i, sizeof halves);
    if (dtype == NF4_F16) return load_halves(halves);
    return (floats)(__builtin_convertvector(halves, words) << 16);
}

INLINE floats saturated(floats x) {
    floats limit = (floats){} + 65504.0f;
    return select(x > limit, limit, select(x < -limit, -limit, x));
}

/* Store what is rounded, and return it in float32. */
INLINE floats store(void *out, int64_t i, int dtype, floats x) {
    shorts halves;
    floats rounded = x;
    if (dtype == NF4_F32) {
        memcpy((char *)out + 4 * i, &x, sizeof x);
        return x;
    }
    if (dtype == NF4_F16) {
        halves = store_halves(saturated(x));
        rounded = load_halves(halves);
    } else {
        words bits = (words)x, up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        masks nan = x != x;
        up = (up & ~(words)nan) | ((bits >> 16 | 0x40) & (words)nan);
        halves = __builtin_convertvector(up, shorts);
        rounded = (floats)(up << 16);
    }
    memcpy((char *)out + 2 * i, &halves, sizeof halves);
    return rounded;
}

typedef struct {
    floats weight, delta, product, error;
    masks changed, swallowed, clipped;
} lanes;

INLINE void merge8(lanes *sum, floats w, floats d, floats g, int with_gain, int measure, int from,
                   int to, void *out, int64_t at) {
    char again[4 * LANES];
    floats total = w + d;
    if (with_gain) total = total * g;
    floats result = store(out, at, to, total);
    if (!measure) return;
    floats exact = with_gain ? total - w : d;
    floats effect = result - w, rest = effect - exact;
    floats plain = from == to ? w : store(again, 0, to, w);
    masks changed = exact != 0.0f;
    sum->weight += w * w;
    sum->delta += exact * exact;
    sum->product += effect * exact;
    sum->error += rest * rest;
    sum->changed -= changed;
    sum->swallowed -= changed & (result == plain);
    if (to == NF4_F16) sum->clipped -= (total > 65504.0f) | (total < -65504.0f);
}

INLINE void fold(merge_job *job, lanes *sum) {
    for (int lane = 0; lane < LANES; lane++) {
        job->sums[0] += (double)sum->weight[lane];
        job->sums[1] += (double)sum->delta[lane];
        job->sums[2] += (double)sum->product[lane];
        job->sums[3] += (double)sum->error[lane];
        job->changed += sum->changed[lane];
        job->swallowed += sum->swallowed[lane];
        job->clipped += sum->clipped[lane];
    }
    memset(sum, 0, sizeof *sum);
}

INLINE floats gains(const float *gain, int64_t i, int64_t step) {
    floats g = {0};
    if (!step) return g + gain[0];
    memcpy(&g, gain + i, sizeof g); /* step is 1 */
    return g;
}

/* Less than a vector: padded with zeros, which change and count nothing. */
INLINE void merge_tail(lanes *sum, const char *w, const float *d, const float *g, int64_t g_step,
                       int64_t n, int measure, int from, int to, char *out) {
    char weight[4 * LANES] = {0}, merged[4 * LANES];
    float delta[LANES] = {0}, gain[LANES] = {0};
    memcpy(weight, w, (size_t)n * nf4_size(from));
    if (d) memcpy(delta, d, (size_t)n * 4);
    for (int64_t i = 0; g && i < n; i++) gain[i] = g[i * g_step];
    merge8(sum, load(weight, 0, from), load(delta, 0, NF4_F32), load(gain, 0, NF4_F32), g != NULL,
           measure, from, to, merged, 0);
    memcpy(out, merged, (size_t)n * nf4_size(to));
}

INLINE void merge_row(merge_job *job, lanes *sum, const char *w, const float *d, const float *g,
                      char *out, int64_t n, int measure, int from, int to) {
    floats none = {0}, gain = none;
    int64_t i = 0, whole = n / LANES * LANES;
    while (i < whole) {
        int64_t stop = i + RUN * LANES < whole ? i + RUN * LANES : whole;
        for (; i < stop; i += LANES) {
            if (g) gain = gains(g, i, job->gain_step);
            merge8(sum, load(w, i, from), d ? load(d, i, NF4_F32) : none, gain, g != NULL, measure,
                   from, to, out, i);
        }
        if (measure) fold(job, sum);
    }
    if (i < n) {
        merge_tail(sum, w + i * (int64_t)nf4_size(from), d ? d + i : NULL,
                   g ? g + i * job->gain_step : NULL, job->gain_step, n - i, measure, from, to,
                   out + i * (int64_t)nf4_size(to));
        if (measure) fold(job, sum);
    }
}

INLINE void merge_rows(merge_job *job, int from, int to) {
    lanes sum;
    int64_t rows = job->rows, columns = job->columns;
    memset(&sum, 0, sizeof sum);
    if (!job->gain) columns *= rows, rows = 1;
    for (int64_t row = 0; row < rows; row++) {
        const char *w = (const char *)job->weight + row * columns * (int64_t)nf4_size(from);
        const float *d = job->delta ? job->delta + row * columns : NULL;
        char *out = (char *)job->out + row * columns * (int64_t)nf4_size(to);
        if (job->gain) {
            const float *g = job->gain + row * job->gain_row;
            if (job->measure) merge_row(job, &sum, w, d, g, out, columns, 1, from, to);
            else merge_row(job, &sum, w, d, g, out, columns, 0, from, to);
        } else if (job->measure) {
            merge_row(job, &sum, w, d, NULL, out, columns, 1, from, to);
        } else {
            merge_row(job, &sum, w, d, NULL, out, columns, 0, from, to);
        }
    }
}

#define MERGE(from, to) \
    static TARGET void merge_##from##_##to(merge_job *job) { merge_rows(job, NF4_##from, NF4_##to); }
MERGE(F32, F32) MERGE(F32, F16) MERGE(F32, BF16)
MERGE(F16, F32) MERGE(F16, F16) MERGE(F16, BF16)
MERGE(BF16, F32) MERGE(BF16, F16) MERGE(BF16, BF16)

const merge_ops ISA(merge_ops) = {
    {{merge_F32_F32, merge_F32_F16, merge_F32_BF16},
     {merge_F16_F32, merge_F16_F16, merge_F16_BF16},
     {merge_BF16_F32, merge_BF16_F16, merge_BF16_BF16}},
};
