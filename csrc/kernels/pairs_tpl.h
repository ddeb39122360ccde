/* pairs_tpl.h: packing and softmax for the tiers that multiply pairs of bf16 or (PAIR_FP16) fp16: avx512bf16.c,
 * amx.c and amxfp16.c. All of these have AVX-512 and its BF16 instructions. */
#include <string.h>

#include "kernels/kernels.h"
#define V_PER 2
#include "kernels/ops512.h"
#include "kernels/softmax_tpl.h"

/* bf16 numbers as fp32. */
static inline vf wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

/* Rounds the probabilities of two keys and the same rows to 16 bits and stores them as pairs; unless rest is NULL, also
 * what rounding took from them (bf16 only). */
static inline __attribute__((always_inline)) void v_pairs(vf a, vf b, uint16_t *to, uint16_t *rest)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#if PAIR_FP16
    const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT),
                  high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    if (rest) {
        const vf a_low = v_sub(a, wide(_mm512_castsi512_si256(both))),
                 b_low = v_sub(b, wide(_mm512_extracti64x4_epi64(both, 1)));
        _mm512_storeu_si512(rest, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b_low, a_low)));
    }
#endif
    (void)rest;
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

/* v_exp2 by a polynomial of degree 4, with a relative error of at most 3e-6. bf16 rounds by up to 2e-3, fp16 by
 * 5e-4. */
static inline vf v_exp2_half(vf x)
{
    const vf f = _mm512_reduce_ps(x, 0x09);
    vf p = v_fma(v_set1(0x1.bb7cd2p-7f), f, v_set1(0x1.aa13fp-5f));
    p = v_fma(p, f, v_set1(0x1.ee798ap-3f));
    p = v_fma(p, f, v_set1(0x1.62d166p-1f));
    p = v_fma(p, f, v_set1(0x1.00002cp+0f));
    return _mm512_scalef_ps(p, x);
}

enum { LANES = K_LANES, STEP = DHSA_PAIR_STEP };

static inline int round_step(int n) { return (n + STEP - 1) / STEP * STEP; }

/* 32 elements of a row from column d on, with zeros past its end. */
static inline __m512i row_words(const void *row, int d, int dim)
{
    const uint16_t *at = (const uint16_t *)row + d;
    if (d + STEP <= dim) return _mm512_loadu_si512(at);
    return _mm512_maskz_loadu_epi16((__mmask32)((UINT64_C(1) << (dim - d)) - 1), at);
}

static void pack_panel(const void *const *rows, int n, int dim, int negate, uint16_t *dst)
{
    const __m512i sign = _mm512_set1_epi16(negate ? (short)0x8000 : 0);
    for (int r = 0; r < LANES; r += 16)
        for (int d = 0; d < dim; d += STEP) {
            __m512 x[16];
            for (int i = 0; i < 16; i++)
                x[i] = r + i < n ? _mm512_castsi512_ps(_mm512_xor_si512(row_words(rows[r + i], d, dim), sign))
                                 : _mm512_setzero_ps();
            v_transpose(x);
            for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + ((ptrdiff_t)(d / 2 + i) * LANES + r) * 2, x[i]);
        }
}

static void pack_keys(const void *const *rows, int n, int dim, uint16_t *dst)
{
    const int padded = round_step(dim);
    for (int j = 0; j < n; j++)
        for (int d = 0; d < padded; d += STEP)
            _mm512_storeu_si512(dst + dhsa_square(j, d, padded), row_words(rows[j], d, dim));
}

#if !PAIR_FP16
static void narrow(const float *row, int dim, uint16_t *high, uint16_t *low)
{
    const vf most = v_set1(0x1.fep127f); /* the largest bf16 number: larger ones would be rounded to infinity */
    for (int d = 0; d < round_step(dim); d += 16) {
        const int there = dim - d < 0 ? 0 : dim - d < 16 ? dim - d : 16;
        const vf x = _mm512_maskz_loadu_ps((__mmask16)((1u << there) - 1), row + d);
        const vm finite = _mm512_cmp_ps_mask(v_sub(x, x), v_set1(0.0f), _CMP_EQ_OQ);
        const vf cut = v_min(most, v_max(v_set1(-0x1.fep127f), x));
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v_pick(finite, cut, x));
        _mm256_storeu_si256((__m256i *)(high + d), rounded);
        if (!low) continue;
        const vf rest = _mm512_maskz_sub_ps(finite, x, wide(rounded));
        _mm256_storeu_si256((__m256i *)(low + d), (__m256i)_mm512_cvtneps_pbh(rest));
    }
}
#define NARROW narrow
#else
#define NARROW NULL
#endif

