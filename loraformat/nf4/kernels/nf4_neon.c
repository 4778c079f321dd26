/* NF4 with NEON on 64-bit ARM: byte table look-ups both ways, 16 elements at a time. */
#include "nf4.h"
#ifdef NF4_ARM
#include <arm_neon.h>

#define TARGET
#define ISA(name) name##_neon
#define LANES 2

INLINE void streaming_fence(void) {}

INLINE float32x4_t load4(const void *x, int64_t i, int dtype) {
    if (dtype == NF4_F32)
        return vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)x + 4 * i));
    uint16x4_t h = vreinterpret_u16_u8(vld1_u8((const uint8_t *)x + 2 * i));
    if (dtype == NF4_F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

INLINE uint32_t block_absmax(const void *x, int64_t n, int dtype) {
    uint32x4_t sign = vdupq_n_u32(0x7fffffff), largest = vdupq_n_u32(0);
    for (int64_t i = 0; i < n; i += 4)
        largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(load4(x, i, dtype)), sign));
    return vmaxvq_u32(largest);
}

INLINE uint8x16_t narrow(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    return vcombine_u8(vmovn_u16(vcombine_u16(vmovn_u32(a), vmovn_u32(b))),
                       vmovn_u16(vcombine_u16(vmovn_u32(c), vmovn_u32(d))));
}

INLINE uint32x4_t bins4(float32x4_t s) {
    float32x4_t half = vdupq_n_f32(15.5f);
    return vcvtq_u32_f32(vaddq_f32(vmulq_f32(s, half), half));
}

typedef struct {
    uint8x16x2_t plane[4]; /* byte k of each of the 32 thresholds */
    uint8x16x2_t code;
} bins;

INLINE bins bin_tables(const nf4_tables *t) {
    bins b;
    uint8_t code[32];
    for (int i = 0; i < 32; i++) code[i] = (uint8_t)t->bin_code[i];
    for (int half = 0; half < 2; half++) {
        uint8x16x4_t bytes = vld4q_u8((const uint8_t *)(t->bin_threshold + 16 * half));
        for (int k = 0; k < 4; k++) b.plane[k].val[half] = bytes.val[k];
        b.code.val[half] = vld1q_u8(code + 16 * half);
    }
    return b;
}

INLINE uint8x16_t codes16(bins b, const float32x4_t s[4]) {
    uint8x16_t bin = narrow(bins4(s[0]), bins4(s[1]), bins4(s[2]), bins4(s[3]));
    uint8x16_t b0 = vqtbl2q_u8(b.plane[0], bin), b1 = vqtbl2q_u8(b.plane[1], bin);
    uint8x16_t b2 = vqtbl2q_u8(b.plane[2], bin), b3 = vqtbl2q_u8(b.plane[3], bin);
    uint16x8_t l01 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1));
    uint16x8_t h01 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
    uint16x8_t l23 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
    uint16x8_t h23 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
    uint32x4_t above0 = vcgtq_f32(s[0], vreinterpretq_f32_u16(vzip1q_u16(l01, l23)));
    uint32x4_t above1 = vcgtq_f32(s[1], vreinterpretq_f32_u16(vzip2q_u16(l01, l23)));
    uint32x4_t above2 = vcgtq_f32(s[2], vreinterpretq_f32_u16(vzip1q_u16(h01, h23)));
    uint32x4_t above3 = vcgtq_f32(s[3], vreinterpretq_f32_u16(vzip2q_u16(h01, h23)));
    /* a comparison that holds is all ones: subtracting it adds one */
    return vsubq_u8(vqtbl2q_u8(b.code, bin), narrow(above0, above1, above2, above3));
}

INLINE void block_codes(const nf4_tables *t, const void *x, int64_t n, int dtype, float inverse,
                        uint8_t *packed) {
    bins b = bin_tables(t);
    for (int64_t i = 0; i < n; i += 16) {
        float32x4_t s[4];
        for (int k = 0; k < 4; k++) s[k] = vmulq_n_f32(load4(x, i + 4 * k, dtype), inverse);
        uint8x16_t code = codes16(b, s);
        uint8x16_t pair = vorrq_u8(vshlq_n_u8(vuzp1q_u8(code, code), 4), vuzp2q_u8(code, code));
        vst1_u8(packed + i / 2, vget_low_u8(pair));
    }
}

/* The planes of the scaled table interleave to whole values in the store itself. */
INLINE void block_values(const nf4_tables *t, const uint8_t *packed, int64_t n, float scale,
                         void *out, int dtype, int streaming) {
    uint8_t scaled[16 * 4], *to = out;
    (void)streaming;
    for (int k = 0; k < 16; k++) nf4_store(scaled, k, dtype, t->levels[k] * scale);
    uint8x16x4_t four = {0};
    uint8x16x2_t two = {0};
    if (dtype == NF4_F32)
        four = vld4q_u8(scaled);
    else
        two = vld2q_u8(scaled);
    for (int64_t i = 0; i < n; i += 16) {
        uint8x8_t byte = vld1_u8(packed + i / 2);
        uint8x8_t high = vshr_n_u8(byte, 4), low = vand_u8(byte, vdup_n_u8(15));
        uint8x16_t index = vcombine_u8(vzip1_u8(high, low), vzip2_u8(high, low));
        if (dtype == NF4_F32) {
            uint8x16x4_t value;
            for (int k = 0; k < 4; k++) value.val[k] = vqtbl1q_u8(four.val[k], index);
            vst4q_u8(to + 4 * i, value);
        } else {
            uint8x16x2_t value;
            for (int k = 0; k < 2; k++) value.val[k] = vqtbl1q_u8(two.val[k], index);
            vst2q_u8(to + 2 * i, value);
        }
    }
}

INLINE void block_widen(const void *x, int64_t n, int dtype, float *out) {
    for (int64_t i = 0; i < n; i += 4) vst1q_f32(out + i, load4(x, i, dtype));
}

#include "nf4_body.h"
#endif
