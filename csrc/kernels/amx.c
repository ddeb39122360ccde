/* amx.c: bf16 products by tile registers (AMX). */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AMX
#define PAIR_FP16 0
#define PAIR_TABLE dhsa_bf16_amx
#define MULTIPLY _tile_dpbf16ps

#include "kernels/amx_tpl.h"
#else
typedef int dhsa_amx_not_here; /* an empty translation unit is not ISO C */
#endif