/* The rows of two keys are interleaved first, so that a transposition of 32-bit words completes the layout. */
static int pack_values(const void *const *rows, int n, int dim, ptrdiff_t length, uint16_t *dst)
{
    __m512i largest = _mm512_setzero_si512();
    for (int j = 0; j < n; j += STEP)
        for (int d = 0; d < dim; d += STEP) {
            __m512 even[16], odd[16]; /* of 16 pairs of keys: the even and the odd columns */
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int key = j + 2 * i;
                const __m512i a = key < n ? row_words(rows[key], d, dim) : _mm512_setzero_si512();
                const __m512i b = key + 1 < n ? row_words(rows[key + 1], d, dim) : _mm512_setzero_si512();
                const __m512i size = _mm512_set1_epi16(0x7fff);
                largest = _mm512_max_epu16(largest, _mm512_and_si512(a, size));
                largest = _mm512_max_epu16(largest, _mm512_and_si512(b, size));
                even[i] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
                odd[i] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
            }
            v_transpose(even);
            v_transpose(odd);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                uint16_t *at = dst + dhsa_square(d + 2 * i, j, length);
                _mm512_storeu_ps(at, even[i]);
                _mm512_storeu_ps(at + STEP, odd[i]);
            }
        }
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(PAIR_FP16 ? 0x7c00 : 0x7f80)) != 0;
}

static inline exponents exponents_of_job(const dhsa_exp_job *job)
{
    return (exponents){v_set1(job->factor), v_set1(job->inner), v_set1(job->outer)};
}

static inline __attribute__((always_inline)) int begin_softmax(const float *s, const float *top, int n, int base,
                                                               const int32_t *lo, const int32_t *hi, float *m,
                                                               float *alpha, dhsa_exp_job *job, const int masked,
                                                               const int capped)
{
    vf shift[V_PER];
    const int rounded = softmax_begin(s, masked ? NULL : top, n, base, lo, hi, exponents_of_job(job), m, alpha, shift,
                                      masked, capped, V_PER);
    for (int u = 0; u < V_PER; u++) v_store(job->shift + u * V_LEN, shift[u]);
    return rounded;
}

static void softmax(float *s, const float *top, int n, int base, const int32_t *lo, const int32_t *hi, float scale,
                    float softcap, float *m, float *l, float *alpha, uint16_t *p, uint16_t *low, dhsa_exp_job *job)
{
    job->s = s;
    job->alpha = alpha;
    job->lo = lo;
    job->hi = hi;
    job->p = p;
    job->low = low;
    job->l = l;
    job->n = n;
    job->base = base;
    job->at = 0;
    job->factor = softcap > 0 ? 1.0f : scale * K_LOG2E;
    job->inner = softcap > 0 ? scale / softcap : 0.0f;
    job->outer = softcap * K_LOG2E;
    for (int r = 0; r < LANES; r++) job->sum[r] = 0;
    if (softcap > 0)
        job->rounded = lo ? begin_softmax(s, top, n, base, lo, hi, m, alpha, job, 1, 1)
                          : begin_softmax(s, top, n, base, lo, hi, m, alpha, job, 0, 1);
    else
        job->rounded = lo ? begin_softmax(s, top, n, base, lo, hi, m, alpha, job, 1, 0)
                          : begin_softmax(s, top, n, base, lo, hi, m, alpha, job, 0, 0);
}

