/* ops512.h: the vector operations that tile_tpl.h and softmax_tpl.h need, in AVX-512 (F, BW, DQ, VL). */
#ifndef DHSA_OPS512_H
#define DHSA_OPS512_H

#include <immintrin.h>
#include <stdint.h>

#define V_LEN 16

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

/* 2^x = 2^floor(x) * p(x - floor(x)), where p is the polynomial of degree 6 with the least relative error (2e-9) on
 * [0, 1). vreduceps returns 0 for an infinite x, and vscalefps multiplies by 2^floor(x), so that 2^-inf is 0 without
 * a clamp. */
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
    return _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(_mm512_loadu_si512(lo), at), _mm512_loadu_si512(hi),
                                        at);
}
static inline vf v_pick(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
static inline vm v_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vf v_from_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf v_from_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void v_to_f16(vf x, uint16_t *p)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_to_bf16(vf x, uint16_t *p)
{
    const __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
    const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, even), _mm512_set1_epi32(0x7fff)), 16);
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(r));
}
static inline void v_pairs_bf16(const uint16_t *p, vf *even, vf *odd)
{
    const __m512i x = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
static inline vf v_of_bits(vf x)
{
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512()));
}
/* Interleaves pairs of vectors and adds the halves, first within 128-bit quarters, then across quarters. */
static inline vf v_sums(const vf *x)
{
    vf a[8], b[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = v_add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        b[i] = v_add(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    b[0] = v_add(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    b[2] = v_add(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    return v_add(_mm512_shuffle_f32x4(b[0], b[2], 0x88), _mm512_shuffle_f32x4(b[0], b[2], 0xdd));
}
/* Interleaves neighbouring vectors, then pairs of them, then 128-bit quarters of vectors that are four and eight
 * apart. */
static inline void v_transpose(vf *x)
{
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            b[i + 2 * h] = _mm512_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
            b[i + 2 * h + 1] = _mm512_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                     odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88),
                     odd2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        x[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        x[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#endif
