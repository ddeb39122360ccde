/* neon.c: the tier of every 64-bit Arm CPU: vectors of 4, panels of 16 rows. */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <stdint.h>

#include "kernels/half.h"

#define K_ISA neon
#define K_TEXT "neon"
#define V_LEN 4
#define V_PER 4
#define QK_ROWS 6
#define PV_ROWS 4

typedef float32x4_t vf;
typedef uint32x4_t vm;

static inline vf v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vf x) { vst1q_f32(p, x); }
static inline vf v_set1(float x) { return vdupq_n_f32(x); }
static inline vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
/* Not vmaxq: if either argument is NaN, the result must be the second one, as on the other tiers. */
static inline vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

/* As in avx2.c: 2^x = 2^n * p(x - n) with n = round(x), least relative error 2e-9. Below 2^-126 the result is 0. */
static inline vf v_exp2(vf x)
{
    const vf c = v_max(v_set1(-127.0f), x), n = vrndnq_f32(c), f = v_sub(c, n);
    vf p = v_fma(v_set1(0x1.41d334p-13f), f, v_set1(0x1.5f456ap-10f));
    p = v_fma(p, f, v_set1(0x1.3b2dbcp-7f));
    p = v_fma(p, f, v_set1(0x1.c6aed4p-5f));
    p = v_fma(p, f, v_set1(0x1.ebfbdap-3f));
    p = v_fma(p, f, v_set1(0x1.62e430p-1f));
    p = v_fma(p, f, v_set1(1.0f));
    const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    p = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), vcltq_f32(x, v_set1(-126.0f))));
}

static inline vf v_rcp(vf x) { return vdivq_f32(v_set1(1.0f), x); }
static inline float v_sum(vf x) { return vaddvq_f32(x); }
static inline vm v_range(const int32_t *lo, const int32_t *hi, int j)
{
    const int32x4_t at = vdupq_n_s32(j);
    return vandq_u32(vcleq_s32(vld1q_s32(lo), at), vcgtq_s32(vld1q_s32(hi), at));
}
static inline vf v_pick(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
static inline vm v_eq(vf a, vf b) { return vceqq_f32(a, b); }
static inline vf v_from_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vf v_from_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline void v_to_f16(vf x, uint16_t *p) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
static inline void v_to_bf16(vf x, uint16_t *p)
{
    float line[4];
    v_store(line, x);
    for (int i = 0; i < 4; i++) p[i] = dhsa_to_bf16(line[i]);
}
static inline void v_pairs_bf16(const uint16_t *p, vf *even, vf *odd)
{
    const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
}
static inline vf v_of_bits(vf x) { return vreinterpretq_f32_s32(vmaxq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(0))); }
static inline vf v_sums(const vf *x) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }
static inline void v_transpose(vf *x)
{
    const float32x4x2_t a = vtrnq_f32(x[0], x[1]), b = vtrnq_f32(x[2], x[3]);
    x[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    x[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    x[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    x[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#include "kernels/tile_tpl.h"

#else
typedef int dhsa_neon_not_here; /* an empty translation unit is not ISO C */
#endif
