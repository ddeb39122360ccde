/* amx.c: bf16 products by tile registers. */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))),           \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif
#define PAIR_FP16 0
#define PAIR_TABLE dhsa_bf16_amx
#define MULTIPLY _tile_dpbf16ps

#include "kernels/amx_tpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int dhsa_amx_not_here; /* an empty translation unit is not ISO C */
#endif
