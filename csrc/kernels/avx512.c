/* avx512.c: the AVX-512 tier (F, BW, DQ, VL): vectors of 16, panels of 48 rows: with 8 keys that makes 24 sums, and the fewest
 * instructions beside the multiplications. */
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define V_PER 3
#include "kernels/ops512.h"

#define K_ISA avx512
#define K_TEXT "avx512"
#define QK_ROWS 8
#define PV_ROWS 8

#include "kernels/tile_tpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int dhsa_avx512_not_here; /* an empty translation unit is not ISO C */
#endif
