/* avx512bf16.c: bf16 products by vdpbf16ps. In each of 16 lanes, it multiplies two neighbouring elements of both
 * inputs and adds the products to an fp32 sum. */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AVX512BF16
#define DHSA_TARGET DHSA_TARGET_AVX512BF16
#include "kernels/target_begin.h"
#define PAIR_FP16 0
#include "kernels/pairs_tpl.h"

enum { ROWS = 8 };

/* Broadcasts one 32-bit word, which holds two elements, to all lanes. */
static inline __m512bh pair(const uint16_t *at)
{
    int word;
    memcpy(&word, at, sizeof word);
    return (__m512bh)_mm512_set1_epi32(word);
}

static inline __m512bh words(const uint16_t *at) { return (__m512bh)_mm512_loadu_si512(at); }

/* acc[i][u] = the products of row i of y and lanes 16 u .. 16 u + 15 of x, summed over `squares` consecutive
 * squares, of whose 16 rows y points to the first of 8. y holds keys and x a panel, or y holds value columns and x
 * probabilities. */
static inline __attribute__((always_inline)) void products(const uint16_t *x, const uint16_t *y, int squares,
                                                           __m512 acc[ROWS][2])
{
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (; squares > 0; squares--, y += 15 * STEP)
        for (int t = 0; t < STEP / 2; t++, x += 2 * LANES, y += 2) {
            const __m512bh x0 = words(x), x1 = words(x + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                const __m512bh b = pair(y + i * STEP);
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x0, b);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x1, b);
            }
        }
}

static void qk(const uint16_t *q, const uint16_t *k, int n, int dim, float *s, float *top, dhsa_ahead *ahead)
{
    const int padded = round_step(dim);
    __m512 top0 = _mm512_set1_ps(-INFINITY), top1 = top0;
    for (int j = 0; j < n; j += ROWS) {
        __m512 acc[ROWS][2];
        products(q, k + dhsa_square(j, 0, padded), padded / STEP, acc);
        dhsa_ask(ahead, ROWS * padded);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            if (j + i < n) {
                top0 = _mm512_max_ps(top0, acc[i][0]);
                top1 = _mm512_max_ps(top1, acc[i][1]);
            }
            _mm512_storeu_ps(s + (ptrdiff_t)(j + i) * LANES, acc[i][0]);
            _mm512_storeu_ps(s + (ptrdiff_t)(j + i) * LANES + 16, acc[i][1]);
        }
    }
    _mm512_storeu_ps(top, top0);
    _mm512_storeu_ps(top + 16, top1);
}

static void pv(const uint16_t *p, const uint16_t *v, ptrdiff_t v_stride, int n, int dim, const float *alpha, float *o,
               dhsa_ahead *ahead, dhsa_exp_job *meanwhile)
{
    (void)meanwhile; /* not used: products and exponentials need the same execution units */
    const __m512 a0 = _mm512_loadu_ps(alpha), a1 = _mm512_loadu_ps(alpha + 16);
    for (int d = 0; d < dim; d += ROWS) {
        __m512 acc[ROWS][2];
        products(p, v + d / 16 * v_stride + d % 16 * STEP, round_step(n) / STEP, acc);
        dhsa_ask(ahead, ROWS * n);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            float *at = o + (ptrdiff_t)(d + i) * LANES;
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), a0, acc[i][0]));
            _mm512_storeu_ps(at + 16, _mm512_fmadd_ps(_mm512_loadu_ps(at + 16), a1, acc[i][1]));
        }
    }
}

static void nothing(void) {}

const dhsa_pair_kernels dhsa_bf16_avx512bf16 = {nothing, nothing, pack_panel, pack_keys, pack_values,
                                                qk,      softmax, finish_exp, pv,        NARROW};

#include "kernels/target_end.h"
#else
typedef int dhsa_avx512bf16_not_here; /* an empty translation unit is not ISO C */
#endif
