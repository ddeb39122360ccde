/* scalar.c: the tier that runs on every CPU, in plain C, one element at a time. Tests compare all other tiers with
 * it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels/half.h"

#define K_ISA scalar
#define K_TEXT "scalar"
#define V_LEN 1
#define V_PER 8
#define QK_ROWS 2
#define PV_ROWS 2

typedef float vf;
typedef int vm;

static inline vf v_load(const float *p) { return *p; }
static inline void v_store(float *p, vf x) { *p = x; }
static inline vf v_set1(float x) { return x; }
static inline vf v_add(vf a, vf b) { return a + b; }
static inline vf v_sub(vf a, vf b) { return a - b; }
static inline vf v_mul(vf a, vf b) { return a * b; }
static inline vf v_div(vf a, vf b) { return a / b; }
/* Not fmaf(): on a CPU without the instruction it is a slow library call. */
static inline vf v_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf v_max(vf a, vf b) { return a > b ? a : b; }
static inline vf v_min(vf a, vf b) { return a < b ? a : b; }
static inline vf v_exp2(vf x) { return exp2f(x); }
static inline vf v_rcp(vf x) { return 1.0f / x; }
static inline float v_sum(vf x) { return x; }
static inline vm v_range(const int32_t *lo, const int32_t *hi, int j) { return *lo <= j && j < *hi; }
static inline vf v_pick(vm m, vf a, vf b) { return m ? a : b; }
static inline vm v_eq(vf a, vf b) { return a == b; }
static inline vf v_from_f16(const uint16_t *p) { return dhsa_from_f16(*p); }
static inline vf v_from_bf16(const uint16_t *p) { return dhsa_from_bf16(*p); }
static inline void v_to_f16(vf x, uint16_t *p) { *p = dhsa_to_f16(x); }
static inline void v_to_bf16(vf x, uint16_t *p) { *p = dhsa_to_bf16(x); }
static inline void v_pairs_bf16(const uint16_t *p, vf *even, vf *odd)
{
    *even = dhsa_from_bf16(p[0]);
    *odd = dhsa_from_bf16(p[1]);
}
static inline vf v_of_bits(vf x)
{
    const uint32_t bits = x > 0 ? (uint32_t)lrintf(x) : 0;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline vf v_sums(const vf *x) { return x[0]; }
static inline void v_transpose(vf *x) { (void)x; }

#include "kernels/tile_tpl.h"
