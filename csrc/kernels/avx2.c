/* avx2.c: the AVX2 + FMA + F16C tier: vectors of 8, panels of 16 rows. */
#include "kernels/tiers.h"
#if DHSA_X86
#define DHSA_TARGET DHSA_TARGET_AVX2
#include "kernels/target_begin.h"
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define K_ISA avx2
#define K_TEXT "avx2"
#define V_LEN 8
#define V_PER 2
#define QK_ROWS 6
#define PV_ROWS 4

typedef __m256 vf;
typedef __m256 vm;

static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf v_set1(float x) { return _mm256_set1_ps(x); }
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }

/* 2^x = 2^n * p(x - n) with n = round(x). The power is added to the exponent bits of p, which is the polynomial of
 * degree 6 with the least relative error (2e-9) on [-1/2, 1/2]. Below 2^-126 the result is 0. v_max returns its
 * second argument if either is NaN, so x is the second. */
static inline vf v_exp2(vf x)
{
    const vf c = v_max(v_set1(-127.0f), x), n = _mm256_round_ps(c, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
             f = v_sub(c, n);
    vf p = v_fma(v_set1(0x1.41d334p-13f), f, v_set1(0x1.5f456ap-10f));
    p = v_fma(p, f, v_set1(0x1.3b2dbcp-7f));
    p = v_fma(p, f, v_set1(0x1.c6aed4p-5f));
    p = v_fma(p, f, v_set1(0x1.ebfbdap-3f));
    p = v_fma(p, f, v_set1(0x1.62e430p-1f));
    p = v_fma(p, f, v_set1(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, v_set1(-126.0f), _CMP_LT_OQ), p);
}

/* The 12-bit estimate would need two Newton steps, and a division takes no longer than these. */
static inline vf v_rcp(vf x) { return _mm256_div_ps(v_set1(1.0f), x); }

static inline float v_sum(vf x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline vm v_range(const int32_t *lo, const int32_t *hi, int j)
{
    const __m256i at = _mm256_set1_epi32(j), below = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)lo), at);
    return _mm256_castsi256_ps(
        _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)hi), at)));
}
static inline vf v_pick(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
static inline vm v_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vf v_from_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vf v_from_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline void v_to_f16(vf x, uint16_t *p)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void v_to_bf16(vf x, uint16_t *p)
{
    const __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
    const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, even), _mm256_set1_epi32(0x7fff)), 16);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    r = _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(r));
}
static inline void v_pairs_bf16(const uint16_t *p, vf *even, vf *odd)
{
    const __m256i x = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
}
static inline vf v_of_bits(vf x)
{
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_cvtps_epi32(x), _mm256_setzero_si256()));
}
static inline vf v_sums(const vf *x)
{
    const vf a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const vf b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return v_add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
/* Interleaves neighbouring vectors, then pairs of them, then the two halves. */
static inline void v_transpose(vf *x)
{
    vf a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
            b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
            b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

#include "kernels/tile_tpl.h"

#include "kernels/target_end.h"
#else
typedef int dhsa_avx2_not_here; /* an empty translation unit is not ISO C */
#endif
