/* avx512narrow.c: the AVX-512 kernels with panels of 32 rows, the size that products of 16-bit pairs use. It is not
 * a tier: the tiers of avx512bf16.c and amx.c take their other kernels from this table. */
#include "kernels/tiers.h"
#if DHSA_X86
#define K_ISA avx512narrow
#define V_PER 2
#include "kernels/avx512_tpl.h"
#else
typedef int dhsa_avx512narrow_not_here; /* an empty translation unit is not ISO C */
#endif
