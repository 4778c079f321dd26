/* Both directions of the interval code, for one instruction set: vectors decide which weights are
 * alone in their interval, which is most of them, and the others are searched one by one.
 *
 * The includer defines TARGET, ISA, LANES and, on vectors of LANES floats or integers,
 * `widen_halves`, `narrow_halves` and `negative_lanes`. Vectors are those of gcc and clang.
 */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE floats widen_halves(ints bits);
INLINE ints narrow_halves(floats x);
INLINE uint32_t negative_lanes(ints mask);

INLINE floats pick(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

INLINE floats clamped(floats x, float limit) {
    const floats high = (floats){0} + limit, low = -high; /* NaN stays NaN */
    x = pick((ints)(x > high), high, x);
    return pick((ints)(x < low), low, x);
}

INLINE ints load_bits(const void *x, int64_t i, int dtype) {
    ints bits;
    halves h;
    if (dtype == NF4_F32) {
        memcpy(&bits, (const char *)x + 4 * i, sizeof bits);
        return bits;
    }
    memcpy(&h, (const char *)x + 2 * i, sizeof h);
    return __builtin_convertvector(h, ints);
}

INLINE void store_bits(void *x, int64_t i, int dtype, ints bits) {
    if (dtype == NF4_F32) {
        memcpy((char *)x + 4 * i, &bits, sizeof bits);
        return;
    }
    halves h = __builtin_convertvector(bits, halves);
    memcpy((char *)x + 2 * i, &h, sizeof h);
}

INLINE floats load_floats(const float *x, int64_t i, int64_t step) {
    floats f;
    if (step)
        memcpy(&f, x + i, sizeof f);
    else
        for (int k = 0; k < LANES; k++) f[k] = *x;
    return f;
}

INLINE ints numbers(ints bits, int dtype) {
    ints sign = dtype == NF4_F32 ? bits >> 31 : -(bits >> 15);
    ints rest = bits & (dtype == NF4_F32 ? 0x7fffffff : 0x7fff);
    return (rest ^ sign) - sign;
}

INLINE ints bits_of(ints number, int dtype) {
    ints sign = number >> 31, rest = (number ^ sign) - sign;
    return rest | (sign & (dtype == NF4_F32 ? INT32_MIN : 0x8000));
}

INLINE floats widen(ints bits, int dtype) {
    if (dtype == NF4_F32) return (floats)bits;
    return dtype == NF4_BF16 ? (floats)((words)bits << 16) : widen_halves(bits);
}

INLINE words bf16_up(floats x) {
    words u = (words)x;
    return u + 0x7fff + (u >> 16 & 1);
}

INLINE ints narrow(floats x, int dtype) {
    if (dtype == NF4_F32) return (ints)x;
    return dtype == NF4_BF16 ? (ints)(bf16_up(x) >> 16) : narrow_halves(x);
}

INLINE floats rounded(floats x, int dtype) {
    if (dtype == NF4_F32) return x;
    if (dtype == NF4_BF16) return (floats)(bf16_up(x) & 0xffff0000u);
    return widen_halves(narrow_halves(clamped(x, 65504.0f)));
}

INLINE floats forward(floats w, floats delta, floats gain, int scaled, int to) {
    floats x = w + delta;
    return rounded(scaled ? x * gain : x, to);
}

/* Lanes whose number is surely the only one that merges into `merged`. */
INLINE ints alone(ints number, floats merged, floats delta, floats gain, int scaled, int from,
                  int to) {
    const int32_t top = interval_top(from);
    ints before = number - 1, after = number + 1;
    before -= (ints)(before < -top); /* the first and the last are their own neighbours */
    after += (ints)(after > top);
    floats here = forward(widen(bits_of(number, from), from), delta, gain, scaled, to);
    floats low = forward(widen(bits_of(before, from), from), delta, gain, scaled, to);
    floats high = forward(widen(bits_of(after, from), from), delta, gain, scaled, to);
    return (ints)(low < merged) & (ints)(here == merged) & (ints)(high > merged);
}

/* One row of the tile, as the two directions see it. */
typedef struct {
    char *weight;
    const char *merged;
    const float *delta, *gain;
    int64_t delta_step, gain_step, columns;
} ISA(row);

/* interval_find for two dtypes: one copy of it, of this instruction set. */
typedef int (*ISA(find))(float delta, float gain, float merged, int64_t *a, int64_t *b);

#define EACH_LANE(mask) (; mask; mask &= mask - 1)

INLINE int encode_one(const ISA(row) *r, int64_t i, ISA(find) find, int from, int to, int64_t at,
                      interval_stream *bits, interval_tile *t) {
    int64_t a, b;
    int32_t number = interval_number(nf4_load(r->weight, i, from), from);
    if (number == 0 && nf4_bits(nf4_load(r->weight, i, from))) t->zeros[t->zero_count++] = at;
    if (!find(r->delta[i * r->delta_step], r->gain ? r->gain[i * r->gain_step] : 1.0f,
              nf4_load(r->merged, i, to), &a, &b))
        return 0;
    if (number < a || number > b) return 0;
    if (a < b) interval_put(bits, (uint64_t)(number - a), interval_width((uint64_t)(b - a)));
    return 1;
}

INLINE int decode_one(const ISA(row) *r, int64_t i, ISA(find) find, int from, int to,
                      interval_stream *bits) {
    int64_t a, b;
    uint64_t rank = 0;
    if (!find(r->delta[i * r->delta_step], r->gain ? r->gain[i * r->gain_step] : 1.0f,
              nf4_load(r->merged, i, to), &a, &b))
        return 0;
    if (a < b && !interval_get(bits, &rank, interval_width((uint64_t)(b - a)))) return 0;
    if (rank > (uint64_t)(b - a)) return 0;
    nf4_store(r->weight, i, from, interval_value((int32_t)(a + (int64_t)rank), from));
    return 1;
}

INLINE void turned(const ISA(row) *r, int64_t i, int scaled, floats *merged, floats *gain) {
    if (!scaled) return;
    floats g = load_floats(r->gain, i * r->gain_step, r->gain_step);
    ints sign = (ints)g & INT32_MIN;
    *merged = (floats)((ints)*merged ^ sign);
    *gain = (floats)((ints)g ^ sign);
}

INLINE int encode_row(const ISA(row) *r, int64_t at, int scaled, ISA(find) find, int from, int to,
                      interval_stream *bits, interval_tile *t) {
    int64_t i = 0;
    const ints negative_zero = bits_of((ints){0}, from) + (from == NF4_F32 ? INT32_MIN : 0x8000);
    for (; i + LANES <= r->columns; i += LANES) {
        ints raw = load_bits(r->weight, i, from);
        floats merged = widen(load_bits(r->merged, i, to), to), gain = {0};
        floats delta = load_floats(r->delta, i * r->delta_step, r->delta_step);
        turned(r, i, scaled, &merged, &gain);
        ints sure = alone(numbers(raw, from), merged, delta, gain, scaled, from, to);
        uint32_t left = negative_lanes(~sure | (ints)(raw == negative_zero));
        for EACH_LANE(left) {
            int64_t k = i + __builtin_ctz(left);
            if (!encode_one(r, k, find, from, to, at + k, bits, t)) return 0;
        }
    }
    for (; i < r->columns; i++)
        if (!encode_one(r, i, find, from, to, at + i, bits, t)) return 0;
    return 1;
}

INLINE int decode_row(const ISA(row) *r, int scaled, ISA(find) find, int from, int to,
                      interval_stream *bits) {
    const float limit = interval_value(interval_top(from), from);
    int64_t i = 0;
    for (; i + LANES <= r->columns; i += LANES) {
        floats merged = widen(load_bits(r->merged, i, to), to), gain = {0};
        floats delta = load_floats(r->delta, i * r->delta_step, r->delta_step);
        turned(r, i, scaled, &merged, &gain);
        floats near = (scaled ? merged / gain : merged) - delta;
        near = pick((ints)(near == near), clamped(near, limit), (floats){0});
        ints number = numbers(narrow(near, from), from);
        ints sure = alone(number, merged, delta, gain, scaled, from, to);
        store_bits(r->weight, i, from, bits_of(number, from));
        uint32_t left = negative_lanes(~sure);
        for EACH_LANE(left)
            if (!decode_one(r, i + __builtin_ctz(left), find, from, to, bits)) return 0;
    }
    for (; i < r->columns; i++)
        if (!decode_one(r, i, find, from, to, bits)) return 0;
    return 1;
}

INLINE int code_tile(interval_tile *t, int encoding, ISA(find) find, int from, int to) {
    interval_stream bits = {t->bits, t->bits + t->size, 0, 0};
    for (int64_t row = 0; row < t->rows; row++) {
        int64_t at = row * t->columns;
        ISA(row) r = {
            (char *)t->weight + at * (int64_t)nf4_size(from),
            (const char *)t->merged + at * (int64_t)nf4_size(to),
            t->delta + row * t->delta_row,
            t->gain ? t->gain + row * t->gain_row : t->gain,
            t->delta_step, t->gain_step, t->columns,
        };
        if (encoding && !(r.gain ? encode_row(&r, at, 1, find, from, to, &bits, t)
                                 : encode_row(&r, at, 0, find, from, to, &bits, t)))
            return 0;
        if (!encoding && !(r.gain ? decode_row(&r, 1, find, from, to, &bits)
                                  : decode_row(&r, 0, find, from, to, &bits)))
            return 0;
    }
    if (!encoding) return bits.next == bits.end && !bits.held; /* no bytes left, no bits set */
    if (bits.count) interval_put(&bits, 0, 8 - bits.count);
    t->size = bits.next - t->bits;
    return 1;
}

#define PAIR(from, to)                                                                      \
    static TARGET __attribute__((noinline)) int ISA(find##from##to)(                        \
        float delta, float gain, float merged, int64_t *a, int64_t *b) {                    \
        return interval_find(delta, gain, merged, from, to, a, b);                          \
    }                                                                                       \
    static TARGET int ISA(encode##from##to)(interval_tile *t) {                             \
        return code_tile(t, 1, ISA(find##from##to), from, to);                              \
    }                                                                                       \
    static TARGET int ISA(decode##from##to)(interval_tile *t) {                             \
        return code_tile(t, 0, ISA(find##from##to), from, to);                              \
    }
#define ROW(way, from) {ISA(way##from##0), ISA(way##from##1), ISA(way##from##2)}

PAIR(0, 0) PAIR(0, 1) PAIR(0, 2)
PAIR(1, 0) PAIR(1, 1) PAIR(1, 2)
PAIR(2, 0) PAIR(2, 1) PAIR(2, 2)

const interval_ops ISA(interval_ops) = {
    {ROW(encode, 0), ROW(encode, 1), ROW(encode, 2)},
    {ROW(decode, 0), ROW(decode, 1), ROW(decode, 2)},
};
