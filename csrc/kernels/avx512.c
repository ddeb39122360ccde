/* avx512.c: the AVX-512 tier (F, BW, DQ, VL): vectors of 16, panels of 32 rows. */
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "kernels/transpose512.h"

#define K_ISA avx512
#define K_TEXT "avx512"
#define V_LEN 16
#define V_PER 2
#ifndef QK_ROWS
#define QK_ROWS 8
#endif
#ifndef PV_ROWS
#define PV_ROWS 8
#endif

typedef __m512 vf;
typedef __mmask16 vm;

static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf v_set1(float x) { return _mm512_set1_ps(x); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }

/* 2^x = 2^floor(x) * p(x - floor(x)); p is the degree-6 fit of least relative error (2e-9) on [0, 1). vreduceps gives 0 for
 * an infinite x and vscalefps takes the power from it, so that 2^-inf is 0 without a clamp. */
static inline vf v_exp2(vf x)
{
    const vf f = _mm512_reduce_ps(x, 0x09);
    vf p = v_fma(v_set1(0x1.c72118p-13f), f, v_set1(0x1.461956p-10f));
    p = v_fma(p, f, v_set1(0x1.3d28p-7f));
    p = v_fma(p, f, v_set1(0x1.c685p-5f));
    p = v_fma(p, f, v_set1(0x1.ebfd9ep-3f));
    p = v_fma(p, f, v_set1(0x1.62e42ap-1f));
    p = v_fma(p, f, v_set1(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* The 14-bit estimate and one Newton step. */
static inline vf v_rcp(vf x)
{
    const vf r = _mm512_rcp14_ps(x);
    return v_mul(r, _mm512_fnmadd_ps(x, r, v_set1(2.0f)));
}

static inline float v_sum(vf x) { return _mm512_reduce_add_ps(x); }
static inline vm v_range(const int32_t *lo, const int32_t *hi, int j)
{
    const __m512i at = _mm512_set1_epi32(j);
    return _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(_mm512_loadu_si512(lo), at), _mm512_loadu_si512(hi), at);
}
static inline vf v_pick(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
static inline vm v_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vf v_from_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf v_from_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void v_to_f16(vf x, uint16_t *p) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
static inline void v_to_bf16(vf x, uint16_t *p)
{
    const __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
    const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, even), _mm512_set1_epi32(0x7fff)), 16);
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(r));
}
static inline void v_transpose(vf *x) { dhsa_transpose512(x); }

#include "kernels/tile_tpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int dhsa_avx512_not_here; /* an empty translation unit is not ISO C */
#endif
