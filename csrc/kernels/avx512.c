/* avx512.c: the AVX-512 tier. Its panels have 48 rows: with 8 keys this makes 24 sums in registers, and the fewest
 * other instructions for each multiplication. */
#include "kernels/tiers.h"
#if DHSA_X86
#define K_ISA avx512
#define V_PER 3
#include "kernels/avx512_tpl.h"
#else
typedef int dhsa_avx512_not_here; /* an empty translation unit is not ISO C */
#endif
