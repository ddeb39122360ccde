/* softmax_tpl.h: one online-softmax step of a panel and its parts, for the fp32 kernels (tile_tpl.h) and those of
 * 16-bit pairs (pairs_tpl.h). The including file defines the vector type and operations that tile_tpl.h lists. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/names.h"

#define K_NAME(op) K_GLUE(op, K_ISA)
#define K_LANES (V_LEN * V_PER)
#define K_FOR_ROWS(rows, f, ...) K_FOR_VECTORS(rows, V_LEN, f, __VA_ARGS__)
/* Calls f(..., dtype) with a dtype that is a constant after inlining. f must return nothing. */
#define K_BY_DTYPE(dtype, f, ...)                                                                                      \
    do {                                                                                                               \
        if ((dtype) == DHSA_F32)                                                                                       \
            f(__VA_ARGS__, DHSA_F32);                                                                                  \
        else if ((dtype) == DHSA_F16)                                                                                  \
            f(__VA_ARGS__, DHSA_F16);                                                                                  \
        else                                                                                                           \
            f(__VA_ARGS__, DHSA_BF16);                                                                                 \
    } while (0)
#define K_LOG2E 1.44269504088896340736f

/* tanh as an odd rational function of least relative error (2e-8) on |x| <= 9. Beyond that, tanh is 1 in fp32. */
K_INLINE vf tanh_vf(vf x)
{
    x = v_max(v_set1(-9.0f), v_min(v_set1(9.0f), x));
    const vf y = v_mul(x, x);
    vf p = v_fma(v_set1(1.335463117868585e-08f), y, v_set1(2.0609058992704377e-05f));
    vf q = v_fma(v_set1(7.776545203341811e-07f), y, v_set1(0.00032856324105523527f));
    p = v_fma(p, y, v_set1(0.003495586570352316f));
    q = v_fma(q, y, v_set1(0.025876976549625397f));
    p = v_fma(p, y, v_set1(0.13381023705005646f));
    q = v_fma(q, y, v_set1(0.46714338660240173f));
    p = v_fma(p, y, v_set1(1.0f));
    q = v_fma(q, y, v_set1(1.0f));
    return v_mul(v_mul(x, p), v_rcp(q));
}

/* The largest product of each row; -inf if the row sees no key. A softcap makes a product of -inf a finite logit, so
 * with a mask and a softcap such a product counts as -FLT_MAX. */
K_INLINE void softmax_max(const float *s, int64_t n, int base, const int32_t *lo, const int32_t *hi, vf *top,
                          const int masked, const int capped, const int per)
{
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) top[u] = v_set1(-INFINITY);
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) {
            vf x = v_load(s + j * K_LANES + u * V_LEN);
            if (masked && capped) x = v_max(v_set1(-FLT_MAX), x);
            if (masked) x = v_pick(v_range(lo + u * V_LEN, hi + u * V_LEN, base + (int)j), x, v_set1(-INFINITY));
            top[u] = v_max(top[u], x);
        }
}

/* How a product x becomes an exponent of 2: x * factor, or outer * tanh(x * inner) with a softcap. */
typedef struct {
    vf factor, inner, outer;
} exponents;

K_INLINE exponents exponents_of(float scale, float softcap)
{
    return (exponents){v_set1(softcap > 0 ? 1.0f : scale * K_LOG2E), v_set1(softcap > 0 ? scale / softcap : 0.0f),
                       v_set1(softcap * K_LOG2E)};
}

K_INLINE vf cap_vf(vf x, exponents e) { return v_mul(e.outer, tanh_vf(v_mul(x, e.inner))); }

/* 1 where a maximum is so large that its rounding error is not small any more. A fused product does not have that
 * error. */
K_INLINE vf is_far(vf top)
{
    const vf near = v_max(v_set1(-0x1p26f), v_min(v_set1(0x1p26f), top));
    return v_pick(v_eq(near, top), v_set1(0.0f), v_set1(1.0f));
}

/* The exponent of a product minus the largest exponent, where -shift is the largest exponent, rounded. The fused
 * form has no other rounding error. The form with two roundings is exactly 0 for the largest product, whatever its
 * size. */
K_INLINE vf exponent(vf x, exponents e, vf shift, const int rounded, const int capped)
{
    if (capped) return v_add(cap_vf(x, e), shift);
    return rounded ? v_add(v_mul(x, e.factor), shift) : v_fma(x, e.factor, shift);
}

/* Pass 2: writes probabilities to s and adds them to `sum`. */
K_INLINE void softmax_exp(float *s, int n, int base, const int32_t *lo, const int32_t *hi, exponents e, const vf *shift,
                          int rounded, vf *sum, const int masked, const int capped, const int per)
{
    for (int j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) {
            float *at = s + (ptrdiff_t)j * K_LANES + u * V_LEN;
            vf p = v_exp2(exponent(v_load(at), e, shift[u], rounded, capped));
            if (masked) p = v_pick(v_range(lo + u * V_LEN, hi + u * V_LEN, base + j), p, v_set1(0.0f));
            v_store(at, p);
            sum[u] = v_add(sum[u], p);
        }
}

/* Pass 1: computes the new maximum m, alpha, and the shift of pass 2. known: the largest products, which may be
 * given if there is no mask, else NULL. Returns the argument `rounded` of exponent(). */
K_INLINE int softmax_begin(const float *s, const float *known, int n, int base, const int32_t *lo, const int32_t *hi,
                           exponents e, float *m, float *alpha, vf *shift, const int masked, const int capped,
                           const int per)
{
    vf top[V_PER], far = v_set1(0.0f);
    if (known)
        for (int u = 0; u < per; u++) top[u] = v_load(known + u * V_LEN);
    else
        softmax_max(s, n, base, lo, hi, top, masked, capped, per);
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        const vf none = v_set1(-INFINITY), old = v_load(m + u * V_LEN);
        /* If no key was seen, the maximum must stay -inf. A zero scale would make it NaN, and a softcap would make
         * it finite. */
        const vf most = capped ? cap_vf(top[u], e) : v_mul(top[u], e.factor);
        const vf now = v_max(capped && !masked ? most : v_pick(v_eq(top[u], none), none, most), old);
        const vf use = v_pick(v_eq(now, none), v_set1(0.0f), now);
        v_store(m + u * V_LEN, now);
        v_store(alpha + u * V_LEN, v_exp2(v_sub(old, use)));
        shift[u] = v_sub(v_set1(0.0f), use);
        far = v_add(far, is_far(use));
    }
    return v_sum(far) > 0;
}

/* Rescales the sum of earlier keys to the new maximum and adds the sum of the current keys. */
K_INLINE void softmax_end(float *l, const float *alpha, const vf *sum, const int per)
{
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        float *at = l + u * V_LEN;
        v_store(at, v_fma(v_load(at), v_load(alpha + u * V_LEN), sum[u]));
    }
}

K_INLINE void softmax_tile(float *s, int n, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap,
                           float *m, float *l, float *alpha, const int masked, const int capped, const int per)
{
    const exponents e = exponents_of(scale, softcap);
    vf shift[V_PER], sum[V_PER];
    const int rounded = softmax_begin(s, NULL, n, base, lo, hi, e, m, alpha, shift, masked, capped, per);
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) sum[u] = v_set1(0.0f);
    softmax_exp(s, n, base, lo, hi, e, shift, rounded, sum, masked, capped, per);
    softmax_end(l, alpha, sum, per);
}
