/* bf16_tpl.h: packing and softmax for the tiers that multiply bf16 pairs, shared by avx512bf16.c and amx.c; both have AVX-512
 * and its BF16 instructions. */
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/ops512.h"

/* Two keys' probabilities of the same rows. */
static inline void v_pairs(vf a, vf b, uint16_t *to)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                           19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
}

/* v_exp2 with a fit of degree 4, off by 3e-6 at most: bf16 rounds by up to 2e-3. */
static inline vf v_exp2_half(vf x)
{
    const vf f = _mm512_reduce_ps(x, 0x09);
    vf p = v_fma(v_set1(0x1.bb7cd2p-7f), f, v_set1(0x1.aa13fp-5f));
    p = v_fma(p, f, v_set1(0x1.ee798ap-3f));
    p = v_fma(p, f, v_set1(0x1.62d166p-1f));
    p = v_fma(p, f, v_set1(0x1.00002cp+0f));
    return _mm512_scalef_ps(p, x);
}
#define K_PAIRS
#include "kernels/softmax_tpl.h"

enum { LANES = K_LANES, STEP = DHSA_PAIR_STEP };

static inline int round_step(int n) { return (n + STEP - 1) / STEP * STEP; }

/* 32 numbers of a row from column d on, zeros past its end. */
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
                x[i] =
                    r + i < n ? _mm512_castsi512_ps(_mm512_xor_si512(row_words(rows[r + i], d, dim), sign)) : _mm512_setzero_ps();
            v_transpose(x);
            for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + ((ptrdiff_t)(d / 2 + i) * LANES + r) * 2, x[i]);
        }
}

static void pack_keys(const void *const *rows, int n, int dim, uint16_t *dst)
{
    const int padded = round_step(dim);
    for (int j = 0; j < n; j++)
        for (int d = 0; d < padded; d += STEP) _mm512_storeu_si512(dst + dhsa_square(j, d, padded), row_words(rows[j], d, dim));
}

static int pack_values(const void *const *rows, int n, int dim, uint16_t *dst)
{
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __m512i even, odd; /* word 2i (2i + 1) of the first source for i < 16, of the second after that */
    uint16_t pick[2][32];
    __mmask32 bad = 0;
    for (int i = 0; i < 32; i++) {
        pick[0][i] = (uint16_t)(i < 16 ? 2 * i : 32 + 2 * (i - 16));
        pick[1][i] = (uint16_t)(pick[0][i] + 1);
    }
    even = _mm512_loadu_si512(pick[0]);
    odd = _mm512_loadu_si512(pick[1]);
    const int padded = round_step(n);
    for (int j = 0; j < n; j += STEP)
        for (int d = 0; d < dim; d += STEP) {
            __m512 x[2][16];
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 16; i++) {
                    const int key = j + half * 16 + i;
                    const __m512i row = key < n ? row_words(rows[key], d, dim) : _mm512_setzero_si512();
                    bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row, exponent), exponent);
                    x[half][i] = _mm512_castsi512_ps(row);
                }
                v_transpose(x[half]);
            }
            for (int i = 0; i < 16; i++) {
                const __m512i a = _mm512_castps_si512(x[0][i]), b = _mm512_castps_si512(x[1][i]);
                uint16_t *at = dst + dhsa_square(d + 2 * i, j, padded);
                _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, even, b));
                _mm512_storeu_si512(at + STEP, _mm512_permutex2var_epi16(a, odd, b));
            }
        }
    return bad != 0;
}

static void softmax(float *s, int n, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap, float *m, float *l,
                    float *alpha, uint16_t *p)
{
    softmax_step(s, n, base, lo, hi, scale, softcap, m, l, alpha, p);
}
