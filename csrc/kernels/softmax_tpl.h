/* softmax_tpl.h: one online-softmax step of a panel, for the fp32 kernels (tile_tpl.h) and those of bf16 pairs (bf16_tpl.h).
 * Needs the vector type and operations that tile_tpl.h lists; with K_PAIRS defined also
 * v_pairs(a, b, to): a and b rounded to bf16, interleaved; v_exp2_half: v_exp2 to well below the rounding of bf16. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

#define K_GLUE2(a, b) a##_##b
#define K_GLUE(a, b) K_GLUE2(a, b)
#define K_NAME(op) K_GLUE(op, K_ISA)
#define K_LANES (V_LEN * V_PER)
#define K_INLINE static inline __attribute__((always_inline))
#define K_LOG2E 1.44269504088896340736f

/* tanh as an odd rational, fitted for least relative error (2e-8) on |x| <= 9, where fp32 tanh has become 1. */
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

/* Pass 1 of a softmax: the maximum, and with a softcap the capped logits in units of log2. omit: a product of -inf marks
 * something left out and stays -inf under the softcap. Constant flags fold away. */
K_INLINE void softmax_max(float *s, int64_t n, int base, const int32_t *lo, const int32_t *hi, float inner, float outer, vf *top,
                          const int masked, const int capped, const int omit)
{
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++) top[u] = v_set1(-INFINITY);
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int u = 0; u < V_PER; u++) {
            float *at = s + j * K_LANES + u * V_LEN;
            vf x = v_load(at);
            if (capped) {
                const vf y = v_mul(v_set1(outer), tanh_vf(v_mul(x, v_set1(inner))));
                x = omit ? v_pick(v_eq(x, v_set1(-INFINITY)), x, y) : y;
                v_store(at, x);
            }
            if (masked) x = v_pick(v_range(lo + u * V_LEN, hi + u * V_LEN, base + (int)j), x, v_set1(-INFINITY));
            top[u] = v_max(top[u], x);
        }
}

/* 1 where a maximum is so large that its rounding, which a fused product does not share, is no longer small. */
K_INLINE vf is_far(vf top)
{
    const vf near = v_max(v_set1(-0x1p26f), v_min(v_set1(0x1p26f), top));
    return v_pick(v_eq(near, top), v_set1(0.0f), v_set1(1.0f));
}

/* x * factor + shift, where -shift is the largest product, rounded. Fused it is exact but for that; rounded twice it is 0
 * for the largest whatever its size. */
K_INLINE vf exponent(vf x, vf factor, vf shift, const int rounded)
{
    return rounded ? v_add(v_mul(x, factor), shift) : v_fma(x, factor, shift);
}

/* Pass 2: probabilities into s; their sum is added to `sum`. */
K_INLINE void softmax_exp(float *s, int n, int base, const int32_t *lo, const int32_t *hi, vf factor, const vf *shift, int rounded,
                          vf *sum, const int masked)
{
    for (int j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int u = 0; u < V_PER; u++) {
            float *at = s + (ptrdiff_t)j * K_LANES + u * V_LEN;
            vf p = v_exp2(exponent(v_load(at), factor, shift[u], rounded));
            if (masked) p = v_pick(v_range(lo + u * V_LEN, hi + u * V_LEN, base + j), p, v_set1(0.0f));
            v_store(at, p);
            sum[u] = v_add(sum[u], p);
        }
}

#ifdef K_PAIRS
/* Pass 2 with the probabilities rounded to bf16: pairs[(j / 2 * lanes + r) * 2 + j % 2], zeros up to the next whole step. */
K_INLINE void softmax_exp_pairs(const float *s, int n, int base, const int32_t *lo, const int32_t *hi, vf factor, const vf *shift,
                                int rounded, vf *sum, uint16_t *pairs, const int masked)
{
    int j = 0;
    for (; j < n; j += 2)
#pragma GCC unroll 8
        for (int u = 0; u < V_PER; u++) {
            const float *at = s + (ptrdiff_t)j * K_LANES + u * V_LEN;
            vf a = v_exp2_half(exponent(v_load(at), factor, shift[u], rounded));
            vf b = v_exp2_half(exponent(v_load(at + K_LANES), factor, shift[u], rounded));
            if (masked) a = v_pick(v_range(lo + u * V_LEN, hi + u * V_LEN, base + j), a, v_set1(0.0f));
            if (masked) b = v_pick(v_range(lo + u * V_LEN, hi + u * V_LEN, base + j + 1), b, v_set1(0.0f));
            if (j + 1 == n) b = v_set1(0.0f);
            sum[u] = v_add(sum[u], v_add(a, b));
            v_pairs(a, b, pairs + ((ptrdiff_t)(j / 2) * K_LANES + u * V_LEN) * 2);
        }
    for (; j % DHSA_PAIR_STEP; j += 2) memset(pairs + (ptrdiff_t)(j / 2) * K_LANES * 2, 0, K_LANES * 4);
}
#endif

K_INLINE void softmax_tile(float *s, int n, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap, float *m,
                           float *l, float *alpha, uint16_t *pairs, const int masked, const int capped)
{
    const vf factor = v_set1(capped ? 1.0f : scale * K_LOG2E);
    vf top[V_PER], sum[V_PER], shift[V_PER], far = v_set1(0.0f);
    softmax_max(s, n, base, lo, hi, capped ? scale / softcap : 0.0f, softcap * K_LOG2E, top, masked, capped, 0);
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++) {
        const vf none = v_set1(-INFINITY), old = v_load(m + u * V_LEN);
        /* -inf times a zero scale would be NaN: no key seen stays no key seen. */
        const vf now = v_max(v_pick(v_eq(top[u], none), none, v_mul(top[u], factor)), old);
        const vf use = v_pick(v_eq(now, none), v_set1(0.0f), now);
        v_store(m + u * V_LEN, now);
        v_store(alpha + u * V_LEN, v_exp2(v_sub(old, use)));
        shift[u] = v_sub(v_set1(0.0f), use);
        sum[u] = v_set1(0.0f);
        far = v_add(far, is_far(use));
    }
    const int rounded = v_sum(far) > 0;
#ifdef K_PAIRS
    if (rounded)
        softmax_exp_pairs(s, n, base, lo, hi, factor, shift, 1, sum, pairs, masked);
    else
        softmax_exp_pairs(s, n, base, lo, hi, factor, shift, 0, sum, pairs, masked);
#else
    (void)pairs;
    softmax_exp(s, n, base, lo, hi, factor, shift, rounded, sum, masked);
#endif
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++) {
        float *at = l + u * V_LEN;
        v_store(at, v_fma(v_load(at), v_load(alpha + u * V_LEN), sum[u]));
    }
}

/* pairs: where probabilities go with K_PAIRS; else NULL, and they go back into s. */
K_INLINE void softmax_step(float *s, int n, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap, float *m,
                           float *l, float *alpha, uint16_t *pairs)
{
    if (softcap > 0) {
        if (lo)
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, pairs, 1, 1);
        else
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, pairs, 0, 1);
    } else {
        if (lo)
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, pairs, 1, 0);
        else
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, pairs, 0, 0);
    }
}
