/* The interval code of an undo record, shared by every instruction set: see interval_code.py.
 *
 * f(w) = round(g * (w + d)) is monotone in w. The finite values of a dtype are numbered in their
 * order, both zeros being 0; the numbers with f = M are an interval [a, b], and w - a is stored in
 * as many bits as b - a needs. Pointers to weights may have any alignment.
 */
#ifndef LORAFORMAT_INTERVAL_H
#define LORAFORMAT_INTERVAL_H

#include "nf4.h"

/* Mirrored by interval_native.Tile. A step of 0 repeats one value. */
typedef struct {
    int64_t rows, columns;
    const void *merged;
    const float *delta;
    int64_t delta_row, delta_step; /* in elements, between rows and between columns */
    const float *gain;             /* or NULL, which is 1 */
    int64_t gain_row, gain_step;
    void *weight;                  /* read by encode, written by decode */
    uint8_t *bits;                 /* written by encode: at most 4 bytes per weight; else read */
    int64_t size;                  /* in bytes, of bits */
    int64_t *zeros;                /* written by encode: positions of -0.0 */
    int64_t zero_count;
} interval_tile;

/* 1, or 0 if no interval describes the tile or the bits are not its own. */
typedef int (*interval_fn)(interval_tile *t);

typedef struct {
    interval_fn encode[NF4_DTYPES][NF4_DTYPES]; /* by the dtypes of weight and merged */
    interval_fn decode[NF4_DTYPES][NF4_DTYPES];
} interval_ops;

extern const interval_ops interval_ops_scalar;
#ifdef NF4_X86
extern const interval_ops interval_ops_avx2, interval_ops_avx512;
#endif

/* Inlined always, so that each instruction set compiles its own: a call from AVX code to code for
 * every machine costs more than the search of one interval. */
#define INTERVAL_INLINE static inline __attribute__((always_inline))

/* Largest number of a finite value. */
INTERVAL_INLINE int32_t interval_top(int dtype) {
    return (dtype == NF4_F32 ? 0x7f800000 : dtype == NF4_F16 ? 0x7c00 : 0x7f80) - 1;
}

INTERVAL_INLINE float interval_value(int32_t number, int dtype) {
    uint32_t sign = number < 0, u = sign ? 0u - (uint32_t)number : (uint32_t)number;
    if (dtype == NF4_F32) return nf4_float(u | sign << 31);
    if (dtype == NF4_BF16) return nf4_float((u | sign << 15) << 16);
    return nf4_half_to_float((uint16_t)(u | sign << 15));
}

/* Of x rounded to the dtype; x is not NaN. */
INTERVAL_INLINE int32_t interval_number(float x, int dtype) {
    uint32_t u = nf4_bits(x), sign = u >> 31;
    if (dtype == NF4_F32) u &= 0x7fffffff;
    if (dtype == NF4_F16) u = nf4_float_to_half(x) & 0x7fffu;
    if (dtype == NF4_BF16) u = nf4_float_to_bf16(x) & 0x7fffu;
    return sign ? -(int32_t)u : (int32_t)u;
}

/* One element, turned so that the gain is not negative. */
typedef struct {
    float delta, gain;
    int32_t merged;
} interval_element;

INTERVAL_INLINE int32_t interval_forward(const interval_element *e, int32_t number, int from,
                                       int to) {
    float x = (interval_value(number, from) + e->delta) * e->gain; /* times 1 changes nothing */
    if (x != x) x = 0.0f;                                          /* infinity times gain 0 */
    if (to == NF4_F16) x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return interval_number(x, to);
}

/* The least number with f >= merged + above, or top + 1: gallop from a guess, then bisect. */
INTERVAL_INLINE int64_t interval_least(const interval_element *e, int64_t guess, int above, int from,
                                     int to) {
    const int64_t top = interval_top(from);
    int64_t low = -top - 1, high = top + 1, wanted = (int64_t)e->merged + above;
    guess = guess < -top ? -top : guess > top ? top : guess;
    if (interval_forward(e, (int32_t)guess, from, to) >= wanted) {
        high = guess;
        for (int64_t step = 1; high - step > low; step *= 2) {
            if (interval_forward(e, (int32_t)(high - step), from, to) < wanted) {
                low = high - step;
                break;
            }
            high -= step;
        }
    } else {
        low = guess;
        for (int64_t step = 1; low + step < high; step *= 2) {
            if (interval_forward(e, (int32_t)(low + step), from, to) >= wanted) {
                high = low + step;
                break;
            }
            low += step;
        }
    }
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (interval_forward(e, (int32_t)middle, from, to) >= wanted)
            high = middle;
        else
            low = middle;
    }
    return high;
}

/* The number of a weight near the edge between two merged numbers. */
INTERVAL_INLINE int64_t interval_edge(const interval_element *e, int32_t merged, int from, int to) {
    const int32_t top = interval_top(to), last = interval_top(from);
    if (merged <= -top) return -(int64_t)last;
    if (merged > top) return last;
    double edge = 0.5 * ((double)interval_value(merged - 1, to) + interval_value(merged, to));
    double near = edge / e->gain - e->delta, limit = interval_value(last, from);
    near = near > limit ? limit : near < -limit ? -limit : near;
    return interval_number((float)near, from);
}

/* The interval [*a, *b]; 0 if there is none. */
INTERVAL_INLINE int interval_find(float delta, float gain, float merged, int from, int to, int64_t *a,
                                int64_t *b) {
    interval_element e = {delta, gain, 0};
    uint32_t inf = 0x7f800000, all = 0x7fffffff;
    if ((nf4_bits(delta) & all) >= inf || (nf4_bits(gain) & all) >= inf) return 0;
    if ((nf4_bits(merged) & all) >= inf) return 0;
    e.merged = interval_number(merged, to);
    if (gain < 0) e.gain = -gain, e.merged = -e.merged;
    if (gain == 0) {
        *b = interval_top(from), *a = -*b;
        return e.merged == 0;
    }
    *a = interval_least(&e, interval_edge(&e, e.merged, from, to), 0, from, to);
    *b = interval_least(&e, interval_edge(&e, e.merged + 1, from, to), 1, from, to) - 1;
    return *a <= *b;
}

INTERVAL_INLINE int interval_width(uint64_t rest) {
    int width = 0;
    for (; rest; rest >>= 1) width++;
    return width;
}

/* Bits, the lowest first, across bytes. */
typedef struct {
    uint8_t *next, *end;
    uint64_t held;
    int count;
} interval_stream;

INTERVAL_INLINE void interval_put(interval_stream *s, uint64_t value, int width) {
    s->held |= value << s->count;
    for (s->count += width; s->count >= 8; s->count -= 8, s->held >>= 8)
        *s->next++ = (uint8_t)s->held;
}

/* 0 if there are not so many. */
INTERVAL_INLINE int interval_get(interval_stream *s, uint64_t *value, int width) {
    for (; s->count < width; s->count += 8) {
        if (s->next == s->end) return 0;
        s->held |= (uint64_t)*s->next++ << s->count;
    }
    *value = s->held & (((uint64_t)1 << width) - 1);
    s->held >>= width;
    s->count -= width;
    return 1;
}

#endif
