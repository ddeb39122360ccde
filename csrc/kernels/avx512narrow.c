/* avx512narrow.c: the AVX-512 kernels with panels of 32 rows, which is how the products of 16-bit pairs take them. Not a tier of
 * its own: the table under those of avx512bf16.c and amx.c. */
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define V_PER 2
#include "kernels/ops512.h"

#define K_ISA avx512narrow
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
typedef int dhsa_avx512narrow_not_here; /* an empty translation unit is not ISO C */
#endif