/* Computes the exponentials of at most `pairs` pairs of keys of a job. If n is odd, the last key is not among them. */
static inline __attribute__((always_inline)) void exp_pairs(dhsa_exp_job *job, int pairs, const int masked,
                                                            const int rounded, const int capped, const int split)
{
    const exponents e = exponents_of_job(job);
    const vf zero = v_set1(0.0f);
    vf shift[V_PER], sum[V_PER];
    int j = job->at;
    for (int u = 0; u < V_PER; u++) {
        shift[u] = v_load(job->shift + u * V_LEN);
        sum[u] = v_load(job->sum + u * V_LEN);
    }
    for (; pairs > 0 && j + 2 <= job->n; pairs--, j += 2)
#pragma GCC unroll 2
        for (int u = 0; u < V_PER; u++) {
            const float *at = job->s + (ptrdiff_t)j * LANES + u * V_LEN;
            const vf x = exponent(v_load(at), e, shift[u], rounded, capped);
            const vf y = exponent(v_load(at + LANES), e, shift[u], rounded, capped);
            vf a = split ? v_exp2(x) : v_exp2_half(x), b = split ? v_exp2(y) : v_exp2_half(y);
            if (masked) {
                const int32_t *lo = job->lo + u * V_LEN, *hi = job->hi + u * V_LEN;
                a = v_pick(v_range(lo, hi, job->base + j), a, zero);
                b = v_pick(v_range(lo, hi, job->base + j + 1), b, zero);
            }
            sum[u] = v_add(sum[u], v_add(a, b));
            const ptrdiff_t to = ((ptrdiff_t)(j / 2) * LANES + u * V_LEN) * 2;
            v_pairs(a, b, job->p + to, split ? job->low + to : NULL);
        }
    for (int u = 0; u < V_PER; u++) v_store(job->sum + u * V_LEN, sum[u]);
    job->at = j;
}

/* The same for a job that wants `low`. Its other properties are no constants: the products beside it are three times
 * as many, so that this counts less. */
static __attribute__((noinline)) void exp_split(dhsa_exp_job *job, int pairs)
{
    exp_pairs(job, pairs, job->lo != NULL, job->rounded, job->outer > 0, 1);
}

/* The same, but only for a job without a mask and without `rounded`. The products of another panel call it between
 * tile instructions. */
static inline __attribute__((always_inline)) void exp_some(dhsa_exp_job *job, int pairs)
{
    if (!job || job->lo || job->rounded) return;
    if (job->low)
        exp_split(job, pairs);
    else if (job->outer > 0)
        exp_pairs(job, pairs, 0, 0, 1, 0);
    else
        exp_pairs(job, pairs, 0, 0, 0, 0);
}

/* Completes a job: the remaining pairs, the last key if n is odd, zeros up to a whole step, and the sum. */
static void finish_exp(dhsa_exp_job *job)
{
    const int capped = job->outer > 0;
    if (job->low)
        exp_split(job, job->n);
    else if (capped && job->lo)
        exp_pairs(job, job->n, 1, 0, 1, 0);
    else if (capped)
        exp_pairs(job, job->n, 0, 0, 1, 0);
    else if (job->lo && job->rounded)
        exp_pairs(job, job->n, 1, 1, 0, 0);
    else if (job->lo)
        exp_pairs(job, job->n, 1, 0, 0, 0);
    else if (job->rounded)
        exp_pairs(job, job->n, 0, 1, 0, 0);
    else
        exp_pairs(job, job->n, 0, 0, 0, 0);
    vf sum[V_PER];
    for (int u = 0; u < V_PER; u++) {
        sum[u] = v_load(job->sum + u * V_LEN);
        if (job->at == job->n) continue;
        const int j = job->n - 1;
        const float *at = job->s + (ptrdiff_t)j * LANES + u * V_LEN;
        const vf x = exponent(v_load(at), exponents_of_job(job), v_load(job->shift + u * V_LEN), job->rounded, capped);
        vf a = job->low ? v_exp2(x) : v_exp2_half(x);
        if (job->lo) a = v_pick(v_range(job->lo + u * V_LEN, job->hi + u * V_LEN, job->base + j), a, v_set1(0.0f));
        sum[u] = v_add(sum[u], a);
        const ptrdiff_t to = ((ptrdiff_t)(j / 2) * LANES + u * V_LEN) * 2;
        v_pairs(a, v_set1(0.0f), job->p + to, job->low ? job->low + to : NULL);
    }
    for (int j = (job->n + 1) / 2; j % (STEP / 2); j++) {
        memset(job->p + (ptrdiff_t)j * LANES * 2, 0, LANES * 4);
        if (job->low) memset(job->low + (ptrdiff_t)j * LANES * 2, 0, LANES * 4);
    }
    softmax_end(job->l, job->alpha, sum, V_PER);
}
